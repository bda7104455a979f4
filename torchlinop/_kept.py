"""Linearizations of all batches: built once, kept while they fit and nothing changed."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from torchlinop._joining import groups, linearized_as_one
from torchlinop._watch import Watch
from torchlinop.autodiff.columns import BlockState, apply_rows
from torchlinop.autodiff.recording import EXCLUSIVE
from torchlinop.data import Batch, DataChangedError
from torchlinop.sources.protocol import Source


class LinearMap(Protocol):
    """What one batch contributes, linearized."""

    #: bytes that the linearization keeps alive
    nbytes: int


Map = TypeVar("Map", bound=LinearMap)

#: share of the free memory that is used by default
_MEMORY_SHARE = 0.5
#: products with kept linearizations before those of small batches are joined
_WARM_UP = 2


class KeptLinearizations(Generic[Map]):
    """The linear maps of all batches, in the order of the data.

    Parameters
    ----------
    source
        What is linearized.
    linearize
        Builds the linear map of one batch.
    ordered
        Whether the maps belong to places in the order of the data.
    """

    def __init__(
        self, source: Source, linearize: Callable[[Batch], Map], *, ordered: bool = False
    ) -> None:
        if ordered:
            source.batches.require_order()
        self._source = source
        self._linearize = linearize
        self._ordered = ordered
        #: whether maps of several batches may be made one, until that has failed
        self._joins = not ordered and source.options.check_deterministic
        self._streams: set[torch.cuda.Stream] = set()
        self.block_state = BlockState()
        self._kept: _Kept[Map] = _Kept(source)

    def refresh(self) -> None:
        """Forget what is kept and look at function and data anew.

        After an error or an interrupt what was kept is kept still.
        """
        with EXCLUSIVE:
            self._source.survey()
            self._begin()

    def _begin(self) -> None:
        """Keep what belongs to the last look at the source from now on."""
        if self._ordered:
            self._source.batches.require_order()
        self._kept = _Kept(self._source)
        self.block_state = BlockState()

    def __reduce__(self) -> Any:
        """Pickle how the maps are made: graphs cannot be, and are made again on demand."""
        make = functools.partial(KeptLinearizations, ordered=self._ordered)
        return make, (self._source, self._linearize)

    @property
    def nbytes(self) -> int:
        """Bytes that the kept linearizations hold."""
        return self._kept.nbytes

    @contextmanager
    def current(self) -> Iterator[Iterable[Map]]:
        """The maps of all batches as they are now, to be used within this context.

        Stale ones are built anew. While maps are being built no other thread gets any.
        """
        with EXCLUSIVE:
            kept = self._up_to_date()
            self._follow_stream()
            if not kept.complete:
                with closing(self._build(kept)) as maps:
                    yield maps
                self._lead_streams()
                return
            self._join(kept)
        yield kept.maps.values()
        self._lead_streams()

    def _up_to_date(self) -> _Kept[Map]:
        if self._source.changed() or self._kept.data_changed():
            self.refresh()
        elif self._kept.look != self._source.looks:  # another operator has looked
            self._begin()
        return self._kept

    def _follow_stream(self) -> None:
        """Let a CUDA stream wait for those on which maps were made or last used."""
        device = self._source.space.device
        if device.type == "cuda":
            stream = torch.cuda.current_stream(device)
            for other in self._streams - {stream}:
                stream.wait_stream(other)
            self._streams.add(stream)

    def _lead_streams(self) -> None:
        """Let the other streams wait for the current one, which now reads their memory.

        When a map is dropped, its memory goes back to the stream that made it.
        """
        if len(self._streams) > 1:
            stream = torch.cuda.current_stream(self._source.space.device)
            for other in self._streams - {stream}:
                other.wait_stream(stream)

    def _build(self, kept: _Kept[Map]) -> Generator[Map]:
        batches = self._source.batches
        if batches.shuffles:  # parts of two orders do not add up
            kept.clear()
        for batch in batches:
            linear_map = kept.maps.get(batch.position)
            if linear_map is None:
                linear_map = self._linearize(batch)
                kept.add(batch, linear_map)
            yield linear_map
        kept.complete = len(kept.maps) == batches.num_batches
        if kept.complete:
            batches.rest()

    def _join(self, kept: _Kept[Map]) -> None:
        """Make one map of those of small batches, once a few products were asked for."""
        kept.products += 1
        if kept.products != _WARM_UP or not self._joins:
            return
        space = self._source.space
        v = torch.empty(space.dim, dtype=space.dtype, device=space.device)
        # a gradient is kept for each batch, and will be kept once
        own = {i: max(kept.maps[i].nbytes - v.nbytes, 0) for i in kept.batches}
        for group in groups(own):
            batches = [kept.batches[i] for i in group]
            maps = [kept.maps[i] for i in group]
            if not kept.has_room(sum(linear_map.nbytes for linear_map in maps)):
                break
            whole = linearized_as_one(batches, maps, self._linearize, v)
            if whole is None:
                self._joins = False
                break
            kept.replace(group, whole)
        kept.batches.clear()

    def retrying(self, compute: Callable[[], Tensor]) -> Tensor:
        """Run a pass over the maps; once more if the data turns out to have changed."""
        try:
            return compute()
        except DataChangedError:
            self.refresh()
            return compute()

    def total(self, x: Tensor) -> Tensor:
        """Sum over the batches of the maps' products with ``x``, ``(N, K) -> (M, K)``.

        The maps are functions of rows, as ``apply_rows`` takes them.
        """
        if x.shape[1] == 1:
            v = x.reshape(-1).contiguous()
            return self.retrying(lambda: self._sum(lambda f: f(v))).unsqueeze(1)
        rows = x.T.contiguous()
        return self.retrying(lambda: self._sum(lambda f: self.block(f, rows, f))).T

    def _sum(self, product: Callable[[Any], Tensor]) -> Tensor:
        total = None
        with self.current() as maps:
            for linear_map in maps:
                part = product(linear_map)
                total = part if total is None else total.add_(part)
        assert total is not None  # no data is no risk
        return total

    def block(self, function: Any, rows: Tensor, linear_map: LinearMap) -> Tensor:
        """Apply a function of ``linear_map`` to rows: in blocks where that pays."""
        return apply_rows(function, rows, nbytes=linear_map.nbytes, state=self.block_state)


class _Kept(Generic[Map]):
    """The maps that belong to one look at a source."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.look = source.looks
        self._watches: list[Watch] = []
        self._full = source.options.cache is False
        self.maps: dict[int, Map] = {}
        #: of the maps, as long as they may be joined
        self.batches: dict[int, Batch] = {}
        #: products since there is one of each batch
        self.products = 0
        self.nbytes = 0
        #: whether there is one of each batch
        self.complete = False

    def data_changed(self) -> bool:
        """Whether batches of a loader have changed in place."""
        return any(watch.changed() for watch in self._watches)

    @functools.cached_property
    def _budget(self) -> float:
        given = self._source.options.memory_budget
        return free_memory(self._source.space.device) if given is None else given

    def clear(self) -> None:
        self.maps.clear()
        self.batches.clear()
        self.nbytes = 0

    def has_room(self, nbytes: int) -> bool:
        """Whether so many bytes more fit."""
        return self._source.options.cache is True or self.nbytes + nbytes <= self._budget

    def replace(self, positions: list[int], linear_map: Map) -> None:
        """Put one map in the place of several; whoever uses those goes on."""
        maps = {i: kept for i, kept in self.maps.items() if i not in set(positions)}
        maps[positions[0]] = linear_map
        self.nbytes = sum(kept.nbytes for kept in maps.values())
        self.maps = maps

    def add(self, batch: Batch, linear_map: Map) -> None:
        """Keep a map if it fits."""
        if self._full:
            return
        if not self.has_room(linear_map.nbytes):
            self._full = True
            if self._source.batches.shuffles:  # parts of two orders do not add up
                self.clear()
            return
        if not self._source.batches.lasts:  # else the source watches them
            self._watches.append(Watch(batch.sources))
        self.maps[batch.position] = linear_map
        self.batches[batch.position] = batch
        self.nbytes += linear_map.nbytes


def free_memory(device: torch.device) -> float:
    """Return the default budget in bytes: a share of what is free on the device."""
    if device.type == "cuda":
        return _MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as info:
            for line in info:
                if line.startswith("MemAvailable:"):
                    return _MEMORY_SHARE * 1024 * int(line.split()[1])
    except OSError:
        pass
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return 0.5 * _MEMORY_SHARE * total
    return float(2 << 30)

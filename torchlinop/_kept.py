"""Linearizations of all batches: built once, kept while they fit and nothing changed."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

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
        self._budget: float | None = None
        self.maps: dict[int, Map] = {}
        self.nbytes = 0
        #: whether there is one of each batch
        self.complete = False

    def data_changed(self) -> bool:
        """Whether batches of a loader have changed in place."""
        return any(watch.changed() for watch in self._watches)

    def clear(self) -> None:
        self.maps.clear()
        self.nbytes = 0

    def add(self, batch: Batch, linear_map: Map) -> None:
        """Keep a map if it fits."""
        if self._full:
            return
        if self._source.options.cache == "auto":
            if self._budget is None:
                given = self._source.options.memory_budget
                device = self._source.space.device
                self._budget = free_memory(device) if given is None else given
            if self.nbytes + linear_map.nbytes > self._budget:
                self._full = True
                if self._source.batches.shuffles:  # parts of two orders do not add up
                    self.clear()
                return
        if not self._source.batches.lasts:  # else the source watches them
            self._watches.append(Watch(batch.sources))
        self.maps[batch.position] = linear_map
        self.nbytes += linear_map.nbytes


def free_memory(device: torch.device) -> float:
    """Return the default budget in bytes: a share of what is free on the device."""
    return _MEMORY_SHARE * available_memory(device)


def available_memory(device: torch.device) -> float:
    """Bytes that are free on the device, or on the host for any but CUDA devices."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as info:
            for line in info:
                if line.startswith("MemAvailable:"):
                    return 1024.0 * int(line.split()[1])
    except OSError:
        pass
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return 0.5 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return float(4 << 30)

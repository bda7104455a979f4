"""Linearizations of all batches: built once, kept while they fit and nothing changed."""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from torchlinop._hosting import Hosting, host_budget
from torchlinop._joining import groups, linearized_as_one
from torchlinop._memory import free_memory
from torchlinop._watch import Watch
from torchlinop.autodiff.experience import Experience
from torchlinop.autodiff.recording import EXCLUSIVE
from torchlinop.data import Batch, DataChangedError
from torchlinop.sources.protocol import Source


class LinearMap(Protocol):
    """What one batch contributes, linearized."""

    @property
    def nbytes(self) -> int:
        """Bytes that the linearization keeps alive."""

    @property
    def calls(self) -> int:
        """How many single products it has seen."""


Map = TypeVar("Map", bound=LinearMap)
Made = TypeVar("Made", bound=LinearMap, covariant=True)


class Linearizer(Protocol[Made]):
    """Makes the linear map of a batch."""

    def linearize(self, batch: Batch) -> Made:
        """Linearize a batch, for products that are to come."""

    def passing(self, batch: Batch) -> Made:
        """Return what may be used once: nothing of it is kept."""


class KeptLinearizations(Generic[Map]):
    """The linear maps of all batches, in the order of the data.

    Parameters
    ----------
    source
        What is linearized.
    linearizer
        Builds the linear map of a batch.
    ordered
        Whether the maps belong to places in the order of the data.
    gather
        Makes one map of those of all batches.

    Attributes
    ----------
    ranks : Ranks
        The processes that have maps of the data.
    """

    def __init__(
        self,
        source: Source,
        linearizer: Linearizer[Map],
        *,
        ordered: bool = False,
        gather: Callable[[list[Map]], Map] | None = None,
    ) -> None:
        self.ranks = source.options.ranks
        if ordered:
            self.ranks.on_each(source.batches.require_order, "looking at the data's order")
        self._source = source
        self._linearizer = linearizer
        self._ordered = ordered
        self._gather = gather
        #: whether maps of several batches may be made one, until that has failed
        self._joins = not ordered and source.options.check_deterministic
        self._on_streams = source.space.device.type == "cuda"
        self._streams: set[torch.cuda.Stream] = set()
        self._kept: _Kept[Map] = _Kept(source)
        self._hosting = self._new_hosting(None)
        self.experience = Experience(self._kept.room)

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
        expected = max((m.calls for m in self._kept.maps.values()), default=0)
        self._kept = _Kept(self._source)
        self._hosting = self._new_hosting(self._hosting.pays)
        self.experience.go_on(self._kept.room, expected)

    def _new_hosting(self, pays: bool | None) -> Hosting:
        """What is on the host beside what is kept here: only functions of rows can be."""
        possible = self._gather is not None and self._source.options.cache == "auto"
        budget = host_budget(self._source) if possible else 0.0
        return Hosting(self._source, self._linearizer, budget, pays)

    def __reduce__(self) -> Any:
        """Pickle how the maps are made: graphs cannot be, and are made again on demand."""
        make = functools.partial(
            KeptLinearizations, ordered=self._ordered, gather=self._gather
        )
        return make, (self._source, self._linearizer)

    @property
    def nbytes(self) -> int:
        """Bytes that the kept linearizations hold."""
        return self._kept.nbytes

    def current(self, columns: int = 1) -> AbstractContextManager[Iterable[Map]]:
        """The maps of all batches as they are now, to be used within this context.

        Stale ones are built anew. While maps are being built no other thread gets any.
        Those of small batches are joined before the second product, and before a first one
        with several columns.
        """
        with EXCLUSIVE:
            # what is to be built looks for changes itself
            kept = self._up_to_date() if self._kept.all else self._kept
            if not kept.all:
                return self._built(columns)
            self._follow_stream()
            if kept.batches:
                self._join(kept)
            if self._on_streams:
                return _Reading(kept.all, self._lead_streams)
            return kept.reading

    @contextmanager
    def _built(self, columns: int) -> Iterator[Iterable[Map]]:
        with EXCLUSIVE:
            kept = self._up_to_date()
            self._follow_stream()
            if kept.all:  # another thread has been here
                yield kept.all
            else:
                with closing(self._build(kept)) as maps:
                    if columns > 1 and self._joins:
                        yield self._joined_first(kept, maps)
                    else:
                        yield maps
            self._lead_streams()

    def _joined_first(self, kept: _Kept[Map], maps: Iterator[Map]) -> Iterable[Map]:
        """Build all maps that can be kept before any of them is used."""
        built: deque[Map] = deque()
        for linear_map in maps:
            built.append(linear_map)
            if kept.full:
                return _emptied(built, maps)
        if kept.batches:
            built.clear()
            self._join(kept)
        return kept.all or built

    def _up_to_date(self) -> _Kept[Map]:
        kept = self._kept
        if self._source.changed() or (kept.watches and kept.data_changed()):
            if not self.ranks.alone:  # all have to look anew
                raise DataChangedError("The model or the data has changed.")
            self.refresh()
        elif kept.look != self._source.looks:  # another operator has looked
            self._begin()
        return self._kept

    def _follow_stream(self) -> None:
        """Let a CUDA stream wait for those on which maps were made or last used."""
        if self._on_streams:
            device = self._source.space.device
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
        batch = None
        for batch in batches:
            linear_map = kept.maps.get(batch.position)
            if linear_map is None and kept.full:
                hosted: Any = None
                if not batches.shuffles:
                    hosted = self._hosting.linearized(batch, kept.room())
                if hosted is not None:
                    kept.maps[batch.position] = hosted
                yield self._linearizer.passing(batch) if hosted is None else hosted
                continue
            if linear_map is None:
                linear_map = self._linearizer.linearize(batch)
                kept.add(batch, linear_map)
            yield linear_map
        batch = None  # which nobody else may hold
        if living := self._hosting.living_data():
            kept.watches.append(Watch(living))
        if len(kept.maps) == batches.num_batches:
            self._gather_all(kept)
            batches.rest()

    def _gather_all(self, kept: _Kept[Map]) -> None:
        maps = list(kept.maps.values())
        kept.all = maps if self._gather is None or not maps else [self._gather(maps)]
        kept.reading = nullcontext(kept.all)

    def _join(self, kept: _Kept[Map]) -> None:
        """Make one map of those of small batches, once a few products were asked for."""
        maps = dict(kept.maps)
        space = self._source.space
        sizes = {i: maps[i].nbytes for i in kept.batches} if self._joins else {}
        for group in groups(sizes):
            parts = [maps[i] for i in group]
            if sum(part.nbytes for part in parts) > kept.room():
                break
            batches = [kept.batches[i] for i in group]
            whole = linearized_as_one(batches, parts, self._linearizer.linearize, space)
            if whole is None:
                self._joins = False
                break
            maps = {i: kept_map for i, kept_map in maps.items() if i not in group}
            maps[group[0]] = whole
        kept.maps = maps
        self._gather_all(kept)
        kept.batches.clear()

    def retrying(self, compute: Callable[..., Tensor], *args: Any) -> Tensor:
        """Run a pass over the maps; once more if something turns out to have changed."""
        try:
            return compute(*args)
        except DataChangedError:
            self.refresh()
            return compute(*args)


def _emptied(built: deque[Map], others: Iterator[Map]) -> Iterator[Map]:
    """Yield maps, then others; nobody else may hold one that has been used."""
    while built:
        yield built.popleft()
    yield from others


class _Reading(Generic[Map]):
    """A context that yields maps, and does something when they have been used."""

    def __init__(self, maps: Iterable[Map], at_end: Callable[[], None]) -> None:
        self._maps = maps
        self._at_end = at_end

    def __enter__(self) -> Iterable[Map]:
        return self._maps

    def __exit__(self, *error: object) -> None:
        self._at_end()


class _Kept(Generic[Map]):
    """The maps that belong to one look at a source."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.look = source.looks
        self.watches: list[Watch] = []
        #: whether no other map will be kept
        self.full = source.options.cache is False
        self.maps: dict[int, Map] = {}
        self._built = 0
        #: bytes of data that graphs keep alive, and nobody else
        self._data = 0
        #: of the maps, as long as they may be joined
        self.batches: dict[int, Batch] = {}
        #: what there is to apply, once there is a map of each batch
        self.all: list[Map] = []
        self.reading = nullcontext(self.all)

    def data_changed(self) -> bool:
        """Whether batches of a loader have changed in place."""
        return any(watch.changed() for watch in self.watches)

    @property
    def nbytes(self) -> int:
        """Bytes that the maps hold."""
        return sum(m.nbytes for m in self.maps.values())

    def room(self) -> float:
        """Bytes that are left of the budget."""
        return self._limit - self.nbytes - self._data

    @functools.cached_property
    def _limit(self) -> float:
        if self._source.options.cache is True:
            return math.inf
        given = self._source.options.memory_budget
        return free_memory(self._source.space.device) if given is None else given

    def clear(self) -> None:
        self.maps.clear()
        self.batches.clear()
        self._built = self._data = 0

    def add(self, batch: Batch, linear_map: Map) -> None:
        """Keep a map if it fits."""
        if self.full:
            return
        lasts, device = self._source.batches.lasts, self._source.space.device
        data = sum(t.nbytes for t in batch.sources if not lasts and t.device == device)
        self._built += linear_map.nbytes + data
        if self._built > self._limit:
            self.full = True
            if self._source.batches.shuffles:  # parts of two orders do not add up
                self.clear()
            return
        self._data += data
        if not lasts:  # else the source watches them
            self.watches.append(Watch(batch.sources))
        self.maps[batch.position] = linear_map
        self.batches[batch.position] = batch

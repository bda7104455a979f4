"""Linearizations of all batches: built once, kept while they fit and nothing changed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from torchlinop._watch import Watch
from torchlinop.autodiff.columns import BlockState, apply_rows
from torchlinop.autodiff.linearize import EXCLUSIVE
from torchlinop.data import Batch, DataChangedError


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
        An :class:`~torchlinop.risk.EmpiricalRisk`, or one of its relatives.
    linearize
        Builds the linear map of one batch.
    """

    def __init__(self, source: Any, linearize: Callable[[Batch], Map]) -> None:
        self._source = source
        self._linearize = linearize
        self.block_state = BlockState()
        self._streams: set[torch.cuda.Stream] = set()
        self._forget()

    def _forget(self) -> None:
        self._kept: dict[int, Map] = {}
        self._watches = [self._source.watch()]
        self._bytes = 0
        self._full = self._source.cache is False
        self._complete = False
        self._budget: float | None = None

    def refresh(self) -> None:
        """Forget what is kept and look at model and data anew."""
        self._source.survey()
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        """Graphs cannot be pickled; they are rebuilt on demand."""
        return {"_source": self._source, "_linearize": self._linearize}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**{k.removeprefix("_"): v for k, v in state.items()})  # type: ignore[misc]

    @property
    def nbytes(self) -> int:
        """Bytes that the kept linearizations hold."""
        return self._bytes

    def visit(self, use: Callable[[Map], None]) -> None:
        """Call ``use`` with every map in turn; stale ones are rebuilt first."""
        with EXCLUSIVE:
            self._follow_stream()
            for watch in self._watches:
                if watch.changed():
                    self.refresh()
                    break
            if not self._complete:  # one thread builds at a time
                with contextlib.closing(self._building_pass()) as maps:
                    for linear_map in maps:
                        use(linear_map)
                self._lead_streams()
                return
            kept = list(self._kept.values())
        for linear_map in kept:
            use(linear_map)
        self._lead_streams()

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

    def _building_pass(self) -> Generator[Map]:
        if self._source.batches.shuffles:  # parts of two orders do not add up
            self._kept.clear()
            self._bytes = 0
        for batch in self._source.batches:
            kept = self._kept.get(batch.position)
            if kept is None:
                kept = self._linearize(batch)
                self._keep(batch, kept)
            yield kept
        self._complete = len(self._kept) == self._source.batches.num_batches

    def _keep(self, batch: Batch, linear_map: Map) -> None:
        if self._full:
            return
        if self._source.cache == "auto":
            if self._budget is None:
                device = self._source.space.device
                given = self._source.memory_budget
                self._budget = free_memory(device) if given is None else given
            if self._bytes + linear_map.nbytes > self._budget:
                self._full = True
                if self._source.batches.shuffles:  # parts of two orders do not add up
                    self._kept.clear()
                    self._bytes = 0
                return
        self._kept[batch.position] = linear_map
        self._bytes += linear_map.nbytes
        if not self._source.batches.lasts:  # else the source watches them
            self._watches.append(Watch(batch.sources))

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
            return self.retrying(lambda: self._total_of_one(v)).unsqueeze(1)
        rows = x.T.contiguous()
        return self.retrying(lambda: self._total_of_rows(rows)).T

    def _total_of_one(self, v: Tensor) -> Tensor:
        total: list[Tensor] = []

        def add(linear_map: Any) -> None:
            part = linear_map(v)
            total[:] = [total[0].add_(part) if total else part]

        self.visit(add)
        return total[0]

    def _total_of_rows(self, rows: Tensor) -> Tensor:
        total: list[Tensor] = []

        def add(linear_map: Any) -> None:
            nbytes = linear_map.nbytes
            part = apply_rows(linear_map, rows, nbytes=nbytes, state=self.block_state)
            total[:] = [total[0].add_(part) if total else part]

        self.visit(add)
        return total[0]


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

"""Linearizations that do not fit the device: on the host, where that is the quicker way."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchlinop._memory import free_memory
from torchlinop.autodiff.experience import Experience
from torchlinop.autodiff.hosted import HostedRows
from torchlinop.autodiff.probing import probe_vector
from torchlinop.data import Batch
from torchlinop.sources.protocol import Source

#: a product with what is on the host may take this part of the time of computing it anew
_PAYS = 0.9
#: products that are timed, of which the quickest counts
_TRIALS = 2


class Hosting:
    """Decides which linearizations are on the host, and how much there is room for.

    The first one is used once in either way, at a random vector: it has to give the same
    and to take less time. What it has shown holds for the others.

    Parameters
    ----------
    source
        What is linearized.
    linearizer
        Makes functions of rows of a batch.
    budget
        Bytes on the host.
    pays
        Whether it is quicker; None where that is not known yet.
    """

    def __init__(
        self, source: Source, linearizer: Any, budget: float, pays: bool | None
    ) -> None:
        self._source, self._linearizer = source, linearizer
        self._room = budget
        self.pays = pays
        self._data: list[weakref.ref[Tensor]] = []

    def linearized(self, batch: Batch, device_room: float) -> HostedRows | None:
        """Linearize a batch onto the host; None where it is to be computed anew.

        ``device_room``: for what of it stays on the device.
        """
        if self.pays is False or self._room <= 0:
            return None
        source = self._source
        own = replace(batch)  # of which the data is let go
        stay = (*source.leaves(), *(batch.sources if source.batches.lasts else ()))
        linearize = partial(self._linearizer.linearize, own)
        try:
            rows = HostedRows.of(linearize, source.space.device, stay)
            if rows.host_bytes > self._room or rows.nbytes > device_room:
                self._room = 0.0
                return None
            own.leave()  # before it is tried: some evaluate the model in each product
            if self.pays is None:
                self.pays = self._is_quicker(rows, batch)
        except Exception:  # graphs that cannot be moved, no memory: the other way tells
            self.pays = False
        if not self.pays:
            return None
        self._room -= rows.host_bytes
        if not source.batches.lasts:  # else the source watches them
            owners = (t if t._base is None else t._base for t in batch.sources)
            self._data += [weakref.ref(t) for t in owners]
        return rows

    def living_data(self) -> list[Tensor]:
        """Data of what is on the host that somebody else holds, and may change.

        Asked for once, after a pass. A loader's own batches are gone by then.
        """
        living = [t for ref in self._data if (t := ref()) is not None]
        self._data.clear()
        return living

    def _is_quicker(self, rows: HostedRows, batch: Batch) -> bool:
        space = self._source.space
        v = probe_vector(space.dim, space.dtype, space.device)
        anew = self._linearizer.passing(batch)
        expected, limit = _timed(partial(anew.row, v, Experience()), v.device)
        found, seconds = _timed(partial(rows.row, v, Experience()), v.device)
        bound = torch.finfo(v.dtype).eps ** (1 / 3) * expected.norm()
        return seconds <= _PAYS * limit and bool((found - expected).norm() <= bound)


def host_budget(source: Source) -> float:
    """Return bytes on the host for what does not fit the device of a source."""
    given = source.options.host_memory_budget
    if given is not None:
        return given
    if source.space.device.type == "cpu":  # which has no other memory
        return 0.0
    return free_memory(torch.device("cpu"))


def _timed(product: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float]:
    """Return a product and the seconds that it takes."""
    best = math.inf
    for _ in range(_TRIALS):
        _wait(device)
        start = time.perf_counter()
        result = product()
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return result, best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

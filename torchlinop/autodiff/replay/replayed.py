"""Functions that are replayed once they have been called a few times."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchlinop.autodiff.replay.recording import record_calls, repeats
from torchlinop.autodiff.replay.selecting import dependent, replayable
from torchlinop.autodiff.replay.simplifying import simplify
from torchlinop.autodiff.replay.writing import write

#: calls of a function before it is recorded
WARM_UP = 3

Function = Callable[[Tensor], Tensor]


class Replayed:
    """Calls of one linear function of a tensor, replayed from the fourth on.

    The function is handed over with each call, so that its owner, which may own this
    object too, is freed as soon as it is no longer used.
    """

    def __init__(self) -> None:
        self._run: Function | None = None
        self._calls = 0

    def __call__(self, function: Function, x: Tensor) -> Tensor:
        """Evaluate ``function``, always the same one, at a contiguous ``x``."""
        if self._run is not None:
            return self._run(x)
        self._calls += 1
        if self._calls == WARM_UP + 1:
            self._run = record(function, x)
            if self._run is not None:
                return self._run(x)
        return function(x)


def record(function: Function, x: Tensor) -> Function | None:
    """Return the kernels of ``function`` as one function, None if it has no replay."""
    try:
        with torch.no_grad():
            return _record(function, x)
    except Exception:  # not below a recorder, no memory for it: the function still works
        return None


def _record(function: Function, x: Tensor) -> Function | None:
    generator = torch.Generator("cpu").manual_seed(0)
    # made on the host: not every device has a generator of its own
    probe = torch.rand(x.shape, generator=generator, dtype=x.dtype, device="cpu")
    probe = probe.to(x.device)
    first, second = record_calls(function, x.clone()), record_calls(function, probe)
    if first is None or second is None or not repeats(first, second):
        return None
    del second  # the memory of every temporary
    calls = dependent(first)
    if not replayable(calls, first):
        return None
    run = write(*simplify(calls, first), first.x)
    del first, calls
    return run if _reproduces(run, function, probe) else None


def _reproduces(run: Function, function: Function, probe: Tensor) -> bool:
    """Whether a replay gives what the function gives where nobody listens."""
    replayed, reference = run(probe), function(probe)
    if replayed.shape != reference.shape or replayed.dtype != reference.dtype:
        return False
    error = torch.linalg.vector_norm(replayed - reference)
    scale = torch.linalg.vector_norm(reference)
    return bool(error <= 1e3 * torch.finfo(probe.dtype).eps * scale)

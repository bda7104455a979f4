"""Recording a function and writing the replay, if it is one."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from torchlinop.autodiff.replay.captured import captured
from torchlinop.autodiff.replay.recording import Call, Recording, record_calls
from torchlinop.autodiff.replay.selecting import dependent, replayable
from torchlinop.autodiff.replay.simplifying import simplify
from torchlinop.autodiff.replay.writing import write

Function = Callable[[Tensor], Tensor]

#: entries of a vector that are compared together
_PIECE = 256
#: entries by which vectors are told apart
_SAMPLES = 64


class Replay(NamedTuple):
    """The kernels of a function as one function."""

    run: Function
    #: what it holds beside what was there before: constants that were computed
    nbytes: int


class Unchecked(NamedTuple):
    """A replay that has not been compared with its function."""

    run: Function
    nbytes: int
    #: what its temporaries take, if none is freed before the end
    temporaries: int
    #: some entries of the vector at which it was recorded
    sample: list[float]

    def compared(self, function: Function, x: Tensor) -> tuple[Tensor, Replay | None]:
        """Evaluate a linear function at a contiguous ``x``, and compare the replay with it.

        Costs one replay more. Where ``x`` is much like the vector of the recording, so that
        its numbers may be taken for constants, or mostly zero, it is compared at a random
        vector, for a product more.

        Returns
        -------
        result : Tensor
            ``function(x)``.
        replay : Replay or None
            None where the replay does not give the same.
        """
        try:
            with torch.no_grad():
                result, same = self._compared(function, x)
                if not same:
                    return result, None
                captures = x.is_cuda
                run = captured(self.run, x, self.temporaries) if captures else self.run
                return result, Replay(run, self.nbytes)
        except Exception:  # no memory for it
            pass
        return function(x), None

    def _compared(self, function: Function, x: Tensor) -> tuple[Tensor, bool]:
        tells = _tells(_sample(x), self.sample)
        # one vector at a time
        replayed = _digest(self.run(x)) if tells else None
        same = not tells and self._is_same_at_random(function, x)
        result = function(x)
        if replayed is not None:
            same = bool(result.any()) and _agree(replayed, result)
            same = same or self._is_same_at_random(function, x)
        return result, same

    def _is_same_at_random(self, function: Function, x: Tensor) -> bool:
        generator = torch.Generator("cpu").manual_seed(0)
        # made on the host: not every device has a generator of its own
        probe = torch.rand(x.shape, generator=generator, dtype=x.dtype, device="cpu")
        probe = probe.to(x.device)
        return _agree(_digest(self.run(probe)), function(probe))


def record(function: Function, x: Tensor) -> tuple[Tensor, Unchecked | None]:
    """Evaluate a linear function at a contiguous ``x`` and look how to replay it.

    Parameters
    ----------
    function
        Linear, from a tensor to a fresh tensor.
    x
        Its argument.

    Returns
    -------
    result : Tensor
        ``function(x)``.
    replay : Unchecked or None
        None where a replay is not possible: ``function`` reads a value back to the host,
        refers to memory by position, or cannot be called below a recorder.
    """
    try:
        with torch.no_grad():
            result, recording = record_calls(function, x)
            return result, None if recording is None else _replay(recording, x)
    except Exception:  # not below a recorder, no memory for it: the function still works
        pass
    return function(x), None  # with the memory of the frames above freed


def _replay(recording: Recording, x: Tensor) -> Unchecked | None:
    calls = dependent(recording)
    if not replayable(calls, recording):
        return None
    calls, result = simplify(calls, recording)
    run = write(calls, result, recording.x)
    temporaries = _temporary_bytes(calls) if x.is_cuda else 0
    return Unchecked(run, _computed_bytes(calls), temporaries, _sample(x))


def _sample(x: Tensor) -> list[float]:
    """Return a few entries, by which vectors are told apart."""
    found: list[float] = x[:: max(1, len(x) // _SAMPLES)].tolist()
    return found


def _tells(new: list[float], old: list[float]) -> bool:
    """Whether a vector is not mostly zero, and not much like an old one or its multiple."""
    pairs = (new, old), (new, new), (old, old)
    both, a, b = [abs(sum(map(operator.mul, *pair))) for pair in pairs]
    return 2 * new.count(0) < len(new) and both * both < 0.999 * a * b


def _computed_bytes(calls: list[Call]) -> int:
    """Bytes of the constants that did not exist before the recording."""
    sizes = {}
    for call in calls:
        for value in call.inputs:
            if value.constant is not None and value.memory >= 0:
                storage = value.constant.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def _temporary_bytes(calls: list[Call]) -> int:
    """Bytes of all that the calls make."""
    sizes: dict[int, int] = {}
    for call in calls:
        for value in call.outputs:
            size = math.prod(value.shape) * value.dtype.itemsize
            sizes[value.memory] = max(size, sizes.get(value.memory, 0))
    return sum(sizes.values())


class _Digest(NamedTuple):
    """What is kept of a vector for a comparison."""

    shape: torch.Size
    sums: Tensor


def _digest(y: Tensor) -> _Digest:
    """Weighted sums of the entries of each piece."""
    weights = torch.linspace(1, 2, _PIECE, dtype=y.dtype, device=y.device)
    whole, rest = _pieces(y)
    sums = [whole @ weights, (rest @ weights[: len(rest)]).view(1)]
    return _Digest(y.shape, torch.cat(sums))


def _pieces(y: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of equal length, and what is left."""
    length = y.numel() // _PIECE * _PIECE
    flat = y.reshape(-1)
    return flat[:length].view(-1, _PIECE), flat[length:]


def _agree(replayed: _Digest, y: Tensor) -> bool:
    """Whether two vectors are the same but for rounding, in each of their pieces."""
    if replayed.shape != y.shape or replayed.sums.dtype != y.dtype:
        return False
    eps = torch.finfo(y.dtype).eps * _PIECE**0.5
    norms = torch.cat([torch.linalg.vector_norm(p, dim=-1).view(-1) for p in _pieces(y)])
    # a piece may be what cancellation has left of numbers like the others
    bounds = 1e3 * eps * norms + 10 * eps * torch.linalg.vector_norm(norms)
    return bool(((replayed.sums - _digest(y).sums).abs() <= bounds).all())

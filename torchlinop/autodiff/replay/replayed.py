"""Recording a function and writing the replay, if it is one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from torchlinop.autodiff.probing import probe_vector
from torchlinop.autodiff.replay.captured import captured
from torchlinop.autodiff.replay.recording import Call, Recording, record_calls
from torchlinop.autodiff.replay.selecting import dependent, replayable
from torchlinop.autodiff.replay.simplifying import simplify
from torchlinop.autodiff.replay.writing import write

Function = Callable[[Tensor], Tensor]

#: entries of a vector that are compared together
_PIECE = 256


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

    def compared(self, function: Function, x: Tensor) -> tuple[Tensor, Replay | None]:
        """Evaluate a linear function at a contiguous ``x``, and compare the replay with it.

        Costs one evaluation more and a replay, at a random vector: at ``x`` itself much
        could agree by chance, where it is zero, or as it was when the replay was recorded.

        Returns
        -------
        result : Tensor
            ``function(x)``.
        replay : Replay or None
            None where the replay does not give the same.
        """
        replay = None
        try:
            with torch.no_grad():
                replay = self._checked(function, x)  # one vector at a time
        except Exception:  # no memory for it
            pass
        return function(x), replay

    def _checked(self, function: Function, x: Tensor) -> Replay | None:
        probe = probe_vector(len(x), x.dtype, x.device)
        if not _agree(_digest(self.run(probe)), function(probe)):
            return None
        run = captured(self.run, probe, self.temporaries) if x.is_cuda else self.run
        return Replay(run, self.nbytes)


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
    return Unchecked(run, _computed_bytes(calls), temporaries)


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

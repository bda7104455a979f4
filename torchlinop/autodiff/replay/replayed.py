"""Recording a function and writing the replay, if it is one."""

from __future__ import annotations

import math
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


class Replay(NamedTuple):
    """The kernels of a function as one function."""

    run: Function
    #: what it holds beside what was there before: constants that were computed
    nbytes: int


def record(function: Function, x: Tensor) -> tuple[Tensor, Replay | None]:
    """Evaluate a linear function at a contiguous ``x`` and look how to replay it.

    Costs two more evaluations, at a random vector, and the time to look at each kernel.

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
    replay : Replay or None
        None where a replay is not possible: ``function`` reads a value back to the host,
        refers to memory by position, cannot be called below a recorder, or is not
        reproduced.
    """
    try:
        with torch.no_grad():
            result, recording = record_calls(function, x)
            if recording is None:
                return result, None
            return result, _replay(recording, function, x)
    except Exception:  # not below a recorder, no memory for it: the function still works
        pass
    return function(x), None  # with the memory of the frames above freed


def _replay(recording: Recording, function: Function, x: Tensor) -> Replay | None:
    calls = dependent(recording)
    if not replayable(calls, recording):
        return None
    calls, result = simplify(calls, recording)
    run = write(calls, result, recording.x)
    nbytes, temporaries = _computed_bytes(calls), _temporary_bytes(calls)
    del recording, calls, result  # constants that the replay does not need
    generator = torch.Generator("cpu").manual_seed(0)
    # made on the host: not every device has a generator of its own
    probe = torch.rand(x.shape, generator=generator, dtype=x.dtype, device="cpu")
    probe = probe.to(x.device)
    if not _agree(_digest(run(probe)), _digest(function(probe))):  # where nobody listens
        return None
    if x.is_cuda:
        run = captured(run, probe, temporaries)
    return Replay(run, nbytes)


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
    """What is kept of a vector for a comparison, piece by piece."""

    shape: torch.Size
    dtype: torch.dtype
    sums: Tensor
    norms: Tensor


def _digest(y: Tensor) -> _Digest:
    flat = y.reshape(-1)
    whole = flat[: flat.numel() // _PIECE * _PIECE].view(-1, _PIECE)
    rest = flat[whole.numel() :]
    sums = torch.cat([whole.sum(1), rest])
    return _Digest(
        y.shape,
        y.dtype,
        sums,
        torch.cat([torch.linalg.vector_norm(whole, dim=1), rest.abs()]),
    )


def _agree(replayed: _Digest, reference: _Digest) -> bool:
    """Whether two vectors are the same but for rounding, in each of their pieces."""
    if replayed.shape != reference.shape or replayed.dtype != reference.dtype:
        return False
    eps = torch.finfo(reference.dtype).eps
    norms = reference.norms
    # a piece may be what cancellation has left of numbers like the others
    bounds = eps * (1e3 * norms + 10 * torch.linalg.vector_norm(norms))
    sums_agree = (replayed.sums - reference.sums).abs() <= _PIECE**0.5 * bounds
    norms_agree = (replayed.norms - norms).abs() <= bounds
    return bool((sums_agree & norms_agree).all())

"""Which of the recorded kernels depend on the argument, and if they can be replayed."""

from __future__ import annotations

import torch
from torch import Tensor

from torchlinop.autodiff.replay.recording import Call, Recording, storage

_aten = torch.ops.aten

#: kernels that see more than their arguments' values
_REFUSED = {_aten.as_strided.default, _aten._local_scalar_dense.default}


def dependent(recording: Recording) -> list[Call]:
    """Return the calls whose memory depends on the argument.

    Memory, not values: a buffer of zeros that is later written into has to be made
    anew in every replay. Whatever is written into during the recording counts as
    dependent, since its value at one moment is not what is left of it at the end.
    """
    calls = recording.calls
    found = {storage(recording.x)}
    for call in calls:
        found.update(storage(t) for t in call.written())
    size = 0
    while len(found) != size:
        size = len(found)
        for call in calls:
            if any(storage(t) in found for t in call.inputs()):
                found.update(storage(t) for t in call.outputs())
    return [
        call
        for call in calls
        if any(storage(t) in found for t in call.inputs() + call.outputs())
    ]


def replayable(calls: list[Call], recording: Recording) -> bool:
    """Whether calling these kernels again gives the result, in memory of its own."""
    named, made, outside = {id(recording.x)}, {storage(recording.x)}, set()
    for call in calls:
        if call.func in _REFUSED or not _returns_tensors(call):
            return False
        for t in call.inputs():
            if storage(t) not in made:
                outside.add(storage(t))
            elif id(t) not in named:  # a view that was made where nobody saw it
                return False
        for t in call.outputs():
            named.add(id(t))
            made.update({storage(t)} - outside)
    made.remove(storage(recording.x))
    return id(recording.result) in named and storage(recording.result) in made


def _returns_tensors(call: Call) -> bool:
    """Whether a result is a tensor or a flat list with a tensor in it."""
    results = call.result if isinstance(call.result, (tuple, list)) else [call.result]
    nested = any(isinstance(r, (tuple, list, dict)) for r in results)
    return not nested and any(isinstance(r, Tensor) for r in results)

"""Which of the recorded kernels depend on the argument, and if they can be replayed."""

from __future__ import annotations

import torch

from torchlinop.autodiff.replay.recording import Call, Recording, storage

_aten = torch.ops.aten

#: kernels that see the memory of their argument, not its values
BY_POSITION = {
    _aten._reshape_alias.default,
    _aten.as_strided.default,
    _aten.as_strided_.default,
    _aten.as_strided_copy.default,
    _aten.as_strided_scatter.default,
}
#: kernels that look at a shape, or at what was all right when the recording was made
_CHECKS = {
    _aten._has_same_storage_numel.default,
    _aten._linalg_check_errors.default,
    _aten.is_same_size.default,
}


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
        if call.func not in _CHECKS
        and any(storage(t) in found for t in call.inputs() + call.outputs())
    ]


def replayable(calls: list[Call], recording: Recording) -> bool:
    """Whether calling these kernels again gives the result, in memory of its own."""
    named, made, outside = {id(recording.x)}, {storage(recording.x)}, set()
    for call in calls:
        if not (call.outputs() or call.written()):  # a value is brought back to the host
            return False
        if call.func in BY_POSITION and storage(call.args[0]) == storage(recording.x):
            return False  # the argument may lie elsewhere in its memory
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

"""Which of the recorded kernels depend on the argument, and if they can be replayed."""

from __future__ import annotations

import torch

from torchlinop.autodiff.replay.recording import Call, Recording

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
    found = set(recording.dependent)
    size = len(found) if recording.complete else 0
    while len(found) != size:
        size = len(found)
        for call in recording.calls:
            if not found.isdisjoint([v.memory for v in call.inputs]):
                found.update([v.memory for v in call.outputs])
    return [
        call
        for call in recording.calls
        if call.func not in _CHECKS
        and not found.isdisjoint([v.memory for v in (*call.inputs, *call.outputs)])
    ]


def replayable(calls: list[Call], recording: Recording) -> bool:
    """Whether calling these kernels again gives the result, in memory of its own."""
    named, made, outside = {recording.x}, {0}, set()
    for call in calls:
        if not (call.outputs or call.written()):  # a value is brought back to the host
            return False
        if call.func in BY_POSITION and call.args[0].memory == 0:
            return False  # the argument may lie elsewhere in its memory
        for value in call.inputs:
            if value.memory not in made:
                outside.add(value.memory)
            elif value not in named:  # a view that was made where nobody saw it
                return False
            if value not in named and value.constant is None:
                # it was not known to be needed when it was made
                value.constant = value.alive()
                if value.constant is None:
                    return False
        for value in call.outputs:
            named.add(value)
            made.update({value.memory} - outside)
    made.remove(0)
    return recording.result in named and recording.result.memory in made

"""Recurrent networks without the fused kernels.

Those of GPUs have no second derivative. Those of CPUs have (torch 2.13), but products
through the graph of the explicit cells are faster, and vectorized. Faster by far are
recurrences that are written by hand: those of LSTMs without projections, GRUs and RNNs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn

from torchlinop.autodiff.rules.cells import GRU, LSTM, Cell, ReLU, Tanh
from torchlinop.autodiff.rules.functions import (
    EXACT,
    Rules,
    in_transform,
    is_differentiated,
)
from torchlinop.autodiff.rules.recurrences import states_of


def _without_fused_kernels(func: Callable) -> Callable:
    def rule(*args: Any, **kwargs: Any) -> Any:
        # torch.backends.*.flags() would touch precision settings too, and warn
        enabled = torch._C._get_cudnn_enabled(), torch._C._get_mkldnn_enabled()
        torch._C._set_cudnn_enabled(False)
        torch._C._set_mkldnn_enabled(False)
        try:
            return func(*args, **kwargs)
        finally:
            torch._C._set_cudnn_enabled(enabled[0])
            torch._C._set_mkldnn_enabled(enabled[1])

    return rule


class _Steps:
    """Sequences of the same length, all of them from their first step to their last."""

    def padded(self, x: Tensor) -> Tensor:
        """Bring the data into the form ``(T, B, ...)``."""
        return x

    def packed(self, x: Tensor) -> Tensor:
        """Bring ``(T, B, ...)`` into the form of the data."""
        return x

    def reversed(self, x: Tensor) -> Tensor:
        """Turn each sequence around."""
        return x.flip(0)

    def last(self, states: Tensor) -> Tensor:
        """The state after the last step of each sequence."""
        return states[-1]


class _PackedSteps(_Steps):
    """Sequences of different lengths, step after step, each of those that go on.

    Steps after the end of a sequence are computed, and nobody looks at them.
    """

    def __init__(self, batch_sizes: Tensor, device: torch.device) -> None:
        steps, batch = len(batch_sizes), int(batch_sizes[0])
        step, sequence = torch.arange(steps).unsqueeze(1), torch.arange(batch)
        goes_on = sequence < batch_sizes.unsqueeze(1)
        lengths = goes_on.sum(0)
        turned = torch.where(goes_on, lengths - 1 - step, step) * batch + sequence
        starts = (batch_sizes.cumsum(0) - batch_sizes).unsqueeze(1)
        self._shape = steps, batch
        self._rows = (starts + sequence).masked_fill(~goes_on, 0).flatten().to(device)
        self._valid = goes_on.flatten().nonzero().squeeze(1).to(device)
        self._turned = turned.flatten().to(device)
        self._ends = (lengths * batch + sequence).to(device)

    def padded(self, x: Tensor) -> Tensor:
        return x.index_select(0, self._rows).unflatten(0, self._shape)

    def packed(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1).index_select(0, self._valid)

    def reversed(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1).index_select(0, self._turned).unflatten(0, self._shape)

    def last(self, states: Tensor) -> Tensor:
        return states.flatten(0, 1).index_select(0, self._ends)


def _drive(x: Tensor, cell: Cell, weight: Tensor, biases: Sequence[Tensor]) -> Tensor:
    """What the input says to the gates of all steps, ``(T, B, G, H)``."""
    bias = None
    if not isinstance(cell, GRU):
        bias = biases[0] + biases[1] if biases else None
        return F.linear(x, weight, bias).unflatten(-1, (cell.gates, -1))
    size = len(weight) // 3
    m = x.new_zeros(size)
    if biases:
        rz, m = biases[1].split((2 * size, size))
        bias = biases[0] + torch.cat([rz, m.new_zeros(size)])
    parts = F.linear(x, weight, bias).split((2 * size, size), -1)
    drive = torch.cat([parts[0], m.expand(parts[1].shape), parts[1]], -1)
    return drive.unflatten(-1, (4, -1))


def _layer(
    x: Tensor,
    cell: Cell,
    steps: _Steps,
    parameters: Sequence[Sequence[Tensor]],
    initial: Sequence[Sequence[Tensor]],
) -> tuple[Tensor, list[list[Tensor]]]:
    """Output of a layer, and the final states in each direction."""
    outputs, finals = [], []
    for i, ((weight, recurrent, *biases), states) in enumerate(
        zip(parameters, initial, strict=True)
    ):
        drive = _drive(steps.reversed(x) if i else x, cell, weight, biases)
        trajectory = states_of(cell, recurrent, drive, states)
        finals.append([steps.last(s) for s in trajectory])
        h = trajectory[0][1:]
        outputs.append(steps.reversed(h) if i else h)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1), finals


def _by_recurrences(func: Callable, cell: Cell, is_used: Callable[[], bool]) -> Callable:
    explicit = _without_fused_kernels(func)

    def rule(*args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 9 or in_transform() or not is_used():
            return explicit(*args, **kwargs)
        if is_packed := isinstance(args[3], (list, tuple)):
            x, batch_sizes, hx, parameters, biases, _, dropout, train, both = args
        else:
            x, hx, parameters, biases, _, dropout, train, both, batch_first = args
        hx = [hx] if isinstance(hx, Tensor) else hx
        if not _are_covered(x, hx, parameters, cell) or x.ndim != (2 if is_packed else 3):
            return explicit(*args)
        steps = _Steps()
        if is_packed:
            # what nobody looks at must not be large, nor infinite: zero times that is NaN
            wasteful = 2 * len(x) < len(batch_sizes) * int(batch_sizes[0])
            if wasteful or isinstance(cell, ReLU):
                return explicit(*args)
            steps = _PackedSteps(batch_sizes, x.device)
        elif batch_first:
            x = x.transpose(0, 1)
        x = steps.padded(x)
        count, directions = 4 if biases else 2, 2 if both else 1
        tensors = [parameters[i : i + count] for i in range(0, len(parameters), count)]
        initial = list(zip(*(s.unbind() for s in hx), strict=True))
        finals: list[list[Tensor]] = []
        for i in range(0, len(tensors), directions):
            if i and dropout and train:
                x = steps.padded(torch.dropout(steps.packed(x), dropout, train))
            part = slice(i, i + directions)
            x, last = _layer(x, cell, steps, tensors[part], initial[part])
            finals += last
        x = steps.packed(x)
        if not is_packed and batch_first:
            x = x.transpose(0, 1)
        return x, *(torch.stack(s) for s in zip(*finals, strict=True))

    return rule


def _are_covered(
    x: Any, states: Sequence[Tensor], parameters: Sequence[Tensor], cell: Cell
) -> bool:
    """Whether the derivatives are written by hand for these."""
    tensors = [x, *states, *parameters]
    return (
        all(type(t) in (Tensor, nn.Parameter) for t in tensors)
        and is_differentiated(*tensors)
        and x.dtype in EXACT
        and all(t.dtype == x.dtype for t in tensors)
        and x.numel() > 0
        # an LSTM that projects its output has hidden states of another size
        and len({s.shape for s in states}) == 1
        and len(states) == cell.states
    )


def _in_forward_mode() -> bool:
    return forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled()


def _in_reverse_mode() -> bool:
    return forward_ad._current_level < 0 and torch.is_grad_enabled()


_FUNCTIONS: dict[Callable, Cell] = {
    torch.lstm: LSTM(),
    torch.gru: GRU(),
    torch.rnn_tanh: Tanh(),
    torch.rnn_relu: ReLU(),
}
#: in forward mode torch has no fused kernels, and the explicit cells are as slow
CORRECTIONS: Rules = {
    func: _by_recurrences(func, cell, _in_forward_mode) for func, cell in _FUNCTIONS.items()
}
RULES: Rules = {
    func: _by_recurrences(func, cell, _in_reverse_mode) for func, cell in _FUNCTIONS.items()
}

"""Branches and loops on tensors, which torch differentiates once only: run directly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from torchlinop.autodiff.rules.functions import Rules


def _cond(
    pred: Any, true_fn: Callable, false_fn: Callable, operands: Sequence[Any] = ()
) -> Any:
    taken = _truth(pred)
    if taken is None:
        return NotImplemented
    return (true_fn if taken else false_fn)(*operands)


def _while_loop(
    cond_fn: Callable,
    body_fn: Callable,
    carried_inputs: Sequence[Any],
    additional_inputs: Sequence[Any] = (),
) -> Any:
    carried = tuple(carried_inputs)
    while (goes_on := _truth(cond_fn(*carried, *additional_inputs))) is not False:
        if goes_on is None:
            return NotImplemented
        carried = tuple(body_fn(*carried, *additional_inputs))
    return carried


def _truth(pred: Any) -> bool | None:
    """Whether a condition holds, or None where that differs from sample to sample."""
    try:
        return bool(pred)
    except RuntimeError:  # within vmap
        return None


CORRECTIONS: Rules = {
    torch.ops.higher_order.cond: _cond,
    torch.ops.higher_order.while_loop: _while_loop,
}

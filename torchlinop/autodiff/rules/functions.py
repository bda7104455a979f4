"""What the rules have in common: when they apply, and how Functions call one another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.autograd import Function

#: a function of torch to what is called in its place, which may return NotImplemented
Rules = dict[Callable, Callable]

#: dtypes in which the rules are as accurate as what they replace
EXACT = (torch.float32, torch.float64)
#: below this number of entries a rule written in Python costs more than it saves
_SMALL = 1 << 15


def in_transform() -> bool:
    """Whether the code runs inside ``torch.func.grad``, ``vmap`` or another transform."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_differentiated(*tensors: Tensor | None) -> bool:
    """Whether somebody may ask for derivatives with respect to one of ``tensors``."""
    return (
        in_transform()
        or forward_ad._current_level >= 0
        or any(t is not None and t.requires_grad for t in tensors)
    )


def is_worth_a_function(x: Tensor) -> bool:
    """Whether a rule is exact for this tensor and worth its overhead."""
    return x.requires_grad and x.dtype in EXACT and x.numel() >= _SMALL


def call(function: type[Function], *args: Any) -> Any:
    """Apply a Function; without gradient mode call its forward, which is cheaper.

    The direct call also lets ``vmap`` see plain tensor operations.
    """
    if torch.is_grad_enabled():
        return function.apply(*args)
    return function.forward(*args)


def note_tensors(ctx: Any, inputs: tuple) -> None:
    """Remember which inputs are tensors: only they have an edge in the graph."""
    ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]


def wanted(ctx: Any) -> list[bool]:
    """Which of a Function's inputs the running backward pass asks for.

    ``ctx.needs_input_grad`` is also true for gradients that the engine will drop.
    """
    edges = iter(ctx.next_functions)
    return [is_tensor and _executes(next(edges)[0]) for is_tensor in ctx.is_tensor]


def _executes(node: Any) -> bool:
    if node is None:
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf that torch.autograd.grad was asked for
        return True

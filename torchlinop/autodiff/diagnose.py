"""Saying which operation has no derivative, and in which module it is."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

_SYMPTOMS = (
    "derivative for",
    "derivative of",
    "differentiate twice",
    "forward mode AD",
    "once_differentiable",
    "does not support",
    "not implemented for",
    "forward AD",
    "double backward",
    "setup_context",
    "vmap",
)


class UnsupportedDerivativeError(RuntimeError):
    """An operation of the model lacks a derivative that the product needs."""


def is_missing_derivative(error: BaseException) -> bool:
    """Whether an exception of torch means that a derivative is not implemented."""
    return isinstance(error, (RuntimeError, NotImplementedError)) and any(
        symptom in str(error) for symptom in _SYMPTOMS
    )


def explain(
    error: BaseException, model: Any, evaluate: Callable[[], Any], order: int
) -> UnsupportedDerivativeError:
    """Find the module that fails and describe the failure.

    Parameters
    ----------
    error
        What torch raised.
    model
        The user's model.
    evaluate
        Evaluates the model once, on the batch that failed.
    order
        Order of the derivative that was needed, 1 or 2.
    """
    calls: list[tuple[nn.Module, tuple, dict]] = []
    names: dict[int, str] = {}
    if isinstance(model, nn.Module):
        names = {id(m): n for n, m in model.named_modules()}

    def record(module: nn.Module, args: tuple, kwargs: dict, _: Any) -> None:
        if id(module) in names:
            calls.append((module, args, kwargs))

    handle = torch.nn.modules.module.register_module_forward_hook(record, with_kwargs=True)
    prediction = None
    try:
        with torch.enable_grad():
            prediction = evaluate()
    except Exception:  # the model's own failure; the calls up to it are recorded
        pass
    finally:
        handle.remove()

    where, operation = "the model", _operation_in(str(error))
    if operation is None and isinstance(prediction, Tensor):
        operation = _custom_function([prediction])
    for module, args, kwargs in calls:  # children come before their parents
        problem, function = _second_derivative_fails(module, args, kwargs)
        if problem is not None:
            name = names[id(module)] or "the model itself"
            where = f"module {name!r} ({type(module).__name__})"
            operation = _operation_in(problem) or function or operation
            break
    kind = {1: "derivative", 2: "second derivative"}[order]
    what = f"operation {operation}" if operation else "an operation"
    return UnsupportedDerivativeError(
        f"{what} in {where} has no {kind} in PyTorch, which this operator needs. "
        "Replace it by an equivalent made of differentiable operations; for a "
        "custom autograd.Function, remove once_differentiable and write backward with "
        "torch operations; where first derivatives are enough, use the GGN, which needs "
        f"no second derivative of the model. PyTorch said: {error}"
    )


def _second_derivative_fails(
    module: nn.Module, args: tuple, kwargs: dict
) -> tuple[str | None, str | None]:
    leaves: list[Tensor] = []

    def detached(t: Tensor) -> Tensor:
        t = t.detach()
        if t.is_floating_point():
            leaves.append(t.requires_grad_())
        return t

    state = {n: detached(p) for n, p in module.named_parameters()}
    state |= {n: b.clone() for n, b in module.named_buffers()}
    args, kwargs = pytree.tree_map_only(Tensor, detached, (args, kwargs))
    custom = None
    try:
        with torch.enable_grad():
            output = functional_call(module, state, args, kwargs)
            outputs = [
                t
                for t in pytree.tree_leaves(output)
                if isinstance(t, Tensor) and t.requires_grad
            ]
            custom = _custom_function(outputs)
            require_twice_differentiable(outputs)
            value = sum((t.square().sum() for t in outputs), torch.zeros(()))
            if not value.requires_grad:
                return None, None
            first = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
            total = sum(
                (g.square().sum() for g in first if g is not None and g.requires_grad),
                torch.zeros(()),
            )
            if total.requires_grad:
                torch.autograd.grad(total, leaves, allow_unused=True)
    except (RuntimeError, NotImplementedError) as error:
        return str(error), custom
    return None, None


def once_differentiable_functions(outputs: Sequence[Tensor]) -> list[str]:
    """Names of the Functions in the graph that are marked ``once_differentiable``.

    Differentiating their gradient again gives no error in PyTorch when only parameters
    are asked for: the term is silently missing.
    """
    return [
        kind.__name__
        for kind in _custom_functions(outputs)
        if _is_once_differentiable(kind.backward)
    ]


def require_twice_differentiable(outputs: Sequence[Tensor]) -> None:
    """Raise if a Function in the graph has no second derivative by declaration."""
    names = once_differentiable_functions(outputs)
    if names:
        raise RuntimeError(
            f"trying to differentiate twice {', '.join(names)}, marked with "
            "@once_differentiable"
        )


def _is_once_differentiable(backward: Any) -> bool:
    code = getattr(backward, "__code__", None)
    return (
        code is not None
        and code.co_filename == torch.autograd.function.__file__
        and hasattr(backward, "__wrapped__")
    )


def _custom_function(outputs: Sequence[Tensor]) -> str | None:
    """Name of a user-written autograd.Function in the graph, if there is one."""
    kinds = _custom_functions(outputs)
    return kinds[0].__name__ if kinds else None


def _custom_functions(outputs: Sequence[Tensor]) -> list[Any]:
    """All user-written autograd.Functions in the graph."""
    stack: list[Any] = [t.grad_fn for t in outputs]
    seen = set()
    kinds: dict[Any, None] = {}
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            kind: Any = type(node)
            kinds[kind._forward_cls] = None
        stack.extend(f for f, _ in node.next_functions)
    return [kind for kind in kinds if not kind.__module__.startswith("torchlinop.")]


def _operation_in(message: str) -> str | None:
    found = re.search(r"aten::(\w+)|derivative for '?(\w+)'?", message)
    return next((group for group in found.groups() if group), None) if found else None

"""Saying which operation has no derivative, and whether it is in a module or the loss."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn.modules import module as module_hooks
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from torchlinop.autodiff.graphs import (
    Output,
    edges_of,
    functions_among,
    leaves_among,
    marked_once,
    nodes_between,
    outputs_of,
)

#: what torch says when a derivative is missing, and nothing else that it says
_MISSING = re.compile(
    r"derivatives? (for|of) .{1,200}? (is|are) not (implemented|supported)"
    r"|[Tt]rying to (use forward AD|differentiate twice)"
    r"|must implement (the jvp function|either the backward or vjp)"
    r"|not (currently )?support (double backward|automatic differentiation)"
    r"|[Dd]ouble backwards? is not",
    re.DOTALL,
)
#: where the operation is named in such a message
_OPERATION = re.compile(
    r"derivatives? (?:for|of) (?:operat\w+ )?'?(?:aten::)?(\w+(?:\.\w+)?)"
    r"|forward AD with (?:aten::)?(\w+(?:\.\w+)?)"
    r"|differentiate twice (\w+(?:, \w+)*), marked"
)


class UnsupportedDerivativeError(RuntimeError):
    """An operation of the model or the loss lacks a derivative that the product needs."""


def is_missing_derivative(error: BaseException) -> bool:
    """Whether an exception of torch means that a derivative is not implemented."""
    return isinstance(error, RuntimeError) and bool(_MISSING.search(str(error)))


def explain(
    error: BaseException,
    model: Any,
    evaluate: Callable[[], Any],
    order: int,
    loss: Callable[[Tensor], Tensor] | None = None,
) -> UnsupportedDerivativeError:
    """Find the module that fails, or the loss, and describe the failure.

    Every module is differentiated twice within the graph that one evaluation records:
    no module is called a second time, and nothing is written to one.

    Parameters
    ----------
    error
        What torch raised.
    model
        What ``evaluate`` calls: the names of its modules are those in the message.
    evaluate
        Evaluates the model once, on the batch that failed, and returns its prediction.
    order
        2 for the Hessian. 1 for Jacobians and what is made of them: they need the second
        derivative only where forward-mode differentiation does not exist.
    loss
        The loss of that batch as a function of the prediction. Default: there is none.
    """
    if "aot_autograd" in str(error):
        return UnsupportedDerivativeError(
            "The model, or a part of it, is compiled by torch.compile, which has first "
            "derivatives only. Pass the model that was compiled instead. PyTorch said: "
            f"{error}"
        )
    calls, prediction = _record(model, evaluate)
    failures = [f for call in calls if (f := _failure(call)) is not None]
    if loss is not None and isinstance(prediction, Tensor):
        leaf = prediction.detach().requires_grad_()
        value = _attempt(lambda: loss(leaf))
        failure = _failure(_Call("the loss", edges_of(leaf), outputs_of(value)))
        failures += [] if failure is None else [failure]
    default = _Failure("the model", _operation_in(str(error)), False, 2)
    if default.operation is None and isinstance(prediction, Tensor):
        names = [
            kind.__name__ for kind in functions_among(nodes_between(edges_of(prediction)))
        ]
        default = default._replace(
            operation=", ".join(names) or None, is_custom=bool(names)
        )
    found = _matching(failures, error) or default
    return UnsupportedDerivativeError(
        f"{_statement(found, order)} {_advice(found, order)} PyTorch said: {error}"
    )


class _Call(NamedTuple):
    """One call of a module, by its place in the graph."""

    where: str
    inputs: list[GradientEdge]
    outputs: list[Output]


class _Failure(NamedTuple):
    where: str
    operation: str | None
    is_custom: bool
    order: int


def _record(model: Any, evaluate: Callable[[], Any]) -> tuple[list[_Call], Any]:
    """Evaluate; return the calls of modules, inner ones before outer ones, and the value.

    Edges of the graph are recorded rather than tensors, since a tensor that is modified
    in place later has another place in the graph then.
    """
    names: dict[int, str] = {}
    if isinstance(model, nn.Module):
        names = {id(m): n for n, m in model.named_modules()}
    calls: list[_Call] = []
    entered: list[tuple[nn.Module, list[GradientEdge]]] = []

    def enter(module: nn.Module, args: Any) -> None:
        entered.append((module, edges_of(args)))

    def leave(module: nn.Module, _: Any, kwargs: Any, output: Any) -> None:
        while entered:  # a call that raised was not left
            called, inputs = entered.pop()
            if called is module:
                break
        else:
            return
        kind = type(module).__name__
        name = names.get(id(module))
        where = f"module {name or 'the model itself'!r} ({kind})"
        where = f"a module of type {kind}" if name is None else where
        calls.append(_Call(where, inputs + edges_of(kwargs), outputs_of(output)))

    with (
        register_module_forward_pre_hook(enter),
        register_module_forward_hook(leave, with_kwargs=True) as handle,
    ):
        try:
            return calls, _attempt(evaluate)
        finally:  # torch 2.13 itself forgets to
            module_hooks._global_forward_hooks_with_kwargs.pop(handle.id, None)


def _attempt(evaluate: Callable[[], Any]) -> Any:
    """Evaluate with a graph; ``None`` where that fails by itself."""
    with torch.enable_grad():
        try:
            return evaluate()
        except Exception:  # what is known up to here is used
            return None


def _matching(failures: list[_Failure], error: BaseException) -> _Failure | None:
    """Of several operations without a derivative, the one that the error is about."""
    operation = _operation_in(str(error))

    def matches(failure: _Failure) -> bool:
        if operation is None:
            return failure.is_custom
        return _stem(failure.operation) == _stem(operation)

    return next(filter(matches, failures), next(iter(failures), None))


def _statement(failure: _Failure, order: int) -> str:
    what = f"Operation {failure.operation}" if failure.operation else "An operation"
    if failure.order == 1:
        lacks = "no derivative in PyTorch, which this operator needs."
    elif order == 1 and failure.where != "the loss":
        lacks = (
            "no second derivative and no forward-mode derivative in PyTorch, one of which "
            "this operator needs."
        )
    else:
        lacks = "no second derivative in PyTorch, which this operator needs."
    return f"{what} in {failure.where} has {lacks}"


def _advice(failure: _Failure, order: int) -> str:
    if failure.is_custom:
        fix = (
            "Write the backward of this autograd.Function with torch operations on tensors "
            "saved by ctx.save_for_backward, without once_differentiable"
        )
        fix += " (or give it a jvp)." if order == 1 else "."
    elif failure.where == "the loss":
        fix = "Write the loss out with differentiable operations, or use another one."
    else:
        fix = "Replace it by an equivalent made of differentiable operations."
    if failure.order == 1:
        return fix
    if failure.where == "the loss":
        return (
            f"{fix} The Hessian and the GGN both need it; JacobianLinearOperator and "
            "EFLinearOperator do without."
        )
    if order == 2:
        return (
            f"{fix} Or use the GGN, which takes the model's first derivative only: that "
            "works where the operation can be differentiated in forward mode."
        )
    return fix


def _failure(call: _Call) -> _Failure | None:
    """Differentiate one part of the graph twice; say what is missing."""
    outputs = [output.edge for output in call.outputs]
    nodes = list(nodes_between(outputs, call.inputs))
    wanted: list[Any] = [*call.inputs, *leaves_among(nodes)]
    if not wanted or not outputs:
        return None
    once = marked_once(nodes)
    if once:
        return _Failure(call.where, ", ".join(once), True, 2)
    cotangents = [output.ones().requires_grad_() for output in call.outputs]
    order = 1
    try:
        first = torch.autograd.grad(
            outputs, wanted, cotangents, create_graph=True, allow_unused=True
        )
        order = 2
        slopes = [g for g in first if g is not None and g.requires_grad]
        if slopes:
            ones = [torch.ones_like(g) for g in slopes]
            torch.autograd.grad(slopes, [*wanted, *cotangents], ones, allow_unused=True)
    except Exception as error:  # other errors are not what is looked for
        if not is_missing_derivative(error):
            return None
        operation = _operation_in(str(error))
        custom = [kind.__name__ for kind in functions_among(nodes)]
        if operation is None and custom:
            return _Failure(call.where, ", ".join(custom), True, order)
        return _Failure(call.where, operation, False, order)
    return None


def _operation_in(message: str) -> str | None:
    found = _OPERATION.search(message)
    return next((group for group in found.groups() if group), None) if found else None


def _stem(operation: str | None) -> str:
    """Return what the names of an operation and of its backward share."""
    return re.sub(r"_(backward|forward)$", "", operation or "").strip("_")

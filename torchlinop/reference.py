"""Dense curvature matrices by :mod:`torch.func`, for checks on small problems.

Independent of the operators: the predictions for all data are handed at once to torch's
own transforms and losses, nothing is linearized by hand or summed over batches. Rows and
columns are the parameters in the order of ``params``; the arguments are those of the
operators. Half-precision parameters, data and weights are converted to float32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, hessian, jacrev, jvp
from torch.utils import _pytree as pytree

from torchlinop._space import named_parameters
from torchlinop._typing import Data, Loss, Model, Parameters


def dense_hessian(
    model: Model, loss_function: Loss, params: Parameters, data: Data
) -> Tensor:
    """Hessian of the loss on all data, shape ``(P, P)``."""
    problem = _flat_problem(model, loss_function, params, data)
    matrix: Tensor = hessian(problem.risk)(problem.theta)
    return matrix.detach()


def dense_ggn(model: Model, loss_function: Loss, params: Parameters, data: Data) -> Tensor:
    """Hessian of the loss with the model replaced by its linearization, ``(P, P)``."""
    problem = _flat_problem(model, loss_function, params, data)
    theta = problem.theta

    def linearized(t: Tensor) -> Tensor:
        value, change = jvp(problem.predict, (theta,), (t - theta,))[:2]
        return problem.loss(value + change)

    matrix: Tensor = hessian(linearized)(theta)
    return matrix.detach()


def dense_gradient(
    model: Model, loss_function: Loss, params: Parameters, data: Data
) -> Tensor:
    """Gradient of the loss on all data, shape ``(P,)``."""
    problem = _flat_problem(model, loss_function, params, data)
    return grad(problem.risk)(problem.theta).detach()


def dense_gradient_and_loss(
    model: Model, loss_function: Loss, params: Parameters, data: Data
) -> tuple[list[Tensor], Tensor]:
    """Gradient, one tensor for each parameter, and value of the loss on all data."""
    problem = _flat_problem(model, loss_function, params, data)
    gradient, loss = grad_and_value(problem.risk)(problem.theta)
    return problem.split(gradient.detach()), loss.detach()


def dense_empirical_fisher(
    model: Model,
    losses: Callable[[Tensor, Tensor], Tensor],
    params: Parameters,
    data: Data,
    *,
    normalizer: float,
) -> Tensor:
    """Sum of outer products of the data's gradients over ``normalizer``, ``(P, P)``.

    Parameters
    ----------
    model, params, data
        As for an operator.
    losses
        Function of ``(prediction, target)`` that returns a tensor with one loss for each
        datum, for instance ``CrossEntropyLoss(reduction="none")``.
    normalizer
        What the sum is divided by.
    """
    problem = _flat_problem(model, losses, params, data)
    gradients = jacrev(lambda t: problem.risk(t).reshape(-1))(problem.theta).detach()
    return gradients.T @ gradients / normalizer


def dense_jacobian(model: Model, params: Parameters, data: Data) -> Tensor:
    """Jacobian of all predictions, one row for each entry, shape ``(M, P)``."""
    problem = _flat_problem(model, lambda f, _: f, params, data)
    return jacrev(problem.entries)(problem.theta).detach()


class _FlatProblem(NamedTuple):
    """A model and its loss on all data, as functions of one flat vector."""

    model: Callable[[list[Tensor], Any], Tensor]
    loss_function: Callable[[Tensor, Any], Tensor]
    theta: Tensor
    shapes: list[torch.Size]
    inputs: list[Any]
    targets: list[Any]

    def split(self, t: Tensor) -> list[Tensor]:
        parts = t.split([shape.numel() for shape in self.shapes])
        return [part.view(s) for part, s in zip(parts, self.shapes, strict=True)]

    def predictions(self, t: Tensor) -> list[Tensor]:
        return [self.model(self.split(t), X) for X in self.inputs]

    def predict(self, t: Tensor) -> Tensor:
        return _joined(self.predictions(t), like=self.targets)

    def entries(self, t: Tensor) -> Tensor:
        return torch.cat([f.reshape(-1) for f in self.predictions(t)])

    def loss(self, prediction: Tensor) -> Tensor:
        return self.loss_function(prediction, _joined(self.targets, like=self.targets))

    def risk(self, t: Tensor) -> Tensor:
        return self.loss(self.predict(t))


def _flat_problem(
    model: Model,
    loss_function: Callable[[Tensor, Any], Tensor],
    params: Parameters,
    data: Data,
) -> _FlatProblem:
    as_mapping = isinstance(params, Mapping)
    named = named_parameters(model, params)
    chosen = {id(p) for p in named.values()}
    theta = _promoted(torch.cat([p.detach().reshape(-1) for p in named.values()]))

    def convert(tensor: Tensor) -> Tensor:
        return _promoted(tensor.detach().to(theta.device))

    def evaluate(parts: list[Tensor], X: Any) -> Tensor:
        given = dict(zip(named, parts, strict=True))
        if not isinstance(model, nn.Module):
            return model(given if as_mapping else parts, X)
        others = {n: convert(p) for n, p in model.named_parameters() if id(p) not in chosen}
        buffers = {n: convert(b).clone() for n, b in model.named_buffers()}
        # the other names of a tied parameter are given the same tensor by torch
        return functional_call(model, {**buffers, **others, **given}, (X,))

    half = theta.dtype != next(iter(named.values())).dtype
    if half and isinstance(loss_function, nn.Module):
        loss_function = copy.deepcopy(loss_function).to(theta.dtype)
    batches = [(_converted(X, convert), _converted(y, convert)) for X, y in data]
    return _FlatProblem(
        evaluate,
        loss_function,
        theta,
        [p.shape for p in named.values()],
        [X for X, _ in batches],
        [y for _, y in batches],
    )


def _promoted(tensor: Tensor) -> Tensor:
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.float() if half else tensor


def _converted(value: Any, convert: Callable[[Tensor], Tensor]) -> Any:
    """Return ``value`` with its tensors converted, dicts of other libraries included."""

    def leaf(value: Any) -> Any:
        if isinstance(value, Tensor):
            return convert(value)
        if isinstance(value, MutableMapping):
            value = copy.copy(value)
            for key in list(value):
                value[key] = _converted(value[key], convert)
        return value

    return pytree.tree_map(leaf, value)


def _joined(parts: Sequence[Any], *, like: Sequence[Any]) -> Any:
    """Join what belongs to the batches, whose targets are ``like``."""
    if len(parts) == 1 or all(part is None for part in parts):
        return parts[0]
    if not all(isinstance(part, Tensor) for part in parts):
        raise TypeError(
            "Targets of several batches have to be tensors, to be joined into one; got "
            f"{type(parts[0]).__name__}. Pass the data as one batch."
        )
    # a target without dimensions is that of one sample without a batch dimension
    single = all(isinstance(y, Tensor) and y.ndim == 0 for y in like)
    return torch.stack(list(parts)) if single else torch.cat(list(parts))

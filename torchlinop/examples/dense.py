"""Dense curvature matrices by :mod:`torch.func`, for checks on small problems.

Independent of the operators: all data is concatenated into one batch and handed to
torch's own transforms and losses, nothing is linearized by hand or summed over batches.
Rows and columns are the parameters in the order of ``params``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, hessian, jacrev, jvp

from torchlinop._space import named_parameters
from torchlinop._typing import Data, Loss, Model, Parameters

_Flat = Callable[[Tensor], Tensor]


def dense_hessian(
    model: Model, loss_function: Loss, params: Parameters, data: Data
) -> Tensor:
    """Hessian of the loss on all data, shape ``(P, P)``."""
    predict, theta, _, y = _flat_model(model, params, data)
    matrix: Tensor = hessian(lambda t: loss_function(predict(t), y))(theta)
    return matrix


def dense_ggn(model: Model, loss_function: Loss, params: Parameters, data: Data) -> Tensor:
    """Hessian of the loss with the model replaced by its linearization, ``(P, P)``."""
    predict, theta, _, y = _flat_model(model, params, data)

    def linearized(t: Tensor) -> Tensor:
        value, change = jvp(predict, (theta,), (t - theta,))[:2]
        return loss_function(value + change, y)

    matrix: Tensor = hessian(linearized)(theta)
    return matrix


def dense_gradient(
    model: Model, loss_function: Loss, params: Parameters, data: Data
) -> Tensor:
    """Gradient of the loss on all data, shape ``(P,)``."""
    predict, theta, _, y = _flat_model(model, params, data)
    return grad(lambda t: loss_function(predict(t), y))(theta)


def dense_gradient_and_loss(
    model: Model, loss_function: Loss, params: Parameters, data: Data
) -> tuple[list[Tensor], Tensor]:
    """Gradient, one tensor for each parameter, and value of the loss on all data."""
    params = dict(params) if isinstance(params, Mapping) else list(params)
    predict, theta, _, y = _flat_model(model, params, data)
    gradient, loss = grad_and_value(lambda t: loss_function(predict(t), y))(theta)
    listed = list(params.values() if isinstance(params, Mapping) else params)
    parts = torch.split(gradient, [p.numel() for p in listed])
    return [g.view(p.shape) for g, p in zip(parts, listed, strict=True)], loss


def dense_empirical_fisher(
    model: Model,
    loss_function: Callable[[Tensor, Tensor], Tensor],
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
    loss_function
        Loss of one datum, of the arguments ``(prediction row, target row)``.
    normalizer
        What the sum is divided by.
    """
    predict, theta, _, y = _flat_model(model, params, data)

    def rowwise(t: Tensor) -> Tensor:
        return torch.stack(
            [loss_function(f, target) for f, target in zip(predict(t), y, strict=True)]
        )

    gradients = jacrev(rowwise)(theta)
    return gradients.T @ gradients / normalizer


def dense_jacobian(model: Model, params: Parameters, data: Data) -> Tensor:
    """Jacobian of all predictions, one row for each entry, shape ``(M, P)``."""
    predict, theta, _, _ = _flat_model(model, params, data)
    return jacrev(predict)(theta).reshape(-1, theta.numel())


def _flat_model(
    model: Model, params: Parameters, data: Data
) -> tuple[_Flat, Tensor, Any, Any]:
    """Return the model as a function of one flat vector, on all data at once."""
    as_mapping = isinstance(params, Mapping)
    named = named_parameters(model, params)
    theta = torch.cat([p.detach().reshape(-1) for p in named.values()])
    X, y = _concatenated(data, theta.device)
    sizes = [p.numel() for p in named.values()]

    def predict(t: Tensor) -> Tensor:
        parts = [
            part.view(p.shape)
            for part, p in zip(torch.split(t, sizes), named.values(), strict=True)
        ]
        if isinstance(model, nn.Module):
            return functional_call(model, dict(zip(named, parts, strict=True)), (X,))
        given: Any = dict(zip(named, parts, strict=True)) if as_mapping else parts
        return model(given, X)

    return predict, theta, X, y


def _concatenated(data: Data, device: torch.device) -> tuple[Any, Any]:
    batches = list(data)
    inputs = [X for X, _ in batches]
    targets = [y for _, y in batches]
    X: Any
    if isinstance(inputs[0], Mapping):
        X = {k: torch.cat([x[k] for x in inputs]).to(device) for k in inputs[0]}
    else:
        X = torch.cat(inputs).to(device)
    y = None if targets[0] is None else torch.cat(targets).to(device)
    return X, y

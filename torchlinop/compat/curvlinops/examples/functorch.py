"""Dense references under curvlinops' names.

``input_key`` is not used: a model gets each input as it is.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from torchlinop import reference
from torchlinop._typing import Data, Loss, Model, Parameters
from torchlinop.compat.curvlinops.arguments import located

__all__ = [
    "functorch_empirical_fisher",
    "functorch_ggn",
    "functorch_gradient_and_loss",
    "functorch_hessian",
    "functorch_jacobian",
]


def functorch_hessian(
    model_func: Model,
    loss_func: Loss,
    params: Parameters,
    data: Data,
    input_key: str | None = None,
) -> Tensor:
    """Return :func:`torchlinop.reference.dense_hessian`."""
    model = located(model_func, params)
    return reference.dense_hessian(model, loss_func, params, data)


def functorch_ggn(
    model_func: Model,
    loss_func: Loss,
    params: Parameters,
    data: Data,
    input_key: str | None = None,
) -> Tensor:
    """Return :func:`torchlinop.reference.dense_ggn`."""
    model = located(model_func, params)
    return reference.dense_ggn(model, loss_func, params, data)


def functorch_gradient_and_loss(
    model_func: Model,
    loss_func: Loss,
    params: Parameters,
    data: Data,
    input_key: str | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Return :func:`torchlinop.reference.dense_gradient_and_loss`."""
    model = located(model_func, params)
    return reference.dense_gradient_and_loss(model, loss_func, params, data)


def functorch_jacobian(
    model_func: Model, params: Parameters, data: Data, input_key: str | None = None
) -> Tensor:
    """Return :func:`torchlinop.reference.dense_jacobian`."""
    return reference.dense_jacobian(located(model_func, params), params, data)


def functorch_empirical_fisher(
    model_func: Model,
    loss_func: nn.Module,
    params: Parameters,
    data: Data,
    input_key: str | None = None,
) -> Tensor:
    """Empirical Fisher of one of the three losses that have it there.

    A datum is one vector along the class dimension (``CrossEntropyLoss``) or the last
    dimension (``MSELoss``, ``BCEWithLogitsLoss``), its weight in the loss included.

    Raises
    ------
    TypeError
        Another loss.
    """
    if type(loss_func) not in (nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss):
        raise TypeError(
            "The empirical Fisher is known of CrossEntropyLoss, MSELoss and "
            f"BCEWithLogitsLoss, got {type(loss_func).__name__}. Use "
            "torchlinop.reference.dense_empirical_fisher with a function that returns "
            "the loss of each datum."
        )
    each: Any = copy.copy(loss_func)
    each.reduction = "none"

    def losses(prediction: Tensor, target: Tensor) -> Tensor:
        values: Tensor = each(prediction, target)
        by_row = isinstance(each, nn.CrossEntropyLoss) or values.ndim < 2
        return values if by_row else values.sum(-1)

    mean = loss_func.reduction == "mean"
    normalizer = sum(_count(each, y) for _, y in data) if mean else 1.0
    model = located(model_func, params)
    return reference.dense_empirical_fisher(
        model, losses, params, data, normalizer=normalizer
    )


def _count(loss: Any, target: Tensor) -> float:
    """What the loss's mean over ``target`` divides by."""
    if not isinstance(loss, nn.CrossEntropyLoss):
        return target.numel()
    if target.is_floating_point():
        return target.numel() / target.shape[min(1, target.ndim - 1)]
    kept = target[target != loss.ignore_index]
    if loss.weight is None:
        return kept.numel()
    return float(loss.weight.to(kept.device)[kept].sum(dtype=torch.float64))

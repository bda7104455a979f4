"""Dense references under curvlinops' names."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from torchlinop._typing import Data, Model, Parameters
from torchlinop.reference import dense_empirical_fisher
from torchlinop.reference import dense_ggn as functorch_ggn
from torchlinop.reference import dense_gradient_and_loss as functorch_gradient_and_loss
from torchlinop.reference import dense_hessian as functorch_hessian
from torchlinop.reference import dense_jacobian as functorch_jacobian

__all__ = [
    "functorch_empirical_fisher",
    "functorch_ggn",
    "functorch_gradient_and_loss",
    "functorch_hessian",
    "functorch_jacobian",
]


def functorch_empirical_fisher(
    model_func: Model, loss_func: nn.Module, params: Parameters, data: Data
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
    return dense_empirical_fisher(model_func, losses, params, data, normalizer=normalizer)


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

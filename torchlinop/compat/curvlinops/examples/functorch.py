"""Dense references under curvlinops' names."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from torchlinop._typing import Data, Model, Parameters
from torchlinop.examples import dense_empirical_fisher
from torchlinop.examples import dense_ggn as functorch_ggn
from torchlinop.examples import dense_gradient_and_loss as functorch_gradient_and_loss
from torchlinop.examples import dense_hessian as functorch_hessian
from torchlinop.examples import dense_jacobian as functorch_jacobian

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
    """Empirical Fisher of a standard loss on predictions of shape ``(N, C)``."""
    summed: Any = copy.copy(loss_func)
    mean = summed.reduction == "mean"
    summed.reduction = "sum"
    by_sample = isinstance(loss_func, nn.CrossEntropyLoss)
    count = sum(len(y) if by_sample else y.numel() for _, y in data)
    normalizer = float(count) if mean else 1.0
    return dense_empirical_fisher(model_func, summed, params, data, normalizer=normalizer)

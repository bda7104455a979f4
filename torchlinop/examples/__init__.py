"""Helpers for examples and checks: gradients on all data, dense reference matrices."""

from torchlinop.examples.dense import (
    dense_empirical_fisher,
    dense_ggn,
    dense_gradient,
    dense_gradient_and_loss,
    dense_hessian,
    dense_jacobian,
)
from torchlinop.examples.gradient import gradient_and_loss

__all__ = [
    "dense_empirical_fisher",
    "dense_ggn",
    "dense_gradient",
    "dense_gradient_and_loss",
    "dense_hessian",
    "dense_jacobian",
    "gradient_and_loss",
]

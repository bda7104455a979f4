"""Gradients of single samples, and how they are spread."""

from torchlinop.gradients.moments import (
    GradientCovarianceLinearOperator,
    GradientSecondMomentLinearOperator,
)
from torchlinop.gradients.per_sample import per_sample_gradients

__all__ = [
    "GradientCovarianceLinearOperator",
    "GradientSecondMomentLinearOperator",
    "per_sample_gradients",
]

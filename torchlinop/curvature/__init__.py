"""Curvature matrices of models and functions."""

from torchlinop.curvature.fisher import EFLinearOperator, FisherMCLinearOperator
from torchlinop.curvature.ggn import GGNLinearOperator
from torchlinop.curvature.hessian import HessianLinearOperator
from torchlinop.curvature.jacobian import JacobianLinearOperator

__all__ = [
    "EFLinearOperator",
    "FisherMCLinearOperator",
    "GGNLinearOperator",
    "HessianLinearOperator",
    "JacobianLinearOperator",
]

"""Curvature matrices of models and functions."""

from torchlinop.curvature.fisher import EFLinearOperator, FisherMCLinearOperator
from torchlinop.curvature.ggn import GGNLinearOperator
from torchlinop.curvature.hessian import HessianLinearOperator
from torchlinop.curvature.jacobian import JacobianLinearOperator
from torchlinop.curvature.ntk import NTKLinearOperator

__all__ = [
    "EFLinearOperator",
    "FisherMCLinearOperator",
    "GGNLinearOperator",
    "HessianLinearOperator",
    "JacobianLinearOperator",
    "NTKLinearOperator",
]

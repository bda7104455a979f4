"""Curvature matrices of PyTorch models as SciPy linear operators."""

from torchlinop._operator import TorchLinearOperator, aslinearoperator
from torchlinop._space import ParameterSpace
from torchlinop.autodiff import UnsupportedDerivativeError
from torchlinop.curvature import (
    EFLinearOperator,
    FisherMCLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
)
from torchlinop.risk import EmpiricalRisk
from torchlinop.structured import DiagonalLinearOperator, IdentityLinearOperator

__all__ = [
    "DiagonalLinearOperator",
    "EFLinearOperator",
    "EmpiricalRisk",
    "FisherMCLinearOperator",
    "GGNLinearOperator",
    "HessianLinearOperator",
    "IdentityLinearOperator",
    "JacobianLinearOperator",
    "ParameterSpace",
    "TorchLinearOperator",
    "UnsupportedDerivativeError",
    "aslinearoperator",
]

__version__ = "0.1.0"

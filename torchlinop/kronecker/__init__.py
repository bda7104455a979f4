"""Kronecker-factored approximations of curvature matrices."""

from torchlinop._files import StoredFileError
from torchlinop.kronecker.ekfac import EKFACLinearOperator
from torchlinop.kronecker.ggn_diagonal import GGNDiagonalLinearOperator
from torchlinop.kronecker.kfac import KFACLinearOperator
from torchlinop.kronecker.kfoc import KFOCLinearOperator
from torchlinop.kronecker.moments import WeightSharing
from torchlinop.kronecker.seeds import FisherType

__all__ = [
    "EKFACLinearOperator",
    "FisherType",
    "GGNDiagonalLinearOperator",
    "KFACLinearOperator",
    "KFOCLinearOperator",
    "StoredFileError",
    "WeightSharing",
]

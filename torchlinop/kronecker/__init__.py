"""Kronecker-factored approximations of curvature matrices."""

from torchlinop.kronecker.ekfac import EKFACLinearOperator
from torchlinop.kronecker.ggn_diagonal import GGNDiagonalLinearOperator
from torchlinop.kronecker.kfac import KFACLinearOperator

__all__ = ["EKFACLinearOperator", "GGNDiagonalLinearOperator", "KFACLinearOperator"]

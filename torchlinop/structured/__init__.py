"""Operators whose matrix has a structure that is known in advance."""

from torchlinop.structured.diagonal import DiagonalLinearOperator
from torchlinop.structured.identity import IdentityLinearOperator
from torchlinop.structured.submatrix import SubmatrixLinearOperator

__all__ = ["DiagonalLinearOperator", "IdentityLinearOperator", "SubmatrixLinearOperator"]

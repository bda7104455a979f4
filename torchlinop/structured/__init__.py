"""Operators whose matrix has a structure that is known in advance."""

from torchlinop.structured.base import StructuredLinearOperator
from torchlinop.structured.block_diagonal import BlockDiagonalLinearOperator, Layout
from torchlinop.structured.diagonal import DiagonalLinearOperator
from torchlinop.structured.eigh import EighLinearOperator
from torchlinop.structured.factored import FactoredMatrix
from torchlinop.structured.identity import IdentityLinearOperator
from torchlinop.structured.kronecker import KroneckerLinearOperator
from torchlinop.structured.low_rank import LowRankPlusDiagonalLinearOperator
from torchlinop.structured.named import block
from torchlinop.structured.spectrum import Spectrum, spectrum_of
from torchlinop.structured.submatrix import SubmatrixLinearOperator

__all__ = [
    "BlockDiagonalLinearOperator",
    "DiagonalLinearOperator",
    "EighLinearOperator",
    "FactoredMatrix",
    "IdentityLinearOperator",
    "KroneckerLinearOperator",
    "Layout",
    "LowRankPlusDiagonalLinearOperator",
    "Spectrum",
    "StructuredLinearOperator",
    "SubmatrixLinearOperator",
    "block",
    "spectrum_of",
]

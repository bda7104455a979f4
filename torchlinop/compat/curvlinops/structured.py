"""Structured matrices under curvlinops' names."""

from torchlinop.structured import (
    BlockDiagonalLinearOperator,
)
from torchlinop.structured import (
    EighLinearOperator as EighDecomposedLinearOperator,
)
from torchlinop.structured import (
    KroneckerLinearOperator as KroneckerProductLinearOperator,
)

__all__ = [
    "BlockDiagonalLinearOperator",
    "EighDecomposedLinearOperator",
    "KroneckerProductLinearOperator",
]

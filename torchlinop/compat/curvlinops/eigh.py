"""Eigendecomposed matrices under curvlinops' name."""

from torchlinop.structured import EighLinearOperator as EighDecomposedLinearOperator

__all__ = ["EighDecomposedLinearOperator"]

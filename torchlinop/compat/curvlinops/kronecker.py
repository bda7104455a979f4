"""Kronecker products under curvlinops' name."""

from torchlinop.structured import KroneckerLinearOperator as KroneckerProductLinearOperator

__all__ = ["KroneckerProductLinearOperator"]

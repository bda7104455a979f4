"""The choices of KFAC, where curvlinops' main branch has them."""

from torchlinop.compat.curvlinops.kfac import FisherType, KFACType

__all__ = ["FisherType", "KFACType"]

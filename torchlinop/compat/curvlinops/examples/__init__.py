"""curvlinops' helpers for examples."""

from torchlinop import gradient_and_loss
from torchlinop.structured import IdentityLinearOperator

__all__ = ["IdentityLinearOperator", "gradient_and_loss"]

"""Pure functions on tensors: derivatives, linearized once and applied many times."""

from torchlinop.autodiff.diagnose import UnsupportedDerivativeError
from torchlinop.autodiff.differences import WrongDerivativeError

__all__ = ["UnsupportedDerivativeError", "WrongDerivativeError"]

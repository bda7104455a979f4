"""Pure functions on tensors: derivatives, linearized once and applied many times."""

from torchlinop.autodiff.diagnose import UnsupportedDerivativeError

__all__ = ["UnsupportedDerivativeError"]

"""Rules."""

from torchlinop.autodiff.rules.modes import Corrections, SecondOrderRules

__all__ = ["Corrections", "SecondOrderRules"]

"""Gaussian posteriors of a model's parameters, and what they predict."""

from torchlinop.posterior.laplace import laplace
from torchlinop.posterior.posterior import LaplacePosterior
from torchlinop.posterior.predictive import Likelihood, Predictive

__all__ = ["LaplacePosterior", "Likelihood", "Predictive", "laplace"]

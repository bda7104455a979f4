"""Spectra, traces and functions of operators, with error bars.

Everything here needs products only, and stays on the operator's device.
"""

from torchlinop.estimate.densities import SpectralDensity, spectral_density
from torchlinop.estimate.eigenpairs import Eigenpairs, eigsh
from torchlinop.estimate.estimates import Estimate

__all__ = [
    "Eigenpairs",
    "Estimate",
    "SpectralDensity",
    "eigsh",
    "spectral_density",
]

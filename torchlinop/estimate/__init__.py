"""Spectra, traces and functions of operators, with error bars.

Everything here needs products only, and stays on the operator's device.
"""

from torchlinop.estimate.densities import SpectralDensity, spectral_density
from torchlinop.estimate.diagonals import diagonal
from torchlinop.estimate.eigenpairs import eigsh
from torchlinop.estimate.estimates import Estimate
from torchlinop.estimate.functions import effective_dimension, function_trace, logdet
from torchlinop.estimate.layers import layer_densities
from torchlinop.estimate.norms import frobenius_norm
from torchlinop.estimate.sampling import Interrupted
from torchlinop.estimate.search import Eigenpairs
from torchlinop.estimate.traces import trace
from torchlinop.estimate.tracking import Tracked, Tracker

__all__ = [
    "Eigenpairs",
    "Estimate",
    "Interrupted",
    "SpectralDensity",
    "Tracked",
    "Tracker",
    "diagonal",
    "effective_dimension",
    "eigsh",
    "frobenius_norm",
    "function_trace",
    "layer_densities",
    "logdet",
    "spectral_density",
    "trace",
]

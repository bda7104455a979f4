"""The whole spectrum of a small matrix."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from torchlinop._operator import TorchLinearOperator
from torchlinop.estimate.arguments import require_finite, require_symmetric
from torchlinop.estimate.densities import SpectralDensity
from torchlinop.estimate.search import Eigenpairs


class WholeSpectrum(NamedTuple):
    """Eigenpairs of both ends, and all eigenvalues as a density without noise."""

    top: Eigenpairs
    bottom: Eigenpairs
    density: SpectralDensity


def whole_spectrum(
    A: TorchLinearOperator, largest: int, lowest: int, seed: int
) -> WholeSpectrum:
    """Diagonalize the dense matrix, which takes ``N`` products."""
    n, eps = A.shape[0], torch.finfo(A.torch_dtype).eps
    dense = A.to_dense().cpu()
    require_finite(dense, "summary")
    dense = dense.to(torch.promote_types(dense.dtype, torch.float64))
    theta, S = torch.linalg.eigh((dense + dense.mH) / 2)
    norm = theta.abs().max().item()
    require_symmetric((dense - dense.mH).abs().max().item(), norm, eps)
    bound = eps * norm * (10 + math.sqrt(n))

    def pairs(some: slice) -> Eigenpairs:
        V = S[:, some].to(A.torch_dtype).to(A.device)
        values = theta[some].to(V.real.dtype).to(A.device)
        count = len(values)
        return Eigenpairs(values, V, np.full(count, bound), np.full(count, True), n)

    # twice the same, from which one reads that nothing is random
    nodes = np.tile(theta.numpy(), (2, 1))
    weights, residuals = np.full((2, n), 1 / n), np.full((2, n), bound)
    density = SpectralDensity(nodes, weights, residuals, n, n, seed, eps)
    return WholeSpectrum(pairs(slice(n - largest, n)), pairs(slice(lowest)), density)

"""Spectral densities with curvlinops' arguments."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchlinop import estimate
from torchlinop._operator import TorchLinearOperator, aslinearoperator
from torchlinop.compat.curvlinops.estimators import drawn_seed

#: what may be known of the ends of a spectrum
Boundaries = tuple[float | None, float | None] | None


class LanczosApproximateSpectrumCached:
    """Spectral density by Lanczos quadratures that are kept.

    Parameters
    ----------
    A
        Symmetric operator or matrix.
    ncv
        Number of Lanczos steps.
    boundaries
        Smallest and largest eigenvalue, as far as they are known; the others are those that
        the first quadrature has found.
    boundaries_tol
        Not used: there is no separate search for the ends.
    """

    def __init__(
        self,
        A: Any,
        ncv: int,
        boundaries: Boundaries = None,
        boundaries_tol: float = 1e-2,
    ) -> None:
        self._quadratures = _Quadratures(A, ncv)
        self._boundaries = self._quadratures.completed(boundaries, absolute=False)

    def approximate_spectrum(
        self,
        num_repeats: int = 1,
        num_points: int = 1024,
        kappa: float = 3.0,
        margin: float = 0.05,
    ) -> tuple[Tensor, Tensor]:
        """Grid of eigenvalues and density on it, shapes ``(num_points,)``."""
        window = _Window(*self._boundaries, margin)
        grid = window.grid(num_points)
        density = np.zeros(num_points)
        for nodes, weights in self._quadratures.first(num_repeats):
            density = density + window.smoothed(grid, nodes, weights, kappa)
        return self._quadratures.tensors(grid, density / num_repeats)


class LanczosApproximateLogSpectrumCached:
    """Spectral density of ``log(|A| + epsilon)`` by Lanczos quadratures that are kept.

    Parameters
    ----------
    A
        Symmetric operator or matrix.
    ncv
        Number of Lanczos steps.
    boundaries
        Smallest and largest size of an eigenvalue, as far as they are known; the others are
        those that the first quadrature has found.
    boundaries_tol
        Not used: there is no separate search for the ends.
    """

    def __init__(
        self,
        A: Any,
        ncv: int,
        boundaries: Boundaries = None,
        boundaries_tol: float = 1e-2,
    ) -> None:
        self._quadratures = _Quadratures(A, ncv)
        self._boundaries = self._quadratures.completed(boundaries, absolute=True)

    def approximate_log_spectrum(
        self,
        num_repeats: int = 1,
        num_points: int = 1024,
        kappa: float = 3.0,
        margin: float = 0.05,
        epsilon: float = 1e-5,
    ) -> tuple[Tensor, Tensor]:
        """Grid of sizes of eigenvalues and density on it, shapes ``(num_points,)``."""
        low, high = (math.log(bound + epsilon) for bound in self._boundaries)
        window = _Window(low, high, margin)
        grid = window.grid(num_points)
        density = np.zeros(num_points)
        for nodes, weights in self._quadratures.first(num_repeats):
            logs = np.log(np.abs(nodes) + epsilon)
            density = density + window.smoothed(grid, logs, weights, kappa)
        sizes = np.exp(grid)
        return self._quadratures.tensors(sizes, density / sizes / num_repeats)


def lanczos_approximate_spectrum(
    A: Any,
    ncv: int,
    num_points: int = 1024,
    num_repeats: int = 1,
    kappa: float = 3.0,
    boundaries: Boundaries = None,
    margin: float = 0.05,
    boundaries_tol: float = 1e-2,
) -> tuple[Tensor, Tensor]:
    """Grid of eigenvalues and spectral density on it, shapes ``(num_points,)``."""
    cached = LanczosApproximateSpectrumCached(A, ncv, boundaries, boundaries_tol)
    return cached.approximate_spectrum(num_repeats, num_points, kappa, margin)


def lanczos_approximate_log_spectrum(
    A: Any,
    ncv: int,
    num_points: int = 1024,
    num_repeats: int = 1,
    kappa: float = 1.04,
    boundaries: Boundaries = None,
    margin: float = 0.05,
    boundaries_tol: float = 1e-2,
    epsilon: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Grid of sizes of eigenvalues and the density of their logarithms."""
    cached = LanczosApproximateLogSpectrumCached(A, ncv, boundaries, boundaries_tol)
    return cached.approximate_log_spectrum(num_repeats, num_points, kappa, margin, epsilon)


class _Quadratures:
    """One Lanczos quadrature for each repeat, made when it is first asked for."""

    def __init__(self, A: Any, ncv: int) -> None:
        self._A: TorchLinearOperator = aslinearoperator(A)
        self._ncv, self._seed = ncv, drawn_seed()
        self._kept: list[tuple[np.ndarray, np.ndarray]] = []

    def first(self, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Nodes and weights of a number of repeats."""
        missing = count - len(self._kept)
        if missing > 0:
            p = estimate.spectral_density(
                self._A,
                num_probes=missing,
                num_steps=self._ncv,
                probes="gaussian",
                seed=self._seed + len(self._kept),
            )
            self._kept += zip(p.nodes, p.weights, strict=True)
        return self._kept[:count]

    def completed(self, boundaries: Boundaries, *, absolute: bool) -> tuple[float, float]:
        """Fill in what is not known of the ends."""
        low, high = boundaries or (None, None)
        if low is None or high is None:
            nodes = self.first(1)[0][0]
            nodes = np.abs(nodes) if absolute else nodes
            low = nodes.min() if low is None else low
            high = nodes.max() if high is None else high
        return float(low), float(high)

    def tensors(self, *arrays: Any) -> tuple[Tensor, Tensor]:
        """Return arrays as tensors of the operator's dtype, on its device."""
        x, y = (
            torch.as_tensor(a, dtype=self._A.torch_dtype, device=self._A.device)
            for a in arrays
        )
        return x, y


class _Window(NamedTuple):
    """An interval and a margin, relative to its length, on both sides."""

    low: float
    high: float
    margin: float

    def grid(self, num_points: int) -> np.ndarray:
        padding = self.margin * (self.high - self.low)
        return np.linspace(self.low - padding, self.high + padding, num_points)

    def smoothed(
        self, grid: np.ndarray, nodes: np.ndarray, weights: np.ndarray, kappa: float
    ) -> np.ndarray:
        """Sum of Gaussians, of a width that belongs to the window mapped to [-1, 1]."""
        half = (grid[-1] - grid[0]) / 2
        sigma = half * 2 / (len(nodes) - 1) / math.sqrt(8 * math.log(kappa))
        z = (grid[:, None] - nodes) / sigma
        bumps = np.exp(-0.5 * z**2) / (sigma * math.sqrt(2 * math.pi))
        return bumps @ weights

"""How eigenvalues are spread: spectral densities by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from torchlinop._checkpoint import Checkpoint, Run, begun
from torchlinop._operator import TorchLinearOperator
from torchlinop._typing import Array
from torchlinop.estimate.arguments import evaluated, positive_count, square_operator
from torchlinop.estimate.estimates import Estimate, mean_and_stderr
from torchlinop.estimate.probes import Probes, ProbeSource, block_size
from torchlinop.estimate.progress import progress_bar
from torchlinop.estimate.recurrence import Quadrature, Recurrence
from torchlinop.estimate.sampling import Interrupted

_SQRT_2_PI = math.sqrt(2 * math.pi)


@dataclass(frozen=True, eq=False)
class SpectralDensity:
    r"""A spectrum as nodes and weights, one quadrature for each random vector.

    The density of eigenvalues is :math:`p(\lambda) = \frac1N \sum_i \delta(\lambda -
    \lambda_i)`; of each random vector the nodes :math:`\theta_j` and weights :math:`w_j`
    integrate it against smooth functions. For pictures the peaks are smoothed to Gaussians.

    Attributes
    ----------
    nodes, weights : numpy.ndarray
        Shape ``(num_probes, num_steps)``, float64. In each row nodes ascend and weights sum
        to 1; where Lanczos ended early the last node is repeated with weight 0.
    residuals : numpy.ndarray
        Shape ``(num_probes, num_steps)``: an eigenvalue is within this of each node.
    dim : int
        ``N``, the number of eigenvalues.
    num_matvecs : int
        Vectors that were multiplied.
    seed : int
        Of the random vectors.
    eps : float
        Rounding unit of the products.
    """

    nodes: np.ndarray
    weights: np.ndarray
    residuals: np.ndarray
    dim: int
    num_matvecs: int
    seed: int
    eps: float

    # ----------------------------------------------------------------- where to look

    @property
    def bounds(self) -> tuple[float, float]:
        """An interval that holds the spectrum as far as the run has seen it.

        The outermost nodes, widened by their residuals. An eigenvalue outside of it would
        have to be all but invisible to every random vector.
        """
        low = (self.nodes[:, 0] - self.residuals[:, 0]).min()
        high = (self.nodes[:, -1] + self.residuals[:, -1]).max()
        return float(low), float(high)

    @property
    def floor(self) -> float:
        """Sizes of eigenvalues below this are rounding errors of the largest."""
        return self.eps * (float(np.abs(self.nodes).max()) or 1.0)

    def grid(self, num_points: int = 1024, *, margin: float = 0.05) -> np.ndarray:
        """Evenly spaced points over ``bounds`` and a margin on both sides."""
        low, high = self.bounds
        room = margin * self._width
        return np.linspace(low - room, high + room, num_points)

    def log_grid(self, num_points: int = 1024) -> np.ndarray:
        """Sizes of eigenvalues, evenly spaced by their logarithm, up from ``floor``."""
        high = 2 * max(abs(bound) for bound in self.bounds) or 1.0
        return np.geomspace(self.floor / 2, high, num_points)

    # -------------------------------------------------------------------- the curves

    @property
    def sigma(self) -> float:
        """Width of the Gaussians that :meth:`density` uses by default."""
        low, high = self.bounds
        if self._width > high - low:  # a single point
            return 0.01 * self._width
        return 0.75 * self._width / max(self.nodes.shape[1] - 1, 1)

    @property
    def _width(self) -> float:
        """Of what the spectrum covers; if that is a point but for rounding, its size."""
        low, high = self.bounds
        size = max(abs(low), abs(high)) or 1.0
        return high - low if high - low > 100 * self.eps * size else size

    def density(self, x: Array, *, sigma: float | None = None) -> np.ndarray:
        """Density of the eigenvalues at ``x``; its integral is 1.

        Parameters
        ----------
        x
            Where, any shape.
        sigma
            Standard deviation of the Gaussians; by default three quarters of the mean
            distance of the nodes.
        """
        return self._density(x, sigma).mean(axis=0)

    def band(
        self, x: Array, *, sigma: float | None = None, width: float = 2.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper edge of the density: ``width`` standard errors of the probes."""
        return _band(self._density(x, sigma), width)

    def log_density(self, x: Array, *, sign: int = 1, sigma: float = 0.1) -> np.ndarray:
        """Share of the eigenvalues per decade of their size, at sizes ``x``.

        For spectra over many decades. Eigenvalues below ``floor`` count as ``floor``,
        zeros as positive.

        Parameters
        ----------
        x
            Sizes, positive, any shape.
        sign
            1 for positive eigenvalues, -1 for negative ones; their integrals over
            ``log10(x)`` are the shares of both.
        sigma
            Standard deviation of the Gaussians in decades.
        """
        return self._log_density(x, sign, sigma).mean(axis=0)

    def log_band(
        self, x: Array, *, sign: int = 1, sigma: float = 0.1, width: float = 2.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper edge of the log density: ``width`` standard errors."""
        return _band(self._log_density(x, sign, sigma), width)

    def _density(self, x: Array, sigma: float | None) -> np.ndarray:
        width = self.sigma if sigma is None else float(sigma)
        if not width > 0:
            raise ValueError(f"sigma has to be positive, got {sigma!r}.")
        return _smoothed(np.asarray(x, dtype=float), self.nodes, self.weights, width)

    def _log_density(self, x: Array, sign: int, sigma: float) -> np.ndarray:
        x = np.asarray(x, dtype=float)
        if sign not in (1, -1):
            raise ValueError(f"sign has to be 1 or -1, got {sign!r}.")
        if not (x > 0).all() or not sigma > 0:
            raise ValueError(
                "log_density is a density of sizes: x and sigma have to be positive. For "
                "negative eigenvalues pass their sizes and sign=-1."
            )
        negative = self.nodes < -self.floor
        weights = np.where(negative == (sign < 0), self.weights, 0)
        sizes = np.log10(np.maximum(np.abs(self.nodes), self.floor))
        return _smoothed(np.log10(x), sizes, weights, sigma)

    # ------------------------------------------------------------------- its integrals

    def trace_of(self, f: Callable[[np.ndarray], np.ndarray]) -> Estimate:
        """Sum of ``f`` over all eigenvalues, with its standard error over the probes.

        ``f`` maps a float64 array to one of its shape; it should be smooth.
        """
        samples = self.dim * (self.weights * evaluated(f, self.nodes)).sum(axis=1)
        value, error = mean_and_stderr(samples)
        return Estimate(value, error, self.num_matvecs, "lanczos quadrature", self.seed)

    def count_above(self, threshold: float) -> Estimate:
        """Count eigenvalues above a threshold, with the standard error over the probes."""
        return self.trace_of(lambda theta: (theta > threshold).astype(float))

    def __str__(self) -> str:
        low, high = self.bounds
        probes, steps = self.nodes.shape
        return (
            f"spectral density of {self.dim} eigenvalues in [{low:.4g}, {high:.4g}] "
            f"({probes} probes, {steps} steps, {self.num_matvecs} products)"
        )


def spectral_density(
    A: Any,
    *,
    num_probes: int = 10,
    num_steps: int = 100,
    probes: Probes = "rademacher",
    seed: int = 0,
    progress: bool = False,
    checkpoint: Checkpoint | str | os.PathLike[str] | None = None,
) -> SpectralDensity:
    r"""Density of the eigenvalues of a symmetric matrix.

    Lanczos' recurrence from each random vector gives nodes and weights of a Gauss
    quadrature; all vectors advance together, as one block.

    Parameters
    ----------
    A
        Symmetric or Hermitian operator or matrix, shape ``(N, N)``.
    num_probes
        Number of random vectors: the noise of the density falls with its root.
    num_steps
        Products with each; details narrower than about a ``num_steps``-th of the spectrum
        are not resolved, except at its ends. At most ``N``.
    probes
        Distribution of the random vectors: ``"rademacher"``, ``"gaussian"`` or
        ``"sphere"``; only their directions matter.
    seed
        Of the random vectors, the same on every device.
    progress
        Whether to show a progress bar.
    checkpoint
        A file, or a :class:`~torchlinop.Checkpoint`, from which a run that was killed goes
        on. One product more.

    Returns
    -------
    SpectralDensity

    Raises
    ------
    ValueError
        ``A`` is not square or not symmetric, or a count is below 1.
    StoredFileError
        The checkpoint is of another matrix or call, or truncated.
    numpy.linalg.LinAlgError
        A product is not finite.
    Interrupted
        On Ctrl-C, with the density so far.

    References
    ----------
    Lin, Saad and Yang, "Approximating spectral densities of large matrices", SIAM Review 58
    (2016), https://doi.org/10.1137/130934283; Ubaru, Chen and Saad, "Fast estimation of
    tr(f(A)) via stochastic Lanczos quadrature", SIAM J. Matrix Anal. Appl. 38 (2017),
    https://doi.org/10.1137/16M1104974

    Examples
    --------
    >>> import torch
    >>> from torchlinop import estimate
    >>> A = torch.diag(torch.linspace(0, 1, 200, dtype=torch.float64))
    >>> p = estimate.spectral_density(A, num_steps=30)
    >>> p.num_matvecs
    300
    >>> p.density([0.25, 0.75]).round(1)
    array([1., 1.])
    """
    A = square_operator(A, "spectral_density")
    arguments = {
        "num_probes": num_probes,
        "num_steps": num_steps,
        "probes": probes,
        "seed": seed,
    }
    run = begun(Checkpoint.of(checkpoint), "spectral_density", {"A": A}, arguments, {})
    return density_of(A, num_probes, num_steps, probes, seed, progress, run=run)


def density_of(
    A: TorchLinearOperator,
    num_probes: int,
    num_steps: int,
    probes: Probes,
    seed: int,
    progress: bool,
    norm: float = 0.0,
    run: Run | None = None,
) -> SpectralDensity:
    """Spectral density; rounding errors are relative to ``norm``, if that is known.

    A ``run`` with a state goes on from that.
    """
    num_probes = positive_count("num_probes", num_probes)
    num_steps = min(positive_count("num_steps", num_steps), A.shape[0])
    source = ProbeSource(A, probes, seed)
    parts: list[Quadrature] = []
    run = Run() if run is None else run
    recurrence: Recurrence | None = None
    if run.state is not None:
        if "density" in run.state:
            return SpectralDensity(**run.state["density"])
        parts = [Quadrature(*part) for part in run.state["parts"]]
        recurrence = Recurrence.resumed(A, run.state["recurrence"], norm=norm)
        source.go_on(run.state["random"])

    def result() -> SpectralDensity:
        nodes, weights, residuals = (np.concatenate(x) for x in zip(*parts, strict=True))
        eps = torch.finfo(A.torch_dtype).eps
        return SpectralDensity(nodes, weights, residuals, A.shape[0], nodes.size, seed, eps)

    def each(count: int) -> None:
        bar.update(count)
        if run.due() and recurrence is not None:
            known = {"parts": parts, "random": source.state}
            run.save({**known, "recurrence": recurrence.state()})

    with progress_bar(progress, num_probes * num_steps) as bar:
        while (left := num_probes - sum(len(part.nodes) for part in parts)) > 0:
            if recurrence is None:
                rows = source.rows(min(block_size(A), left))
                recurrence = Recurrence(A, rows, norm=norm)
            try:
                recurrence.advance(num_steps - recurrence.steps, each)
            except KeyboardInterrupt as interrupt:
                if not parts and recurrence.steps:
                    parts.append(recurrence.quadrature())
                if not parts:
                    raise
                raise Interrupted(result()) from interrupt
            parts.append(recurrence.quadrature())
            recurrence = None
    density = result()
    run.save({"density": vars(density)})
    return density


def _smoothed(
    x: np.ndarray, nodes: np.ndarray, weights: np.ndarray, sigma: float
) -> np.ndarray:
    """Sum of Gaussians at ``x``, one row for each probe."""
    rows = []
    for theta, w in zip(nodes, weights, strict=True):
        z = (x[..., None] - theta) / sigma
        rows.append((np.exp(-0.5 * z**2) * w).sum(axis=-1) / (sigma * _SQRT_2_PI))
    return np.stack(rows)


def _band(curves: np.ndarray, width: float) -> tuple[np.ndarray, np.ndarray]:
    mean = curves.mean(axis=0)
    if len(curves) < 2:
        return np.zeros_like(mean), np.full_like(mean, np.inf)
    error = width * curves.std(axis=0, ddof=1) / math.sqrt(len(curves))
    return np.maximum(mean - error, 0), mean + error

"""One look at the spectrum of an operator: its ends, its bulk, and what they say."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchlinop._convergence import ConvergenceWarning
from torchlinop._operator import TorchLinearOperator
from torchlinop.estimate import Eigenpairs, Estimate, SpectralDensity, eigsh
from torchlinop.estimate.arguments import at_least_zero, positive_count, square_operator
from torchlinop.estimate.dense import whole_spectrum
from torchlinop.estimate.estimates import mean_and_stderr
from torchlinop.estimate.probes import ProbeSource, block_size
from torchlinop.estimate.progress import progress_bar
from torchlinop.estimate.recurrence import Recurrence

#: fewest and most vectors that are multiplied where the time decides, and how many times
#: the size of the matrix are enough
_FEWEST, _MOST, _ENOUGH = 200, 1500, 10
#: parts of the products that look for the top and for the bottom, and steps of each probe
_TOP, _BOTTOM, _STEPS = 0.35, 0.15, 60
#: an eigenvalue that is so many times the next one ends the outliers
_GAP = 1.5


@dataclass(frozen=True, eq=False)
class Summary:
    """What the spectrum of a symmetric operator looks like.

    Attributes
    ----------
    operator : str
        As it prints.
    top, bottom : Eigenpairs
        From both ends, with bounds of their residuals.
    density : SpectralDensity
        Of all eigenvalues: those of ``top`` that have converged as they are, the others by
        quadrature in the space that is orthogonal to them.
    damping : float
        With which the condition number is stated.
    num_matvecs : int
        Vectors that were multiplied.
    seconds : float
        What all took.
    """

    operator: str
    top: Eigenpairs
    bottom: Eigenpairs
    density: SpectralDensity
    damping: float
    num_matvecs: int
    seconds: float

    @property
    def largest(self) -> float:
        """The largest size of an eigenvalue."""
        return max(abs(self._top[0]), abs(self._bottom[0]))

    @property
    def trace(self) -> Estimate:
        """Sum of the eigenvalues."""
        return self.density.trace_of(lambda values: values)

    @property
    def effective_rank(self) -> Estimate:
        """Sum of the sizes of all eigenvalues over the largest: how many share the work."""
        unit = self.largest or 1.0
        return self.density.trace_of(lambda values: np.abs(values) / unit)

    @property
    def negative_share(self) -> Estimate:
        """The part of the sum of the sizes that negative eigenvalues have."""
        sizes = (self.density.weights * np.abs(self.density.nodes)).sum(axis=1)
        below = np.where(self.density.nodes < -self.density.floor, -self.density.nodes, 0)
        negative = (self.density.weights * below).sum(axis=1)
        size = sizes.mean() or 1.0
        share = float(negative.mean() / size)
        _, error = mean_and_stderr((negative - share * sizes) / size)  # of a quotient
        return Estimate(
            share, error, self.density.num_matvecs, "lanczos quadrature", self.density.seed
        )

    @property
    def num_outliers(self) -> int:
        """How many of the largest eigenvalues stand apart: up to the largest gap.

        A gap is where an eigenvalue is 1.5 times the next one, or more; 0 if there is none
        among those that were found.
        """
        values = self._top[self._top > self.density.floor]
        ratios = values[:-1] / values[1:]
        if not len(ratios) or ratios.max() < _GAP:
            return 0
        return int(ratios.argmax()) + 1

    @property
    def condition(self) -> float:
        """Largest over smallest eigenvalue of ``A + damping I``; infinite if indefinite."""
        low = self._bottom[0] + self.damping
        return (self._top[0] + self.damping) / low if low > 0 else float("inf")

    @property
    def _top(self) -> np.ndarray:
        """From the largest on."""
        values: np.ndarray = self.top.eigenvalues.double().cpu().numpy()[::-1]
        return values

    @property
    def _bottom(self) -> np.ndarray:
        """From the lowest on."""
        values: np.ndarray = self.bottom.eigenvalues.double().cpu().numpy()
        return values

    def __str__(self) -> str:
        top, low = self._top, self._bottom
        share = self.negative_share
        outliers = self.num_outliers
        if outliers:
            gap = top[outliers - 1] / top[outliers]
            apart = f"{outliers}: number {outliers} is {gap:.2g} times the next"
        else:
            apart = f"no gap among the {len(top)} largest"
        rounding = self.density.floor * (10 + self.density.dim**0.5)
        if abs(low[0] + self.damping) <= rounding:
            condition = f"singular with damping {self.damping:.3g}"
        elif np.isfinite(self.condition):
            condition = f"{self.condition:.3g} with damping {self.damping:.3g}"
        else:
            condition = f"indefinite with damping {self.damping:.3g}; needs {-low[0]:.3g}"
        rows = {
            "top eigenvalues": _ends(top, self.top.residual_bounds[::-1]),
            "bottom eigenvalues": _ends(low, self.bottom.residual_bounds),
            "trace": _number(self.trace),
            "effective rank": f"{_number(self.effective_rank)} of {self.density.dim}",
            "negative curvature": f"{share.value:.2%} +- {share.stderr:.2%} of all sizes",
            "outliers": apart,
            "condition": condition,
        }
        lines = [f"{self.operator}: {self.num_matvecs} products, {self.seconds:.2g} s"]
        return "\n".join(lines + [f"  {name:<19} {text}" for name, text in rows.items()])


def summary(
    A: Any,
    *,
    k: int = 20,
    damping: float | None = None,
    num_matvecs: int | None = None,
    max_seconds: float = 60.0,
    seed: int = 0,
    progress: bool = False,
) -> Summary:
    """Look at the spectrum of a symmetric operator for a minute or less.

    Eigenvalues at both ends by Lanczos, the rest by stochastic Lanczos quadrature; all of
    them by the dense matrix where that takes no more products (and at most 1,500).

    Parameters
    ----------
    A
        A symmetric or Hermitian operator or matrix, shape ``(N, N)``.
    k
        How many of the largest eigenvalues to look for.
    damping
        For the condition number; by default a thousandth of the largest eigenvalue.
    num_matvecs
        How many products may be used. By default from 200 to 1,500: as many as fit into
        ``max_seconds``.
    max_seconds
        Where ``num_matvecs`` is not given: how long it may take, about.
    seed
        Of the random vectors.
    progress
        Whether to show a progress bar.

    Returns
    -------
    Summary
        Prints as a paragraph; :func:`torchlinop.plot.overview` draws it.

    Raises
    ------
    ValueError
        ``A`` is not square or not symmetric, or an argument is out of range.
    numpy.linalg.LinAlgError
        A product is not finite.

    Examples
    --------
    >>> import torch, torchlinop
    >>> spectrum = torch.cat([torch.tensor([9.0, 8.0, 7.0]), torch.linspace(0, 1, 97)])
    >>> found = torchlinop.summary(torch.diag(spectrum.double()))
    >>> found.num_outliers
    3
    >>> print(found.trace.value.__round__(1), found.condition.__round__())
    72.5 1001
    """
    A = square_operator(A, "summary")
    k = min(positive_count("k", k), max(A.shape[0] - 1, 1))
    if damping is not None:
        damping = at_least_zero("damping", damping)
    if not max_seconds > 0:
        raise ValueError(f"max_seconds has to be positive, got {max_seconds!r}.")
    start = perf_counter()
    if num_matvecs is None:
        num_matvecs = _affordable(A, max_seconds)
    elif positive_count("num_matvecs", num_matvecs) < _FEWEST:
        raise ValueError(
            f"num_matvecs has to be at least {_FEWEST} for a summary, got {num_matvecs}."
        )
    few = min(3, A.shape[0])
    if A.shape[0] <= min(num_matvecs, _MOST):
        top, bottom, density = whole_spectrum(A, k, few, seed)
        spent = density.num_matvecs
    else:
        with warnings.catch_warnings():  # the bounds say how far they are
            warnings.simplefilter("ignore", ConvergenceWarning)
            most = max(int(_TOP * num_matvecs), k)
            top = eigsh(A, k, tol=1e-4, max_matvecs=most, seed=seed, progress=progress)
            most = int(_BOTTOM * num_matvecs)
            bottom = eigsh(
                A, few, which="SA", tol=1e-4, max_matvecs=most, seed=seed, progress=progress
            )
        spent = top.num_matvecs + bottom.num_matvecs
        density = _density_around(A, top, num_matvecs - spent, seed, progress)
        spent += density.num_matvecs
    return Summary(
        operator=repr(A),
        top=top,
        bottom=bottom,
        density=density,
        damping=1e-3 * top.eigenvalues[-1].abs().item() if damping is None else damping,
        num_matvecs=spent,
        seconds=perf_counter() - start,
    )


def _affordable(A: TorchLinearOperator, max_seconds: float) -> int:
    """Return how many products take ``max_seconds``, between limits."""
    x = ProbeSource(A, "rademacher", 0).rows(1).T
    A @ x  # the first one records what the others replay
    begin = perf_counter()
    float((A @ x)[0, 0].real)  # waits for the device
    each = perf_counter() - begin
    most = np.clip(_ENOUGH * A.shape[0], _FEWEST, _MOST)
    return int(np.clip(max_seconds / max(each, 1e-9), _FEWEST, most))


def _density_around(
    A: TorchLinearOperator, top: Eigenpairs, num_matvecs: int, seed: int, progress: bool
) -> SpectralDensity:
    """Density of the spectrum with the converged pairs as they are.

    In the space that is orthogonal to them the quadrature has less to estimate: the largest
    eigenvalues have most of the variance.
    """
    sure = np.flatnonzero(top.converged)
    index = torch.as_tensor(sure, device=A.device)
    V, known = top.eigenvectors[:, index], top.eigenvalues[index].double().cpu().numpy()
    n, rest = A.shape[0], A.shape[0] - len(sure)
    size = top.eigenvalues.abs().max().item()
    steps = min(_STEPS, rest)
    probes = max(num_matvecs // max(steps, 1), 3)
    source, found = ProbeSource(A, "rademacher", seed), []
    with progress_bar(progress, probes * steps) as bar:
        for begin in range(0, probes if rest else 0, block_size(A)):
            rows = source.rows(min(block_size(A), probes - begin))
            rows = _without(V, rows.T).T.contiguous()
            recurrence = Recurrence(_Rest(A, V), rows, norm=size)
            # E |z|^2 = rest; the size of each vector counts, so that nothing is biased
            sizes = recurrence.squared_norms.double().cpu().numpy()[:, None] / n
            recurrence.advance(steps, bar.update)
            part = recurrence.quadrature()
            found.append((part.nodes, sizes * part.weights, part.residuals))
    if not found:  # all eigenvalues are known
        found.append((np.zeros((probes, 0)),) * 3)
    nodes, weights, residuals = (np.concatenate(part) for part in zip(*found, strict=True))
    nodes = np.hstack([nodes, np.tile(known, (probes, 1))])
    weights = np.hstack([weights, np.full((probes, len(known)), 1 / n)])
    residuals = np.hstack([residuals, np.tile(top.residual_bounds[sure], (probes, 1))])
    order = np.argsort(nodes, axis=1, kind="stable")
    return SpectralDensity(
        nodes=np.take_along_axis(nodes, order, axis=1),
        weights=np.take_along_axis(weights, order, axis=1),
        residuals=np.take_along_axis(residuals, order, axis=1),
        dim=n,
        num_matvecs=probes * steps,
        seed=seed,
        eps=torch.finfo(A.torch_dtype).eps,
    )


class _Rest(TorchLinearOperator):
    """A matrix on the vectors that are orthogonal to the columns of ``V``."""

    def __init__(self, A: TorchLinearOperator, V: Tensor) -> None:
        super().__init__(A.shape, A.torch_dtype, A.device)
        self._A, self._V = A, V

    def _apply(self, x: Tensor) -> Tensor:
        return _without(self._V, self._A._product(x))

    def _adjoint(self) -> TorchLinearOperator:
        return self


def _without(V: Tensor, x: Tensor) -> Tensor:
    """Remove what ``x`` has along ``V``; once leaves rounding errors of what is large."""
    for _ in range(2):
        x = x - V @ (V.mH @ x)
    return x


def _ends(values: np.ndarray, bounds: np.ndarray, count: int = 5) -> str:
    """The outermost values with the largest of their bounds."""
    shown = " ".join(f"{value:.4g}" for value in values[:count])
    dots = " ..." if len(values) > count else ""
    return f"{shown}{dots} (+- {bounds[:count].max():.1e})"


def _number(estimate: Estimate) -> str:
    return str(estimate).rpartition(" (")[0]

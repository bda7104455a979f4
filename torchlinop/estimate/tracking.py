"""Following the top of a spectrum while the matrix changes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchlinop.estimate.arguments import at_least_zero, positive_count, square_operator
from torchlinop.estimate.eigenpairs import eigsh
from torchlinop.estimate.estimates import Estimate, mean_and_stderr
from torchlinop.estimate.hutchinson import product_rows, row_dots
from torchlinop.estimate.probes import Probes, ProbeSource
from torchlinop.estimate.sketches import on_host

#: how much of its size the eigenvalue after the tracked ones may lose in a step unseen
_FADING = 0.05
#: error estimates rest on gaps to eigenvalues that are only guessed
_SAFETY = 0.3


@dataclass(frozen=True, eq=False)
class Tracked:
    """What a tracker saw at one step.

    Attributes
    ----------
    eigenvalues : numpy.ndarray
        Shape ``(k,)``, largest first; they are never above the true ones, but for rounding.
    errors : numpy.ndarray
        How far they may be off, shape ``(k,)``: the squared residual over the gap, or the
        residual where that is less.
    trace : Estimate or None
        Where the tracker has probes.
    num_matvecs : int
        Vectors that were multiplied in this step.
    """

    eigenvalues: np.ndarray
    errors: np.ndarray
    trace: Estimate | None
    num_matvecs: int


class Tracker:
    r"""Largest eigenvalues, and the trace, of a matrix that changes in small steps.

    The first :meth:`update` finds the eigenvectors. Each later one starts from those of the
    step before: it multiplies them, and then residuals of the worst among them, until the
    error estimates are small enough. A curvature operator follows its model by itself, so
    after each step of an optimizer there is nothing to do but ``tracker.update()``.

    Parameters
    ----------
    A
        Symmetric or Hermitian operator, shape ``(N, N)``.
    k
        Number of eigenvalues.
    rtol
        Errors to stop at, relative to the largest eigenvalue in size.
    max_matvecs
        Most products for the eigenvalues in a step, at least ``k``; by default ``k + 8``.
        The first update is not limited.
    num_probes
        Random vectors for the trace, each for one more product in a step. They stay the
        same, so that changes of the trace are seen better than the trace itself.
    probes, seed
        Distribution and seed of the random vectors.

    Attributes
    ----------
    history : list of Tracked
        One entry for each update.

    Raises
    ------
    ValueError
        ``A`` is not square, or an argument is out of range.

    Examples
    --------
    >>> import torch
    >>> from torchlinop import HessianLinearOperator, estimate
    >>> x = torch.tensor([1.0, 2.0], dtype=torch.float64)
    >>> H = HessianLinearOperator.from_function(lambda x: x.pow(4).sum(), x)
    >>> tracker = estimate.Tracker(H)
    >>> for _ in range(3):
    ...     sharpness = tracker.update().eigenvalues[0]
    ...     x -= 0.01 * 4 * x**3
    >>> [float(step.eigenvalues[0].round(3)) for step in tracker.history]
    [48.0, 33.869, 26.653]
    """

    def __init__(
        self,
        A: Any,
        k: int = 1,
        *,
        rtol: float = 0.01,
        max_matvecs: int | None = None,
        num_probes: int = 0,
        probes: Probes = "rademacher",
        seed: int = 0,
    ) -> None:
        self._A = square_operator(A, "Tracker")
        self._k = positive_count("k", k)
        if self._k > self._A.shape[0]:
            raise ValueError(f"k has to be at most N = {self._A.shape[0]}, got {k}.")
        self._rtol = at_least_zero("rtol", rtol)
        most = self._k + 8
        if max_matvecs is not None:
            most = positive_count("max_matvecs", max_matvecs)
        if most < self._k:
            raise ValueError(f"max_matvecs has to be at least k = {k}, got {max_matvecs}.")
        self._most = min(most, self._A.shape[0])
        self._seed = seed
        count = positive_count("num_probes", num_probes) if num_probes else 0
        source = ProbeSource(self._A, probes, seed)
        self._probes = source.rows(count) if count else None
        #: eigenvectors as rows, and one more, which may come up; its eigenvalue
        self._rows: Tensor | None = None
        self._next = -np.inf
        self.history: list[Tracked] = []

    @property
    def eigenvectors(self) -> Tensor:
        """Those of the last update, shape ``(N, k)``."""
        if self._rows is None:
            raise ValueError("There are no eigenvectors before the first update().")
        return self._rows[: self._k].T

    def update(self) -> Tracked:
        """Look at the matrix as it is now; the result is also appended to the history."""
        first = 0
        if self._rows is None:
            k, n = self._k, self._A.shape[0]
            tol = min(0.1 * self._rtol, 1e-3)
            found = eigsh(self._A, min(k + 1, n), tol=tol, seed=self._seed)
            first = found.num_matvecs
            self._rows = found.eigenvectors.T.flip(0)
            if k < n:
                self._next = float(found.eigenvalues[0])
        rows, images, tracked = self._improve(self._rows)
        if self._probes is not None:
            trace = self._trace(self._probes, rows[: self._k], images)
            tracked = replace(tracked, trace=trace)
            first += trace.num_matvecs
        tracked = replace(tracked, num_matvecs=first + tracked.num_matvecs)
        self._rows = rows
        self.history.append(tracked)
        return tracked

    def _improve(self, rows: Tensor) -> tuple[Tensor, Tensor, Tracked]:
        """Rayleigh-Ritz in the span of the vectors and of as many residuals as it takes."""
        k = self._k
        V = torch.linalg.qr(rows.T)[0].T.contiguous()
        W = product_rows(self._A, V)
        following = self._next - _FADING * abs(self._next)
        goal, looked = _SAFETY * self._rtol, False
        while True:
            T = on_host(V.conj() @ W.T)
            theta, S = np.linalg.eigh((T + T.conj().T) / 2)
            theta, S = theta[::-1], S[:, ::-1]
            if len(theta) > k:
                following = max(following, theta[k])
            mix = torch.as_tensor(S[:, : k + 1].T.copy(), dtype=V.dtype, device=V.device)
            values = torch.as_tensor(
                theta[: k + 1, None].copy(), dtype=V.real.dtype, device=V.device
            )
            rows, images = mix @ V, mix @ W
            residuals = images - values * rows
            sizes = np.sqrt(row_dots(residuals, residuals).real)
            gaps = np.maximum(theta[:k] - following, sizes[:k])
            squares = np.divide(sizes[:k] ** 2, gaps, out=np.zeros(k), where=gaps > 0)
            errors = np.minimum(sizes[:k], squares)
            worst = int(errors.argmax())
            rounding = torch.finfo(V.dtype).eps * np.abs(theta).max()
            small = errors[worst] <= max(goal * np.abs(theta[:k]).max(), rounding)
            if (
                small
                and len(sizes) > k
                and not looked
                and theta[k] + sizes[k] > theta[k - 1]
            ):
                worst, looked = k, True  # what comes next may have come up: improve it once
            elif small:
                break
            if len(V) >= self._most or sizes[worst] <= 10 * rounding:
                break
            q = residuals[worst : worst + 1] / sizes[worst]
            for _ in range(2):
                q = q - (q @ V.mH) @ V
                q = q / torch.linalg.vector_norm(q)
            V, W = torch.cat([V, q]), torch.cat([W, product_rows(self._A, q)])
        self._next = following
        return rows, images[:k], Tracked(theta[:k].copy(), errors, None, len(V))

    def _trace(self, probes: Tensor, rows: Tensor, images: Tensor) -> Estimate:
        """Exact along the eigenvectors, the mean over the probes elsewhere."""
        c = probes @ rows.mH
        outside = probes - c @ rows
        samples = row_dots(outside, product_rows(self._A, probes) - c @ images).real
        mean, error = mean_and_stderr(samples)
        value = float(row_dots(rows, images).real.sum()) + mean
        return Estimate(value, error, len(probes), "hutchinson", self._seed)

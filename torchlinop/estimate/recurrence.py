"""Lanczos' three-term recurrence, for a block of starting vectors at once.

Nothing is orthogonalized, so that a step costs a product and little else. Copies of
eigenvalues that have converged then appear among the nodes, but together they have the
weight of one, and the quadrature is as accurate as with orthogonal vectors: Greenbaum,
Linear Algebra Appl. 113 (1989), https://doi.org/10.1016/0024-3795(89)90285-1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from torchlinop._checkpoint import placed
from torchlinop._operator import TorchLinearOperator
from torchlinop.estimate.arguments import (
    require_finite,
    require_squares,
    require_symmetric,
)
from torchlinop.estimate.sketches import on_host


class Quadrature(NamedTuple):
    r"""Nodes and weights with :math:`\sum_j w_j f(\theta_j) \approx q^H f(A) q`."""

    #: (K, m), ascending; where a recurrence ended early the last node is repeated
    nodes: np.ndarray
    #: (K, m), of which each row sums to 1
    weights: np.ndarray
    #: (K, m), how far an eigenvalue may be from each node
    residuals: np.ndarray


class Recurrence:
    """Lanczos' recurrence from ``K`` vectors.

    Parameters
    ----------
    A
        Symmetric or Hermitian.
    rows
        Starting vectors, shape ``(K, N)``; overwritten.
    norm
        What rounding errors are relative to, where that is more than the products show.

    Attributes
    ----------
    squared_norms : Tensor
        Of the starting vectors, shape ``(K,)``.
    eps : float
        Rounding unit of the products.
    """

    def __init__(self, A: TorchLinearOperator, rows: Tensor, *, norm: float = 0.0) -> None:
        self._A, self._norm = A, norm
        self.eps = torch.finfo(rows.dtype).eps
        self.squared_norms = _dots(rows, rows)
        self._q = rows.mul_(self.squared_norms.rsqrt().unsqueeze(1))
        self._previous: Tensor | None = None
        self._beta = torch.zeros_like(self.squared_norms)
        self._size = torch.zeros_like(self.squared_norms)
        self._coefficients: list[tuple[Tensor, Tensor]] = []

    def advance(self, steps: int, each: Callable[[int], object] | None = None) -> None:
        """Take some steps, of one product with the block each.

        ``each`` is called with the number of vectors that were multiplied. The first two
        show whether the matrix is symmetric.
        """
        for _ in range(steps):
            q = self._q
            w = self._A._product(q.T).T
            if not (self.steps or self._norm):
                require_squares(w, "Lanczos' recurrence")
            alpha = _dots(q, w)
            defect = self._defect(w)
            if self._previous is not None:
                w = w.addcmul(self._previous, self._beta.unsqueeze(1), value=-1)
            w = w.addcmul(q, alpha.unsqueeze(1), value=-1)
            beta = _dots(w, w).sqrt()
            self._size = torch.maximum(self._size, alpha.abs() + beta)
            if defect is not None:
                norm = max(self._norm, float(self._size.max()))
                require_symmetric(float(defect.abs().max()), norm, self.eps)
            # what is left may be rounding: then the recurrence has found all it can
            going = beta > 4 * self.eps * self._size
            beta = torch.where(going, beta, 0)
            self._previous = q
            self._q = w.mul_(torch.where(going, 1 / beta, 0).unsqueeze(1))
            self._beta = beta
            self._coefficients.append((alpha, beta))
            if each is not None:
                each(len(q))
        require_finite(self._coefficients[-1][0], "Lanczos' recurrence")

    def _defect(self, w: Tensor) -> Tensor | None:
        """Differences of numbers that agree where the matrix is symmetric.

        In the first step those of one vector and another; in the second, where most of each
        vector is the first one's product, those of the first and the second. The latter
        need not be orthogonal: of the identity it is made of rounding errors.
        """
        if self.steps == 0:
            products = self._q.conj() @ w.T
            return products - products.mH
        if self.steps == 1 and self._previous is not None:
            along = self._coefficients[0][0] * _dots(self._previous, self._q)
            return _dots(self._previous, w) - along - self._beta * _dots(self._q, self._q)
        return None

    def state(self) -> dict[str, Any]:
        """All of it, for :meth:`resumed`."""
        return {
            "q": self._q,
            "previous": self._previous,
            "beta": self._beta,
            "size": self._size,
            "squared_norms": self.squared_norms,
            "coefficients": torch.stack([torch.stack(x) for x in self._coefficients]),
        }

    @classmethod
    def resumed(
        cls, A: TorchLinearOperator, state: dict[str, Any], *, norm: float = 0.0
    ) -> Recurrence:
        """Return a recurrence that goes on after the steps of another process."""
        here = placed(state, A.device)
        recurrence = cls(A, here["q"].clone(), norm=norm)
        recurrence.squared_norms = here["squared_norms"]
        recurrence._q, recurrence._previous = here["q"], here["previous"]
        recurrence._beta, recurrence._size = here["beta"], here["size"]
        recurrence._coefficients = [(alpha, beta) for alpha, beta in here["coefficients"]]
        return recurrence

    @property
    def steps(self) -> int:
        """Number of steps so far."""
        return len(self._coefficients)

    def quadrature(self) -> Quadrature:
        """Gauss quadrature of all steps so far."""
        alphas, betas = self._on_host()
        nodes, weights = np.empty_like(alphas), np.zeros_like(alphas)
        residuals = np.zeros_like(alphas)
        for k, (alpha, beta) in enumerate(zip(alphas, betas, strict=True)):
            m = _length(beta)
            theta, S = _tridiagonal(alpha[:m], beta[: m - 1])
            nodes[k, :m], nodes[k, m:] = theta, theta[-1]
            weights[k, :m] = S[0] ** 2
            residuals[k, :m] = np.abs(S[-1]) * beta[m - 1]
            residuals[k, m:] = residuals[k, m - 1]
        return Quadrature(nodes, weights, residuals)

    def radau(self, lowest: float, limit: float) -> Quadrature:
        r"""Quadrature with a node at the lower end of the spectrum, and one node more.

        For functions with :math:`(-1)^j f^{(j)} \le 0` for all :math:`j \ge 1` it is a
        lower bound, as Gauss quadrature is an upper one: Golub and Meurant, "Matrices,
        Moments and Quadrature", Princeton 2010, theorem 6.4.

        Parameters
        ----------
        lowest
            A lower bound of the spectrum. Where there are nodes below it, the end is taken
            to be by its residual below the lowest, but not halfway to the limit.
        limit
            Where the function is not defined any more.
        """
        alphas, betas = self._on_host()
        nodes = np.empty((len(alphas), self.steps + 1))
        weights = np.zeros_like(nodes)
        for k, (alpha, beta) in enumerate(zip(alphas, betas, strict=True)):
            m = _length(beta)
            theta, S = _tridiagonal(alpha[:m], beta[: m - 1])
            if beta[m - 1]:
                residual = np.abs(S[-1, 0]) * beta[m - 1]
                room = max(residual, 4 * self.eps * np.abs(theta).max())
                end = min(lowest, max(theta[0] - room, (theta[0] + limit) / 2))
                last = end + beta[m - 1] ** 2 * (S[-1] ** 2 / (theta - end)).sum()
                theta, S = _tridiagonal(np.append(alpha[:m], last), beta[:m])
                theta[0] = end  # but for rounding
                m += 1
            nodes[k, :m], nodes[k, m:] = theta, theta[-1]
            weights[k, :m] = S[0] ** 2
        return Quadrature(nodes, weights, np.zeros_like(nodes))

    def _on_host(self) -> tuple[np.ndarray, np.ndarray]:
        """Diagonals and what is beside them, shape ``(K, m)``."""
        alphas, betas = zip(*self._coefficients, strict=True)
        return on_host(torch.stack(alphas, dim=1)), on_host(torch.stack(betas, dim=1))


def _length(beta: np.ndarray) -> int:
    """After how many steps a recurrence has ended."""
    ends = np.flatnonzero(beta == 0)
    return int(ends[0]) + 1 if len(ends) else len(beta)


def _tridiagonal(alpha: np.ndarray, beta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(alpha) == 1:
        return alpha[:1].copy(), np.ones((1, 1))
    theta, S = eigh_tridiagonal(alpha, beta, lapack_driver="stev")
    return theta, S


def _dots(x: Tensor, y: Tensor) -> Tensor:
    """Real parts of the inner products of rows, shape ``(K,)``."""
    if len(x) == 1:
        return torch.vdot(x[0], y[0]).real.unsqueeze(0)
    return torch.linalg.vecdot(x, y).real

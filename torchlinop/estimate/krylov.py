"""Lanczos with full orthogonalization, thick restarts and fresh starts."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from torchlinop._operator import TorchLinearOperator
from torchlinop.estimate.basis import Basis
from torchlinop.estimate.probes import ProbeSource


class KrylovSpace:
    r"""An orthonormal basis ``Q`` with :math:`A Q = Q T + q b^\top + P B^\top`.

    ``T`` is symmetric, ``q`` the vector that is multiplied next. After plain Lanczos steps
    ``b`` has one entry; after a restart, which replaces ``Q`` by Ritz vectors, all may be
    filled. A fresh start sets ``q`` aside into ``P`` and goes on with a random vector that
    is orthogonal to everything, for which ``b`` is zero. All these are the same equation,
    and so is the step; residuals of Ritz vectors can always be read from ``b`` and ``B``.

    Parameters
    ----------
    A
        Symmetric or Hermitian.
    capacity
        Most vectors of the basis.
    on_device
        How many of them may lie on the operator's device.
    start
        First vector, shape ``(N,)``; overwritten. None for a random one.
    seed
        Of random vectors.

    Attributes
    ----------
    size : int
        Number of vectors in the basis.
    num_matvecs : int
    norm : float
        An estimate, from below, of the norm of ``A``.
    eps : float
        Rounding unit of the products.
    """

    def __init__(
        self,
        A: TorchLinearOperator,
        capacity: int,
        on_device: int,
        start: Tensor | None,
        seed: int,
    ) -> None:
        self._A = A
        self._random = ProbeSource(A, "gaussian", seed)
        first = self._random.rows(1)[0] if start is None else start
        self._basis = Basis(capacity, first, on_device)
        self._q = first.div_(_norm(first))
        self._T = np.zeros((capacity, capacity))
        self._b: np.ndarray = np.zeros(0)
        self._aside = first.new_zeros(0, len(first))
        self._B: np.ndarray = np.zeros((0, 0))
        self.eps = torch.finfo(A.torch_dtype).eps
        self.capacity, self.size = capacity, 0
        self.num_matvecs, self.norm = 0, 0.0

    @property
    def complete(self) -> bool:
        """Whether the basis spans the whole space."""
        return self.size == self._A.shape[0]

    @property
    def rounding(self) -> float:
        """What residuals may have beyond what is known of them."""
        return self.eps * self.norm * (10 + math.sqrt(self.size))

    def step(self) -> None:
        """Multiply the next vector and add it to the basis."""
        j, q, b = self.size, self._q, self._b
        self._basis[j] = q
        w = self._A._product(q.unsqueeze(1))[:, 0]
        self.num_matvecs += 1
        plain = j > 0 and not b[:-1].any()
        if plain and b[-1]:
            w = w.sub(self._basis[j - 1], alpha=b[-1])
        alpha = torch.vdot(q, w).real
        w = w.addcmul(q, alpha, value=-1)
        c, beta = self._orthogonalize(w, j + 1)
        found = c.copy()  # what A q has along the basis, of which b is what it should be
        found[j] += float(alpha)
        if plain:
            found[j - 1] += b[-1]
        if np.linalg.norm(c) > 0.5 * beta:  # rounding has left something along the basis
            more, beta = self._orthogonalize(w, j + 1)
            found += more
        self.norm = max(self.norm, math.hypot(np.linalg.norm(found), beta))
        self._require_symmetric(found[:j] - b)
        self._T[: j + 1, j] = self._T[j, : j + 1] = found[: j + 1]
        self._B = np.vstack([self._B, found[j + 1 :]])
        self._b = np.zeros(j + 1)
        self.size = j + 1
        if beta > 10 * self.eps * self.norm:
            self._b[j] = beta
            self._q = w.div_(beta)
        elif not self.complete:  # an invariant subspace: go on in the rest
            self._start_from_random()

    def _orthogonalize(self, w: Tensor, count: int) -> tuple[np.ndarray, float]:
        """Remove what ``w`` has along the basis and what is set aside.

        Returns the coefficients of both, and the norm of the rest.
        """
        c = self._basis.orthogonalize(count, w)
        if len(self._aside):
            along = torch.mv(self._aside.conj(), w)
            w.addmv_(self._aside.T, along, alpha=-1)
            c = torch.cat([c, along])
        both = torch.cat([c.real, torch.vdot(w, w).real.unsqueeze(0)])
        numbers = both.to(device="cpu", dtype=torch.float64).numpy()
        if not np.isfinite(numbers).all():
            raise np.linalg.LinAlgError(
                f"Product {self.num_matvecs} with the matrix has NaN or infinite entries. "
                "For a curvature matrix look for NaN in parameters and data with "
                "check_finite=True."
            )
        return numbers[:-1], math.sqrt(numbers[-1])

    def _require_symmetric(self, defect: np.ndarray) -> None:
        size = np.abs(defect).max(initial=0)
        if size > 4 * math.sqrt(self.eps) * self.norm:
            raise ValueError(
                "The matrix is not symmetric, or not the same in each product: entries of "
                f"Q^H A Q that should agree differ by {size:.2e}, where the norm of A is "
                f"about {self.norm:.2e}. Hessian, GGN and Fisher matrices are symmetric; "
                "for others take (A + A.H) / 2 or A.H @ A."
            )

    def start_afresh(self) -> None:
        """Set the next vector aside and go on from a random one."""
        if self._b.any():
            self._aside = torch.cat([self._aside, self._q.unsqueeze(0)])
            self._B = np.column_stack([self._B, self._b])
        self._start_from_random()

    def _start_from_random(self) -> None:
        if self.size + len(self._aside) == self._A.shape[0]:  # there is nothing else
            self._q, self._b = self._aside[-1].clone(), self._B[:, -1]
            self._aside, self._B = self._aside[:-1], self._B[:, :-1]
            return
        self._b = np.zeros(self.size)
        self._q = self._random.rows(1)[0]
        for _ in range(3):
            self._orthogonalize(self._q, self.size)
            self._q.div_(_norm(self._q))

    def ritz(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ritz values, ascending, their coefficients as columns, and residual norms."""
        theta, S = np.linalg.eigh(self._T[: self.size, : self.size])
        parts = np.vstack([self._b @ S, self._B.T @ S])
        return theta, S, np.linalg.norm(parts, axis=0)

    def restart(self, theta: np.ndarray, S: np.ndarray) -> None:
        """Keep some Ritz vectors: ``theta`` has shape ``(k,)``, ``S`` ``(size, k)``."""
        k = len(theta)
        self._basis.combine(self._coefficients(S))
        self._T[:] = 0
        self._T[np.arange(k), np.arange(k)] = theta
        self._b, self._B = self._b @ S, S.T @ self._B
        self.size = k

    def vectors(self, S: np.ndarray) -> Tensor:
        """Return Ritz vectors as columns ``(N, k)``."""
        return self._basis.combinations(self._coefficients(S))

    def _coefficients(self, S: np.ndarray) -> Tensor:
        return torch.as_tensor(S, dtype=self._A.torch_dtype, device=self._A.device)


def _norm(x: Tensor) -> float:
    return math.sqrt(torch.vdot(x, x).real.item())

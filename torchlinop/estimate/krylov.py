"""Lanczos with full orthogonalization, thick restarts and fresh starts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchlinop._operator import TorchLinearOperator
from torchlinop.estimate.arguments import require_squares, require_symmetric
from torchlinop.estimate.basis import Basis
from torchlinop.estimate.probes import ProbeSource
from torchlinop.estimate.sketches import on_host


class KrylovSpace:
    r"""An orthonormal basis ``Q`` with :math:`A Q = Q T + q b^\top + P B^\top`.

    ``T`` is Hermitian, ``q`` the vector that is multiplied next. After plain Lanczos steps
    ``b`` has one entry; after a restart, which replaces ``Q`` by Ritz vectors, all may be
    filled. A fresh start sets ``q`` aside into ``P`` and goes on with a random vector that
    is orthogonal to ``Q``, for which ``b`` is zero; what enters the basis leaves ``P``. All
    these are the same equation, and so is the step; residuals of Ritz vectors can always be
    read from ``b`` and ``B``.

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
    dim, capacity, size : int
        ``N``, and how many vectors the basis may have and has.
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
        self._A, self.dim = A, A.shape[0]
        self._random = ProbeSource(A, "gaussian", seed)
        first = self._random.rows(1)[0] if start is None else start
        self._basis = Basis(capacity, first, on_device)
        self._q = first.div_(_norm(first))
        number = np.complex128 if first.dtype.is_complex else np.float64
        self._T = np.zeros((capacity, capacity), dtype=number)
        self._b = np.zeros(0, dtype=number)
        #: the last entry of b where the others are zero, and otherwise zero
        self._known = 0.0
        self._aside = first.new_zeros(0, len(first))
        self._B = np.zeros((0, 0), dtype=number)
        self.eps = torch.finfo(A.torch_dtype).eps
        self.capacity, self.size = capacity, 0
        self.num_matvecs, self.norm = 0, 0.0

    def state(self) -> dict[str, Any]:
        """All of it, for :meth:`go_on` of a new space of this capacity."""
        size = self.size
        return {
            "basis": self._basis.rows(size),
            "q": self._q,
            "T": self._T[:size, :size],
            "b": self._b,
            "aside": self._aside,
            "B": self._B,
            "norm": self.norm,
            "num_matvecs": self.num_matvecs,
            "capacity": self.capacity,
            "random": self._random.state,
        }

    def go_on(self, state: dict[str, Any]) -> None:
        """Become a space that was saved."""
        rows = [row for block in state["basis"] for row in block]
        for i, row in enumerate(rows):
            self._basis[i] = row
        self.size = len(rows)
        self._T[: self.size, : self.size] = state["T"]
        self._q, self._aside = (state[name].to(self._A.device) for name in ("q", "aside"))
        self._b, self._B = state["b"], state["B"]
        self.norm, self.num_matvecs = state["norm"], state["num_matvecs"]
        self._random.go_on(state["random"])

    @property
    def complete(self) -> bool:
        """Whether the basis spans the whole space."""
        return self.size == self.dim

    @property
    def rounding(self) -> float:
        """What residuals may have beyond what is known of them."""
        return self.eps * self.norm * (10 + math.sqrt(self.size))

    def step(self) -> None:
        """Multiply the next vector and add it to the basis."""
        j, q, known = self.size, self._q, self._known
        self._basis[j] = q
        w = self._A._vector_product(q)  # fresh memory
        self.num_matvecs += 1
        if self.num_matvecs == 1:
            require_squares(w, "eigsh")
        if known:  # of what lies along the basis
            w.sub_(self._basis[j - 1], alpha=known)
        alpha = torch.vdot(q, w)
        w.addcmul_(q, alpha.real, value=-1)
        c, diagonal, beta = self._orthogonalize(w, j + 1, alpha)
        correction = math.sqrt(np.vdot(c, c).real)
        c[j] += diagonal.real
        if known:
            c[j - 1] += known
        if correction > 0.5 * beta:  # rounding has left something along the basis
            more, _, beta = self._orthogonalize(w, j + 1)
            c += more
        self.norm = max(self.norm, math.sqrt(np.vdot(c, c).real + beta**2))
        if not known or len(self._aside) or correction > math.sqrt(self.eps) * self.norm:
            expected = self._b + self._take_from_aside(q)
            defect = np.abs(c[:j].conj() - expected).max(initial=0)
            require_symmetric(defect, self.norm, self.eps)
        self._T[:j, j], self._T[j, :j] = c[:j], c[:j].conj()
        self._T[j, j] = c[j].real
        if len(self._aside):
            self._B = np.vstack([self._B, np.zeros_like(self._B[:1])])
        self.size = j + 1
        if beta > 10 * self.eps * self.norm:
            self._couple(beta)
            self._q = w.div_(beta)
        elif not self.complete:  # an invariant subspace: go on in the rest
            self._start_from_random()
        else:
            self._couple(0.0)

    def _couple(self, beta: float) -> None:
        """Let the next vector belong to the last one of the basis alone."""
        self._b = np.zeros(self.size, dtype=self._T.dtype)
        self._b[-1] = self._known = beta

    def _orthogonalize(
        self, w: Tensor, count: int, alpha: Tensor | None = None
    ) -> tuple[np.ndarray, complex, float]:
        """Remove what ``w`` has along the basis; return that, a number, and the norm."""
        c = self._basis.orthogonalize(count, w)
        square = torch.vdot(w, w)
        both = (square if alpha is None else alpha, square)
        numbers = on_host(torch.cat((c, torch.stack(both))))
        if not math.isfinite(numbers[-1].real):
            raise np.linalg.LinAlgError(
                f"Product {self.num_matvecs} with the matrix has NaN or infinite entries. "
                "For a curvature matrix look for NaN in parameters and data with "
                "check_finite=True."
            )
        return numbers[:-2], numbers[-2], math.sqrt(numbers[-1].real)

    def _take_from_aside(self, q: Tensor) -> np.ndarray:
        """Remove ``q``, now in the basis, from what is set aside; return ``q^H P B^T``."""
        if not len(self._aside):
            return np.zeros_like(self._b)
        along = torch.mv(self._aside, q.conj())
        self._aside.addr_(along, q, alpha=-1)
        return self._B @ on_host(along)

    def start_afresh(self) -> None:
        """Set the next vector aside and go on from a random one."""
        if self._b.any():
            if not len(self._aside):
                self._B = np.zeros((self.size, 0), dtype=self._T.dtype)
            self._aside = torch.cat([self._aside, self._q.unsqueeze(0)])
            self._B = np.column_stack([self._B, self._b])
        self._start_from_random()

    def _start_from_random(self) -> None:
        self._b, self._known = np.zeros(self.size, dtype=self._T.dtype), 0.0
        self._q = self._random.rows(1)[0]
        for _ in range(3):
            self._basis.orthogonalize(self.size, self._q)
            self._q.div_(_norm(self._q))

    def turn_to(self, S: np.ndarray) -> None:
        """Multiply next what most of the residuals of these Ritz vectors lies along."""
        if not len(self._aside):
            return
        sizes = torch.linalg.vector_norm(self._aside, dim=1)
        couplings = np.abs(self._B.T @ S).max(axis=1, initial=0) * on_host(sizes)
        most = int(couplings.argmax())
        if couplings[most] > np.abs(self._b @ S).max(initial=0):
            q, b = self._q, self._b
            size = float(sizes[most])
            self._q, self._b = self._aside[most] / size, self._B[:, most] * size
            self._known = 0.0
            self._aside[most], self._B[:, most] = q, b

    def ritz(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ritz values, ascending, their coefficients as columns, and residual norms."""
        # by torch, since two libraries' threads would wait for one another
        T = torch.from_numpy(self._T[: self.size, : self.size])
        theta, S = (x.numpy() for x in torch.linalg.eigh(T))
        self.norm = max(self.norm, float(np.abs(theta).max()))
        if not len(self._aside):
            return theta, S, np.abs(self._b @ S)
        outside = torch.cat([self._aside, self._q.unsqueeze(0)])
        gram = on_host(outside.conj() @ outside.T)
        parts = np.vstack([self._B.T @ S, self._b @ S])
        squares = (parts.conj() * (gram @ parts)).sum(axis=0).real
        return theta, S, np.sqrt(np.maximum(squares, 0))

    def restart(self, theta: np.ndarray, S: np.ndarray) -> None:
        """Keep some Ritz vectors: ``theta`` has shape ``(k,)``, ``S`` ``(size, k)``."""
        k = len(theta)
        coefficients = self._coefficients(S)
        self.size = 0  # an interrupt from here on leaves nothing to be used
        self._basis.combine(coefficients)
        self._T[:] = 0
        self._T[np.arange(k), np.arange(k)] = theta
        self._b, self._known = self._b @ S, 0.0
        if len(self._aside):
            self._B = S.T @ self._B
        self.size = k

    def vectors(self, S: np.ndarray) -> Tensor:
        """Return Ritz vectors as columns ``(N, k)``."""
        return self._basis.combinations(self._coefficients(S))

    def _coefficients(self, S: np.ndarray) -> Tensor:
        return torch.as_tensor(S, dtype=self._A.torch_dtype, device=self._A.device)


def _norm(x: Tensor) -> float:
    return math.sqrt(torch.vdot(x, x).real.item())

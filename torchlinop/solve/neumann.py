r"""The truncated Neumann series."""

from __future__ import annotations

import copy
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from torchlinop._operator import TorchLinearOperator
from torchlinop.solve.arguments import count, finite, square_operator
from torchlinop.solve.columns import column_dots, column_norms, require_finite_columns
from torchlinop.solve.preconditioner import as_preconditioner, moved
from torchlinop.solve.report import SolveReport
from torchlinop.solve.system import System, random_vector


class NeumannInverseLinearOperator(TorchLinearOperator):
    r"""Approximate inverse by a fixed number of terms of the Neumann series.

    .. math:: A^{-1} \approx \alpha \sum_{k=0}^{K} (I - \alpha P A)^k P

    with ``K = num_terms`` products per vector, the scale :math:`\alpha` and the
    preconditioner :math:`P` (the identity by default). The series converges if all
    eigenvalues of :math:`P A` are between 0 and :math:`2 / \alpha`. Unlike an inverse by
    conjugate gradients it is a linear function of the vector.

    Parameters
    ----------
    A
        Shape ``(N, N)``: an operator, a matrix, a sparse matrix.
    num_terms
        ``K``, the highest power.
    scale
        :math:`\alpha`; by default that of :func:`~torchlinop.neumann_scale`, which is
        computed here.
    preconditioner
        :math:`P`, an operator or a matrix.
    damping
        Added to the diagonal of ``A``.

    Attributes
    ----------
    scale : float
    last_solve : SolveReport or None
        Residual norms of the last product. A truncated series has no tolerance: all
        columns count as converged.

    Raises
    ------
    ValueError
        ``scale`` is not positive.
    numpy.linalg.LinAlgError
        In a product, when the series turns out to diverge.

    References
    ----------
    Lorraine, Vicol and Duvenaud, "Optimizing millions of hyperparameters by implicit
    differentiation", AISTATS 2020, https://arxiv.org/abs/1911.02590

    Examples
    --------
    >>> import torch
    >>> from torchlinop import NeumannInverseLinearOperator
    >>> A = torch.tensor([[0.5]])
    >>> NeumannInverseLinearOperator(A, num_terms=2, scale=1.0) @ torch.ones(1)
    tensor([1.7500])
    """

    solver = "Neumann series"

    def __init__(
        self,
        A: Any,
        num_terms: int = 100,
        scale: float | None = None,
        preconditioner: Any = None,
        *,
        damping: float = 0.0,
    ) -> None:
        A = square_operator(A, "The Neumann series")
        super().__init__(A.shape, A.torch_dtype, A.device)
        self.A = A
        self.num_terms = count("num_terms", num_terms)
        self.preconditioner = as_preconditioner(preconditioner, A, "preconditioner")
        self.damping = finite("damping", damping)
        self._given_scale = scale
        self._set_scale()
        self.last_solve: SolveReport | None = None

    def _set_scale(self) -> None:
        if self._given_scale is None:
            self.scale = neumann_scale(
                self.A, preconditioner=self.preconditioner, damping=self.damping
            )
        else:
            self.scale = finite("scale", self._given_scale)
        if self.scale <= 0:
            raise ValueError(
                "scale has to be between 0 and 2 / lambda_max, got "
                f"{self.scale!r}; neumann_scale(A) computes one that is safe."
            )

    def with_damping(self, damping: float) -> Self:
        """Return the series for another damping; a scale that was computed is anew."""
        inverse = copy.copy(self)
        inverse.damping = finite("damping", damping)
        change = inverse.damping - self.damping
        inverse.preconditioner = moved(self.preconditioner, change)
        inverse._set_scale()
        inverse.last_solve = None
        return inverse

    def _apply(self, x: Tensor) -> Tensor:
        """Richardson's iteration: after K steps it has summed the series."""
        system = System(self.A, self.damping, self.preconditioner)
        first = column_norms(x)
        require_finite_columns(first, "The right-hand side")
        r = x.clone(memory_format=torch.contiguous_format)
        z = system.precondition(r)
        total = z.clone()
        # in the norm of P every symmetric series that converges shrinks in every step
        symmetric = _self_adjoint(self.A) and (
            self.preconditioner is None or _self_adjoint(self.preconditioner)
        )
        size = column_dots(r, z)
        for k in range(1, self.num_terms + 1):
            r.sub_(system.product(z), alpha=self.scale)
            z = system.precondition(r)
            total.add_(z)
            before, size = size, column_dots(r, z)
            grown = symmetric & (size > before * (1 + 1e3 * system.eps))
            grown &= size > 1e3 * system.eps**2 * first**2  # beyond rounding
            if grown.any() or not np.isfinite(size).all():
                self._refuse_divergence(k)
        norms = column_norms(r)
        if (norms > 10 * first).any():
            self._refuse_divergence(self.num_terms)
        self.last_solve = SolveReport(
            solver=self.solver,
            iterations=np.full(len(norms), self.num_terms),
            residual_norms=norms,
            tolerances=np.full(len(norms), np.inf),
            converged=np.ones(len(norms), dtype=bool),
            num_matvecs=system.num_matvecs,
        )
        return total.mul_(self.scale)

    def _refuse_divergence(self, k: int) -> None:
        raise np.linalg.LinAlgError(
            f"The Neumann series with scale={self.scale:.6g} diverges: its terms grow at "
            f"term {k}. All eigenvalues have to be positive and below 2 / scale = "
            f"{2 / self.scale:.6g}. neumann_scale(A) computes a safe scale; a matrix with "
            "eigenvalues that are not positive needs damping, or "
            "MINRESInverseLinearOperator."
        )

    def _adjoint(self) -> TorchLinearOperator:
        P = self.preconditioner
        if _self_adjoint(self.A) and (P is None or _self_adjoint(P)):
            return self  # (I - a P A)^k P is symmetric if P and A are
        inverse = copy.copy(self)
        inverse.A = self.A._adjoint()
        inverse.preconditioner = None if P is None else P._adjoint()
        inverse._given_scale = self.scale
        inverse.last_solve = None
        return inverse


def _self_adjoint(A: TorchLinearOperator) -> bool:
    return A._adjoint() is A


def neumann_scale(
    A: Any,
    *,
    preconditioner: Any = None,
    damping: float = 0.0,
    num_matvecs: int = 20,
    seed: int = 0,
) -> float:
    r"""Return a scale with which the Neumann series converges.

    One over an upper estimate of the largest eigenvalue of :math:`P (A + \delta I)`, by
    Lanczos' method from a random vector: half of what just diverges, so every component
    of the error shrinks without changing sign.

    Parameters
    ----------
    A
        Hermitian positive definite: an operator or a matrix, shape ``(N, N)``.
    preconditioner
        :math:`P`, positive definite.
    damping
        :math:`\delta`.
    num_matvecs
        Steps of Lanczos' method, a product with ``A`` each.
    seed
        Of the random vector.

    Returns
    -------
    float

    Raises
    ------
    numpy.linalg.LinAlgError
        No eigenvalue of the matrix seems to be positive, or some is negative.

    References
    ----------
    Zhou and Li, "Bounding the spectrum of large Hermitian matrices", Linear Algebra Appl.
    435 (2011), https://doi.org/10.1016/j.laa.2010.06.034

    Examples
    --------
    >>> import torch
    >>> from torchlinop import neumann_scale
    >>> round(neumann_scale(torch.diag(torch.tensor([1.0, 4.0]))), 4)
    0.25
    """
    A = square_operator(A, "The Neumann series")
    if not A.shape[0]:
        raise ValueError("A 0 x 0 matrix has no eigenvalues.")
    system = System(A, damping, as_preconditioner(preconditioner, A, "preconditioner"))
    v = random_vector(A, seed=seed)
    z = system.precondition(v)
    alphas: list[float] = []
    betas: list[float] = []
    basis: list[tuple[Tensor, Tensor]] = []
    beta = float(np.sqrt(column_dots(v, z)[0]))
    for _ in range(min(num_matvecs, A.shape[0])):
        v, z = v / beta, z / beta
        basis.append((v, z))
        w = system.product(z)
        alphas.append(float(column_dots(z, w)[0]))
        for _ in range(2):  # orthogonal to all that came before
            for v_old, z_old in basis:
                w = w - v_old * (z_old.mH @ w)
        v, z = w, system.precondition(w)
        beta = float(np.sqrt(max(column_dots(v, z)[0], 0.0)))
        betas.append(beta)
        if beta <= 10 * system.eps * max(map(abs, alphas)):
            break
    T = np.diag(alphas) + np.diag(betas[:-1], 1) + np.diag(betas[:-1], -1)
    if not np.isfinite(T).all():
        raise np.linalg.LinAlgError("The products with the matrix are not finite.")
    values, vectors = np.linalg.eigh(T)
    bound = float((values + betas[-1] * np.abs(vectors[-1])).max())
    if values[0] < -100 * system.eps * abs(bound) or bound <= 0:
        raise np.linalg.LinAlgError(
            f"The matrix is not positive definite: it has an eigenvalue of at most "
            f"{values[0]:.3e}, with which no Neumann series converges. Add damping, or use "
            "MINRESInverseLinearOperator."
        )
    return 1 / bound

r"""MINRES, for indefinite matrices."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from torchlinop._checkpoint import Run, placed
from torchlinop.solve.columns import (
    add_columns,
    column_dots,
    column_norms,
    require_finite_iteration,
    row,
    take,
)
from torchlinop.solve.inverse import KrylovInverse
from torchlinop.solve.preconditioner import refuse_preconditioner
from torchlinop.solve.restart import Callback, Correction
from torchlinop.solve.system import System


class MINRESInverseLinearOperator(KrylovInverse):
    r"""Inverse of a symmetric, possibly indefinite matrix by MINRES.

    .. math:: (A + \delta I)^{-1}

    For the Hessian, and for shift-invert: with ``damping=-sigma`` it is the ``OPinv`` of
    ``eigsh(A, sigma=sigma)``. A product with several vectors iterates on all of them at
    once, each with a Krylov space of its own.

    Parameters
    ----------
    A
        Hermitian: an operator, a matrix, a sparse matrix, shape ``(N, N)``.
    damping
        :math:`\delta`, of any sign.
    **options
        Those of :class:`~torchlinop.CGInverseLinearOperator`. The preconditioner ``M``
        has to be positive definite here, too.

    Attributes
    ----------
    last_solve : SolveReport or None
        Iterations, residual norms and converged columns of the last product.

    References
    ----------
    Paige and Saunders, "Solution of sparse indefinite systems of linear equations", SIAM
    J. Numer. Anal. 12 (1975), https://doi.org/10.1137/0712047

    Examples
    --------
    >>> import torch
    >>> from torchlinop import MINRESInverseLinearOperator
    >>> A = torch.diag(torch.tensor([1.0, -2.0]))
    >>> MINRESInverseLinearOperator(A) @ torch.tensor([1.0, 1.0])
    tensor([ 1.0000, -0.5000])
    """

    solver = "MINRES"
    basis_share = 0.75  # each column has a space of its own

    def _iterate(
        self,
        system: System,
        B: Tensor,
        tolerances: np.ndarray,
        maxiter: int,
        callback: Callback | None,
        run: Run,
    ) -> Correction:
        return minres(system, B, tolerances, maxiter, callback, run)


def minres(
    system: System,
    B: Tensor,
    tolerances: np.ndarray,
    maxiter: int,
    callback: Callback | None,
    run: Run,
) -> Correction:
    """Solve for all columns at once; see :class:`Iteration`.

    Vectors are blocks with a column for each right-hand side, scalars arrays ``(K,)``. A
    ``run`` with a state goes on from that.
    """
    X = torch.zeros_like(B)
    norms = column_norms(B)
    iterations = np.zeros(len(norms), dtype=int)
    active = np.arange(len(norms))
    # Lanczos vectors v (and z = M v), of lengths gamma; search directions w
    v = B.clone(memory_format=torch.contiguous_format)
    v_old, x, w, w_old = (torch.zeros_like(v) for _ in range(4))
    r = v.clone() if system.preconditioned else v
    z = system.precondition(v)
    gamma = _lengths(v, z, system)
    empty = (gamma == 0) & (norms > tolerances)
    gamma_old = np.ones_like(gamma)
    eta = gamma.copy()
    c, c_old, s, s_old = (f(len(norms)) for f in (np.ones, np.ones, np.zeros, np.zeros))
    reason, k = "preconditioner" if empty.any() else "", 0
    finished = (norms <= tolerances) | (gamma == 0)
    if run.state is not None:
        before = placed(run.state, B.device)
        X, v, v_old, x, w, w_old, z, r = before["blocks"]
        gamma, gamma_old, eta, c, c_old, s, s_old = before["scalars"]
        norms, iterations, active, finished = before["columns"]
        reason, k = before["ended"]
    while k < maxiter:
        if finished.any():
            add_columns(X, active[finished], take(x, np.flatnonzero(finished)))
            left = np.flatnonzero(~finished)
            active = active[left]
            v, v_old, x, w, w_old, z, r = (
                take(block, left) for block in (v, v_old, x, w, w_old, z, r)
            )
            gamma, gamma_old, eta, c, c_old, s, s_old = (
                a[left] for a in (gamma, gamma_old, eta, c, c_old, s, s_old)
            )
        if not len(active):
            break
        k += 1
        q = z * row(1 / gamma, z)
        Aq = system.product(q)
        delta = column_dots(q, Aq)
        v_new = Aq.sub_(v * row(delta / gamma, v))
        if k > 1:
            v_new.sub_(v_old.mul_(row(gamma / gamma_old, v)))
        z_new = system.precondition(v_new)
        gamma_new = _lengths(v_new, z_new, system)
        require_finite_iteration(delta + gamma_new, "MINRES", k)
        size = np.hypot(np.hypot(delta, gamma_new), gamma * (k > 1))
        rounding = 10 * system.eps * size
        gamma_new[gamma_new < rounding / 10] = 0  # the Krylov space is exhausted

        # the rotation that makes the tridiagonal matrix triangular
        diagonal = c * delta - c_old * s * gamma
        above = s * delta + c_old * c * gamma
        far_above = s_old * gamma
        pivot = np.hypot(diagonal, gamma_new)
        singular = pivot <= rounding  # |A r| is pivot times |r|
        safe = np.where(singular, 1, pivot)
        c, c_old = np.where(singular, 0, diagonal / safe), c
        s, s_old = np.where(singular, 1, gamma_new / safe), s

        w_new = q.sub_(w_old.mul_(row(far_above, w))).sub_(w * row(above, w))
        w_new.mul_(row(1 / safe, w))
        x.add_(w_new * row(c * eta, w))
        eta = -s * eta
        if system.preconditioned:
            r.mul_(row(s**2, r))
            reach = np.where(gamma_new > 0, gamma_new, 1)
            r.add_(v_new * row(c * eta / reach, r))
            norms[active] = column_norms(r)
        else:
            norms[active] = np.abs(eta)
        iterations[active] = k
        if callback is not None:
            iterate = X.clone()
            add_columns(iterate, active, x)
            callback(iterate)
        converged = norms[active] <= tolerances[active]
        if (singular & ~converged).any():
            reason = "singular"
        finished = converged | singular | (gamma_new == 0)
        v, v_old, z, w, w_old = v_new, v, z_new, w_new, w
        gamma, gamma_old = gamma_new, gamma
        if run.due():
            run.save(
                {
                    "blocks": (X, v, v_old, x, w, w_old, z, r),
                    "scalars": (gamma, gamma_old, eta, c, c_old, s, s_old),
                    "columns": (norms, iterations, active, finished),
                    "ended": (reason, k),
                }
            )
    add_columns(X, active, x)
    return Correction(X, iterations, norms, np.inf, reason)


def _lengths(v: Tensor, z: Tensor, system: System) -> np.ndarray:
    """Lengths of the columns of ``v`` in the norm of ``M``, with ``z = M v``."""
    if not system.preconditioned:
        return column_norms(v)
    dots = column_dots(v, z)
    if not (dots >= 0).all():
        refuse_preconditioner(dots, v, system)
    return np.sqrt(np.maximum(dots, 0))

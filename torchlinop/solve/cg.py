r"""Conjugate gradients, for one right-hand side and for a block of them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from torchlinop._checkpoint import Run, placed
from torchlinop.solve.columns import (
    add_columns,
    column_dots,
    column_norms,
    dot,
    require_finite_iteration,
)
from torchlinop.solve.directions import (
    inverse_of,
    orthonormalized,
    picked,
    refuse_indefinite,
    widened,
)
from torchlinop.solve.inverse import KrylovInverse
from torchlinop.solve.preconditioner import refuse_preconditioner
from torchlinop.solve.restart import Callback, Correction
from torchlinop.solve.system import System


class CGInverseLinearOperator(KrylovInverse):
    r"""Inverse of a symmetric positive definite matrix by conjugate gradients.

    .. math:: (A + \delta I)^{-1}

    A product with ``K`` vectors solves for all of them in one Krylov space (block
    conjugate gradients), which needs fewer products than ``K`` solves. A column stops
    when it has converged.

    Parameters
    ----------
    A
        Hermitian and, with the damping, positive definite: an operator, a matrix, a
        sparse matrix, shape ``(N, N)``.
    damping
        :math:`\delta`, added to the diagonal.
    rtol, atol
        A column has converged when :math:`\|b - A x\|_2` is at most the larger of
        ``rtol`` :math:`\|b\|_2` and ``atol``.
    maxiter
        Most iterations; by default ``10 N``, as in SciPy.
    M
        Preconditioner: positive definite, close to the inverse of :math:`A + \delta I`;
        an operator or a matrix.
    x0
        Where every solve starts, shape ``(N,)`` or ``(N, K)``; by default at zero.
    callback
        Called after each iteration with the current iterate, a torch tensor of shape
        ``(N,)``, or ``(N, K)`` for several right-hand sides (of which 128 at most are
        solved for together).
    checkpoint
        A file, or a :class:`~torchlinop.Checkpoint`, from which a product that was killed
        goes on, with the same right-hand sides and options; ``maxiter`` may be raised. It
        is for one product, and costs one more with ``A`` and with ``M``.
    on_failure
        What happens if a column does not converge: ``"warn"`` (a
        :class:`~torchlinop.ConvergenceWarning`), ``"raise"`` (a
        :class:`~torchlinop.ConvergenceError`) or ``"ignore"``.

    Attributes
    ----------
    last_solve : SolveReport or None
        Iterations, residual norms and converged columns of the last product.

    Raises
    ------
    NegativeCurvatureError
        In a product, when the matrix turns out not to be positive definite.
    StoredFileError
        In a product, when the checkpoint is of another one, or truncated.

    Notes
    -----
    The residual norms of the report are true ones: they are computed at the end, and the
    iteration starts anew from them if need be. Only without ``M`` and ``x0``, where the
    norm of the solution shows that the recurrences cannot be far off, this product is
    saved.

    References
    ----------
    Hestenes and Stiefel, "Methods of conjugate gradients for solving linear systems",
    J. Res. Nat. Bur. Standards 49 (1952), https://doi.org/10.6028/jres.049.044.
    Blocks: Ji and Li, "A breakdown-free block conjugate gradient method", BIT 57 (2017),
    https://doi.org/10.1007/s10543-016-0631-z.

    Examples
    --------
    >>> import torch
    >>> from torchlinop import CGInverseLinearOperator
    >>> inverse = CGInverseLinearOperator(torch.eye(2), damping=1.0)
    >>> inverse @ torch.tensor([6.0, 8.0])
    tensor([3., 4.])
    >>> print(inverse.last_solve)
    CG: 1 of 1 column converged
      iterations     1
      products       1
      residual norm  0.00e+00 (wanted 1.00e-04)
    """

    solver = "CG"
    basis_share = 1.0  # one space for columns that depend on each other breaks down

    def _iterate(
        self,
        system: System,
        B: Tensor,
        tolerances: np.ndarray,
        maxiter: int,
        callback: Callback | None,
        run: Run,
    ) -> Correction:
        method = conjugate_gradients if B.shape[1] == 1 else block_conjugate_gradients
        return method(system, B, tolerances, maxiter, callback, run)


def conjugate_gradients(
    system: System,
    B: Tensor,
    tolerances: np.ndarray,
    maxiter: int,
    callback: Callback | None,
    run: Run,
) -> Correction:
    """Solve for one column ``(N, 1)``; see :class:`Iteration`.

    A ``run`` with a state goes on from that.
    """
    x, r = torch.zeros_like(B), B.clone(memory_format=torch.contiguous_format)
    tolerance = float(tolerances[0])
    norm, shortest, reason, k = 0.0, np.inf, "", 0
    z = system.precondition(r)
    p = z.clone()
    rr = dot(r, r)
    residual_norm = rr**0.5
    rz = dot(r, z) if system.preconditioned else rr
    if run.state is not None:
        before = placed(run.state, B.device)
        x, r, p = before["x"], before["r"], before["p"]
        rz, residual_norm, norm, shortest, k = before["numbers"]
    while residual_norm > tolerance and k < maxiter:
        if not rz > 0:
            refuse_preconditioner(np.array([rz]), r, system)
            reason = "preconditioner"
            break
        q = system.product(p)
        curvature = dot(p, q)
        if not curvature > 0:
            require_finite_iteration(np.array([curvature]), "CG", k + 1)
            refuse_indefinite(p, system)
            reason = "singular"
            break
        if k < 4 or k % 8 == 0:
            # |A p|^2 / p^H A p is a lower bound of the largest eigenvalue
            norm = max(norm, dot(q, q) / curvature)
        step = rz / curvature
        shortest = min(shortest, step)
        if step * system.eps**1.5 > shortest:  # no matrix of this precision has both
            reason = "singular"
            break
        x.add_(p, alpha=step)
        r.sub_(q, alpha=step)
        k += 1
        rr = dot(r, r)
        residual_norm = rr**0.5
        require_finite_iteration(np.array([residual_norm]), "CG", k)
        if callback is not None:
            callback(x)
        if residual_norm <= tolerance:
            break
        z = system.precondition(r)
        previous = rz
        rz = dot(r, z) if system.preconditioned else rr
        torch.add(z, p, alpha=rz / previous, out=p)
        if run.due():
            numbers = rz, residual_norm, norm, shortest, k
            run.save({"x": x, "r": r, "p": p, "numbers": numbers})
    return Correction(x, np.array([k]), np.array([residual_norm]), norm, reason)


def block_conjugate_gradients(
    system: System,
    B: Tensor,
    tolerances: np.ndarray,
    maxiter: int,
    callback: Callback | None,
    run: Run,
) -> Correction:
    """Solve for all columns ``(N, K)`` in one Krylov space.

    The search directions are orthonormalized in every step, and those that depend on the
    others are dropped; so are the residuals of columns that have converged. Blocks are
    held as rows here, ``(K, N)``: one vector after another in memory. A ``run`` with a
    state goes on from that.
    """
    X, R = torch.zeros_like(B.T), B.T.clone(memory_format=torch.contiguous_format)
    norms = column_norms(R.T)
    iterations = np.zeros(len(norms), dtype=int)
    active = np.flatnonzero(norms > tolerances)
    R = picked(R, active)
    D = torch.zeros_like(R)  # what the active rows of X have become
    norm, reason, k = 0.0, "", 0
    if run.state is None:
        P = orthonormalized(_preconditioned(system, R).clone(), system.eps)
    else:
        before = placed(run.state, B.device)
        X, R, D, P = before["blocks"]
        norms, iterations, active = before["columns"]
        norm, k = before["numbers"]
    spare: Tensor | None = None
    while len(active) and len(P) and k < maxiter:
        Q = system.product(P.T).T
        k += 1
        curvature = (P.conj() @ Q.T).to(widened(P.dtype))
        largest = curvature.diagonal().real.max().item()
        require_finite_iteration(np.array([largest]), "CG", k)
        norm = max(norm, largest)
        solve = inverse_of(curvature, P, norm, system)
        if solve is None:
            reason = "singular"
            break
        steps = solve(P.conj() @ R.T).T
        D.addmm_(steps, P)
        R.addmm_(steps, Q, alpha=-1)
        norms[active] = column_norms(R.T)
        require_finite_iteration(norms, "CG", k)
        iterations[active] = k
        if callback is not None:
            iterate = X.clone()
            add_columns(iterate.T, active, D.T)
            callback(iterate.T)
        left = np.flatnonzero(norms[active] > tolerances[active])
        if len(left) < len(active):
            done = np.setdiff1d(np.arange(len(active)), left)
            add_columns(X.T, active[done], picked(D, done).T)
            active, R, D = active[left], picked(R, left), picked(D, left)
            if not len(active):
                break
        Z = _preconditioned(system, R)
        conjugation = solve(Q.conj() @ Z.T).T
        if spare is None or spare.shape != Z.shape:
            spare = torch.empty_like(Z, memory_format=torch.contiguous_format)
        conjugate = torch.addmm(Z, conjugation, P, alpha=-1, out=spare)
        reuse = P if P.shape == conjugate.shape else None
        P = orthonormalized(conjugate, system.eps, out=reuse)
        spare = conjugate if P is reuse else None
        if run.due():
            columns = norms, iterations, active
            run.save({"blocks": (X, R, D, P), "columns": columns, "numbers": (norm, k)})
    add_columns(X.T, active, D.T)
    if len(active) and not len(P) and system.preconditioned:
        reason = "preconditioner"
    return Correction(X.T, iterations, norms, norm, reason)


def _preconditioned(system: System, R: Tensor) -> Tensor:
    """Return the preconditioned rows; those given where there is no preconditioner."""
    if not system.preconditioned:
        return R
    Z = system.precondition(R.T).T
    dots = column_dots(R.T, Z.T)
    if not (dots > 0).all():
        refuse_preconditioner(dots, R.T, system)
    return Z

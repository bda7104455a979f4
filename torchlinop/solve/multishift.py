r"""One Krylov space for many dampings: multi-shift conjugate gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchlinop._interchange import import_array
from torchlinop._operator import TorchLinearOperator
from torchlinop._typing import Array
from torchlinop.solve.arguments import (
    at_least_zero,
    count,
    finite,
    one_of_failures,
    square_operator,
)
from torchlinop.solve.columns import (
    column_dots,
    column_norms,
    column_sizes,
    divided,
    require_finite_columns,
    require_finite_iteration,
    row,
)
from torchlinop.solve.directions import refuse_indefinite
from torchlinop.solve.report import OnFailure, SolveReport, judge
from torchlinop.solve.system import System


def multishift_cg(
    A: Any,
    B: Array,
    shifts: Sequence[float],
    *,
    rtol: float = 1e-5,
    atol: float = 0.0,
    maxiter: int | None = None,
    on_failure: OnFailure = "warn",
) -> tuple[Array, SolveReport]:
    r"""Solve :math:`(A + \sigma_i I) x_i = b` for all shifts by the products of one solve.

    The Krylov space of ``A`` and ``b`` does not depend on the shift. The number of
    products is that of conjugate gradients for the smallest shift; there can be no
    preconditioner.

    Parameters
    ----------
    A
        Hermitian, positive definite with the smallest shift: an operator or a matrix of
        shape ``(N, N)``.
    B
        Right-hand sides, shape ``(N,)`` or ``(N, K)``, an array of any kind.
    shifts
        :math:`\sigma_i`, ``S`` numbers.
    rtol, atol
        A solution has converged when its residual norm is at most the larger of
        ``rtol`` :math:`\|b\|_2` and ``atol``.
    maxiter
        Most iterations, by default ``10 N``.
    on_failure
        What happens if a solution does not converge: ``"warn"``, ``"raise"`` or
        ``"ignore"``.

    Returns
    -------
    X
        Shape ``(S, N)`` or ``(S, N, K)``, of the kind of ``B``.
    report : SolveReport
        Its columns are the ``K`` right-hand sides of the first shift, then those of the
        second, and so on.

    Raises
    ------
    NegativeCurvatureError
        The matrix with the smallest shift is not positive definite.

    References
    ----------
    Jegerlehner, "Krylov space solvers for shifted linear systems" (1996),
    https://arxiv.org/abs/hep-lat/9612014

    Examples
    --------
    >>> import torch
    >>> from torchlinop import multishift_cg
    >>> A = torch.diag(torch.tensor([1.0, 3.0]))
    >>> X, report = multishift_cg(A, torch.ones(2), [1.0, 3.0])
    >>> X
    tensor([[0.5000, 0.2500],
            [0.2500, 0.1667]])
    """
    A = square_operator(A, "Multi-shift CG")
    sigma = np.array([finite("shifts", s) for s in shifts], dtype=float)
    if not len(sigma):
        raise ValueError("shifts is empty: there is nothing to solve.")
    rtol, atol = at_least_zero("rtol", rtol), at_least_zero("atol", atol)
    maxiter = 10 * A.shape[0] if maxiter is None else count("maxiter", maxiter)
    on_failure = one_of_failures(on_failure)
    tensor, export = import_array(B, A.device, A.torch_dtype)
    if tensor.ndim not in (1, 2) or tensor.shape[0] != A.shape[0]:
        raise ValueError(
            f"B has to have shape (N,) or (N, K) with N = {A.shape[0]}, got "
            f"{tuple(tensor.shape)}."
        )
    block = tensor.unsqueeze(1) if tensor.ndim == 1 else tensor
    split = block.is_complex() and not A.torch_dtype.is_complex
    if split:
        block = torch.cat([block.real, block.imag], dim=1)
    block = block.to(A.torch_dtype)
    require_finite_columns(column_norms(block), "The right-hand side")
    sizes, units = column_sizes(block)
    X, report = _solve(A, block, sizes, units, sigma, rtol, atol, maxiter)
    judge(report, X.movedim(0, 1).flatten(1), on_failure)
    if split:
        X = torch.complex(*X.chunk(2, dim=2))
    return export((X.squeeze(2) if tensor.ndim == 1 else X).contiguous()), report


def _solve(
    A: TorchLinearOperator,
    B: Tensor,
    sizes: Tensor,
    units: np.ndarray,
    sigma: np.ndarray,
    rtol: float,
    atol: float,
    maxiter: int,
) -> tuple[Tensor, SolveReport]:
    """Iterate on the smallest shift and carry the others along.

    The residual of another shift is ``zeta`` times that of the smallest; scalars are
    arrays ``(S, K)``. Right-hand sides are in units of their sizes.
    """
    B = divided(B, sizes)
    base = float(sigma.min())
    tau = (sigma - base)[:, None]
    system = System(A, base)
    b_norms = column_norms(B)
    tolerances = np.broadcast_to(
        np.maximum(rtol * b_norms, atol / units), (len(sigma), len(b_norms))
    )
    goal = np.maximum(tolerances, system.eps * b_norms)  # the recurrences shrink for ever
    X = B.new_zeros(len(sigma), *B.shape)
    P = B.expand(X.shape).clone()
    r, p = B.clone(), B.clone()
    zeta_old = np.ones_like(tolerances)
    zeta, alpha_old, beta_old = np.ones_like(tolerances), np.ones_like(b_norms), 0 * b_norms
    rr = column_dots(r, r)
    norms = np.broadcast_to(b_norms, tolerances.shape).copy()
    iterations = np.zeros(tolerances.shape, dtype=int)
    norm, reason, k = 0.0, "", 0
    tiny = np.finfo(float).tiny
    while True:
        going = norms > goal
        columns = going.any(axis=0)
        if not columns.any():
            break
        if k == maxiter:
            reason = "maxiter"
            break
        q = system.product(p)
        curvature = column_dots(p, q)
        require_finite_iteration(curvature, "Multi-shift CG", k + 1)
        norm = max(norm, float((column_norms(q) / np.maximum(column_norms(p), tiny)).max()))
        flat = columns & ~(curvature > 0)
        if flat.any():
            worst = int(np.flatnonzero(flat)[0])
            refuse_indefinite(p[:, worst], system)
            reason = "singular"
            break
        k += 1
        safe = np.where(columns, curvature, 1.0)
        alpha = np.where(columns, rr / safe, 0.0)
        denominator = alpha * beta_old * (zeta_old - zeta) + zeta_old * alpha_old * (
            1 + tau * alpha
        )
        zeta_new = np.where(
            going, zeta * zeta_old * alpha_old / np.where(going, denominator, 1), zeta
        )
        ratio = np.where(going, zeta_new / np.where(zeta != 0, zeta, 1), 0.0)
        X.add_(P * _grid(alpha * ratio, X))
        r.sub_(q * row(alpha, r))
        rr_new = column_dots(r, r)
        beta = np.where(columns & (rr > 0), rr_new / np.where(rr > 0, rr, 1), 0.0)
        P.mul_(_grid(np.where(going, beta * ratio**2, 0.0), P)).add_(
            r * _grid(np.where(going, zeta_new, 0.0), P)
        )
        p = p.mul_(row(beta, p)).add_(r)
        norms = np.where(going, np.abs(zeta_new) * np.sqrt(rr_new), norms)
        require_finite_iteration(norms, "Multi-shift CG", k)
        iterations[going] = k
        zeta_old, zeta = np.where(going, zeta, zeta_old), zeta_new
        alpha_old, beta_old, rr = alpha, beta, rr_new
    # the recurrences and the true residuals may have parted
    lengths = np.array([column_norms(x) for x in X])
    gap = system.eps * norm * lengths
    doubtful = (gap > 0.5 * tolerances) & (norms <= goal)
    returned = X * sizes
    back = divided(returned, sizes)
    outside = (back != X).any(dim=1).cpu().numpy()  # of the range of the dtype
    for i in np.flatnonzero((doubtful | outside).any(axis=1)):
        residual = B - system.product(back[i]) - float(tau[i, 0]) * back[i]
        norms[i] = np.nan_to_num(column_norms(residual), nan=np.inf)
        if (norms[i] > tolerances[i]).any():
            reason = reason or ("range" if outside[i].any() else "rounding")
    converged = norms <= tolerances
    if not converged.all():
        reason = reason or "rounding"
    report = SolveReport(
        solver="Multi-shift CG",
        iterations=iterations.reshape(-1),
        residual_norms=(norms * units).reshape(-1),
        tolerances=(tolerances * units).reshape(-1),
        converged=converged.reshape(-1),
        num_matvecs=system.num_matvecs,
        reason=reason,
    )
    return returned, report


def _grid(coefficients: np.ndarray, like: Tensor) -> Tensor:
    """Coefficients ``(S, K)`` for products with ``(S, N, K)`` tensors."""
    grid = torch.as_tensor(coefficients, dtype=like.dtype, device=like.device)
    return grid.unsqueeze(1)

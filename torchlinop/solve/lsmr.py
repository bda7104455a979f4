r"""LSMR, for rectangular matrices and least squares."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from torchlinop._operator import TorchLinearOperator, aslinearoperator
from torchlinop._typing import Array
from torchlinop.solve.arguments import (
    at_least_zero,
    count,
    one_for_each_column,
    one_of_failures,
    starting_vectors,
)
from torchlinop.solve.columns import (
    add_columns,
    column_norms,
    column_sizes,
    divided,
    require_finite_columns,
    require_finite_iteration,
    row,
    take,
)
from torchlinop.solve.report import OnFailure, SolveReport, judge
from torchlinop.solve.restart import Callback


class LSMRInverseLinearOperator(TorchLinearOperator):
    r"""Pseudo-inverse of any matrix by LSMR, shape ``(N, M)`` for an ``(M, N)`` matrix.

    .. math:: \arg\min_x \|A x - b\|_2^2 + \lambda^2 \|x\|_2^2
              = (A^H A + \lambda^2 I)^{-1} A^H b

    For a singular problem the solution of least norm. A product with several vectors
    iterates on all of them at once.

    Parameters
    ----------
    A
        An operator, a matrix, a sparse matrix, shape ``(M, N)``.
    damp
        :math:`\lambda`, as in :func:`scipy.sparse.linalg.lsmr`.
    atol, btol
        A column has converged when :math:`\|r\| \le` ``btol`` :math:`\|b\| +` ``atol``
        :math:`\|A\| \|x\|`, or :math:`\|A^H r\| \le` ``atol`` :math:`\|A\| \|r\|`, with
        :math:`r` the residual of the damped problem.
    conlim
        A column stops when the estimate of the condition number exceeds this; 0 is no
        limit.
    maxiter
        Most iterations, by default ``4 min(M, N)``.
    x0
        Where every solve starts, shape ``(N,)`` or ``(N, K)``. With damping it is the
        distance from ``x0`` that is damped.
    callback
        Called after each iteration with the current iterate, a torch tensor of shape
        ``(N,)``, or ``(N, K)`` for several right-hand sides.
    on_failure
        What happens if a column does not converge: ``"warn"``, ``"raise"`` or
        ``"ignore"``.

    Attributes
    ----------
    last_solve : SolveReport or None
        Iterations, true residual norms and converged columns of the last product.

    References
    ----------
    Fong and Saunders, "LSMR: an iterative algorithm for sparse least-squares problems",
    SIAM J. Sci. Comput. 33 (2011), https://doi.org/10.1137/10079687X

    Examples
    --------
    >>> import torch
    >>> from torchlinop import LSMRInverseLinearOperator
    >>> inverse = LSMRInverseLinearOperator(torch.tensor([[1.0], [1.0]]))
    >>> inverse @ torch.tensor([1.0, 3.0])
    tensor([2.])
    """

    solver = "LSMR"

    def __init__(
        self,
        A: Any,
        *,
        damp: float = 0.0,
        atol: float = 1e-6,
        btol: float = 1e-6,
        conlim: float = 1e8,
        maxiter: int | None = None,
        x0: Array | None = None,
        callback: Callback | None = None,
        on_failure: OnFailure = "warn",
    ) -> None:
        A = aslinearoperator(A)
        m, n = A.shape
        super().__init__((n, m), A.torch_dtype, A.device)
        self.A = A
        self._adjoint_A = A._adjoint()
        self.damp = at_least_zero("damp", damp)
        self.atol = at_least_zero("atol", atol)
        self.btol = at_least_zero("btol", btol)
        # 0 is no limit, as in SciPy
        self.conlim = at_least_zero("conlim", conlim) if 0 < conlim < np.inf else np.inf
        self.maxiter = 4 * min(m, n) if maxiter is None else count("maxiter", maxiter)
        self._x0 = None if x0 is None else starting_vectors(x0, A)
        self._callback = callback
        self.on_failure = one_of_failures(on_failure)
        self.last_solve: SolveReport | None = None

    def with_damping(self, damp: float) -> Self:
        """Return the pseudo-inverse for another ``damp``; nothing is computed."""
        inverse = copy.copy(self)
        inverse.damp = at_least_zero("damp", damp)
        inverse.last_solve = None
        return inverse

    def _apply(self, x: Tensor) -> Tensor:
        A, adjoint = self.A, self._adjoint_A
        b_norms = column_norms(x)
        require_finite_columns(b_norms, "The right-hand side")
        X0 = None if self._x0 is None else one_for_each_column(self._x0, x)
        size, units = column_sizes(x) if X0 is None else column_sizes(x, X0)
        B, b_norms = divided(x, size), b_norms / units
        X0 = None if X0 is None else divided(X0, size)
        stops = _Stops(self.damp, self.atol, self.btol, self.conlim, self.maxiter)
        rest = B if X0 is None else B - A._product(X0)
        watching = self._watching(X0, size)
        found = lsmr(A, adjoint, rest, stops, b_norms=b_norms, X0=X0, callback=watching)
        exact = found.solution if X0 is None else found.solution.add_(X0)
        solution = exact * size
        X = divided(solution, size)  # as far as the dtype holds it
        outside = not torch.equal(X, exact)
        offset = X if X0 is None else X - X0
        R = B - A._product(X)
        normal = column_norms(adjoint._product(R).sub_(offset, alpha=self.damp**2))
        damped = self.damp * column_norms(offset) if self.damp else 0.0
        residual = np.nan_to_num(np.hypot(column_norms(R), damped), nan=np.inf)
        # what rounding leaves of A^H r, whatever is asked for
        eps = torch.finfo(x.dtype).eps
        lengths = np.nan_to_num(column_norms(X))
        floor = 4 * eps * found.norms * (b_norms + found.norms * lengths)
        normal_goal = self.atol * found.norms * np.nan_to_num(residual, posinf=0)
        normal_tolerances = np.maximum(normal_goal, floor)
        # the recurrences stopped it; true residuals have to agree but for a little drift
        right = (residual <= 2 * found.tolerances) | (normal <= 2 * normal_tolerances)
        converged = found.converged & right
        reason = found.reason
        if (found.converged & ~right).any() and not reason:
            reason = "range" if outside else "rounding"
        report = SolveReport(
            solver=self.solver,
            iterations=found.iterations,
            residual_norms=residual * units,
            tolerances=found.tolerances * units,
            converged=converged,
            num_matvecs=found.num_matvecs + 2 * R.shape[1],
            reason=reason,
            normal_residual_norms=np.nan_to_num(normal, nan=np.inf) * units,
            normal_tolerances=normal_tolerances * units,
        )
        self.last_solve = report
        judge(report, solution, self.on_failure)
        return solution

    def _watching(self, X0: Tensor | None, size: Tensor) -> Callback | None:
        callback = self._callback
        if callback is None:
            return None

        def show(D: Tensor) -> None:
            iterate = (D if X0 is None else D + X0) * size
            callback(iterate[:, 0] if iterate.shape[1] == 1 else iterate)

        return show

    def _adjoint(self) -> TorchLinearOperator:
        # the transposed pseudo-inverse solves the transposed problem with the same damp
        return LSMRInverseLinearOperator(
            self._adjoint_A,
            damp=self.damp,
            atol=self.atol,
            btol=self.btol,
            conlim=self.conlim,
            maxiter=self.maxiter,
            on_failure=self.on_failure,
        )


class _Stops(NamedTuple):
    damp: float
    atol: float
    btol: float
    conlim: float
    maxiter: int


class _Found(NamedTuple):
    solution: Tensor
    iterations: np.ndarray
    tolerances: np.ndarray
    #: (K,), estimates of the norm of the matrix
    norms: np.ndarray
    converged: np.ndarray
    num_matvecs: int
    reason: str


def lsmr(
    A: TorchLinearOperator,
    adjoint: TorchLinearOperator,
    B: Tensor,
    stops: _Stops,
    *,
    b_norms: np.ndarray,
    X0: Tensor | None = None,
    callback: Callback | None = None,
) -> _Found:
    """Solve for all columns at once, for a correction of ``X0``.

    Vectors are blocks with a column for each right-hand side, scalars arrays ``(K,)``.
    The names are those of the paper's section 2.8 and 3.
    """
    damp, atol, btol, conlim, maxiter = stops
    X = B.new_zeros(A.shape[1], B.shape[1])
    size = len(b_norms)
    iterations, matvecs, reason = np.zeros(size, dtype=int), 0, ""
    tolerances, matrix_norms = btol * b_norms, np.zeros(size)
    converged = np.zeros(size, dtype=bool)
    active = np.arange(size)
    beta = column_norms(B)
    u = B * row(_reciprocal(beta), B)
    v = adjoint._product(u)
    matvecs += size
    alpha = column_norms(v)
    v.mul_(row(_reciprocal(alpha), v))
    x, h, hbar = torch.zeros_like(v), v.clone(), torch.zeros_like(v)
    one, zero = np.ones(size), np.zeros(size)
    s = {
        "alpha": alpha, "alphabar": alpha, "zetabar": alpha * beta, "b_norm": b_norms,
        "rho": one, "rhobar": one, "cbar": one, "sbar": zero,
        "betadd": beta, "betad": zero, "rhodold": one, "tautildeold": zero,
        "thetatilde": zero, "zeta": zero, "d": zero,
        "normA": alpha, "maxrbar": zero, "minrbar": np.full(size, np.inf),
    }  # fmt: skip
    # b = 0, or orthogonal to the range; or a start that is good enough
    converged[(s["zetabar"] == 0) | (beta <= tolerances)] = True
    finished = converged.copy()
    k = 0
    while k < maxiter:
        if finished.any():
            add_columns(X, active[finished], take(x, np.flatnonzero(finished)))
            left = np.flatnonzero(~finished)
            active = active[left]
            u, v, x, h, hbar = (take(block, left) for block in (u, v, x, h, hbar))
            s = {name: values[left] for name, values in s.items()}
        if not len(active):
            break
        k += 1
        # bidiagonalization
        u = A._product(v).sub_(u * row(s["alpha"], u))
        beta = column_norms(u)
        u.mul_(row(_reciprocal(beta), u))
        v = adjoint._product(u).sub_(v * row(beta, v))
        alpha = column_norms(v)
        v.mul_(row(_reciprocal(alpha), v))
        matvecs += 2 * len(active)
        require_finite_iteration(alpha + beta, "LSMR", k)

        # rotations that make the problem triangular, twice
        chat, shat, alphahat = _rotation(s["alphabar"], np.full_like(beta, damp))
        c, sine, rho = _rotation(alphahat, beta)
        theta = sine * alpha
        thetabar, rhotemp = s["sbar"] * rho, s["cbar"] * rho
        cbar, sbar, rhobar = _rotation(rhotemp, theta)
        zeta, zetabar = cbar * s["zetabar"], -sbar * s["zetabar"]

        # quotients first: products of two norms may leave the range of float64
        past = thetabar * _reciprocal(s["rhobar"]) * (rho * _reciprocal(s["rho"]))
        hbar = h - hbar.mul_(row(past, h))
        x.add_(hbar * row(zeta * _reciprocal(rho) * _reciprocal(rhobar), x))
        h = v - h.mul_(row(theta * _reciprocal(rho), h))

        # norm of the residual of the damped problem
        betaacute, betacheck = chat * s["betadd"], -shat * s["betadd"]
        betahat, betadd = c * betaacute, -sine * betaacute
        ctilde, stilde, rhotilde = _rotation(s["rhodold"], thetabar)
        thetatilde, rhod = stilde * rhobar, ctilde * rhobar
        betad = -stilde * s["betad"] + ctilde * betahat
        tautilde = (s["zeta"] - s["thetatilde"] * s["tautildeold"]) * _reciprocal(rhotilde)
        taud = (zeta - thetatilde * tautilde) * _reciprocal(rhod)
        d = np.hypot(s["d"], betacheck)
        r_norm = np.hypot(np.hypot(d, betad - taud), betadd)

        normA = np.hypot(s["normA"], beta)
        maxrbar = np.maximum(s["maxrbar"], s["rhobar"]) if k > 1 else s["maxrbar"]
        minrbar = np.minimum(s["minrbar"], s["rhobar"]) if k > 1 else s["minrbar"]
        condition = np.maximum(maxrbar, rhotemp) * _reciprocal(np.minimum(minrbar, rhotemp))
        s = {
            "alpha": alpha, "alphabar": c * alpha, "zetabar": zetabar,
            "b_norm": s["b_norm"], "rho": rho, "rhobar": rhobar, "cbar": cbar,
            "sbar": sbar, "betadd": betadd, "betad": betad, "rhodold": rhod,
            "tautildeold": tautilde, "thetatilde": thetatilde, "zeta": zeta, "d": d,
            "normA": np.hypot(normA, alpha), "maxrbar": maxrbar, "minrbar": minrbar,
        }  # fmt: skip
        iterations[active] = k
        if callback is not None:
            shown = X.clone()
            add_columns(shown, active, x)
            callback(shown)
        iterate = x if X0 is None else x + take(X0, active)
        goal = btol * s["b_norm"] + atol * normA * column_norms(iterate)
        eps = torch.finfo(x.dtype).eps
        normal_goal = max(atol, eps) * normA * r_norm
        tolerances[active], matrix_norms[active] = goal, normA
        converged[active] = (
            (r_norm <= goal)
            | (np.abs(zetabar) <= normal_goal)
            | (r_norm <= eps * s["b_norm"])
        )
        hopeless = (condition > conlim) & ~converged[active]
        if hopeless.any():
            reason = "conlim"
        finished = converged[active] | hopeless
    add_columns(X, active, x)
    if not converged.all() and not reason:
        reason = "maxiter"
    return _Found(X, iterations, tolerances, matrix_norms, converged, matvecs, reason)


def _rotation(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cosine, sine and length that rotate ``(a, b)`` to ``(length, 0)``."""
    length = np.hypot(a, b)
    return np.where(length > 0, a * _reciprocal(length), 1), b * _reciprocal(length), length


def _reciprocal(a: np.ndarray) -> np.ndarray:
    """``1 / a``, and 0 where ``a`` is 0."""
    return np.where(a != 0, 1 / np.where(a != 0, a, 1), 0.0)

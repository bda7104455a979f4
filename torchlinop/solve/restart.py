"""From an iterative method to solutions with true residuals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from torchlinop.solve.basis import basis_of
from torchlinop.solve.columns import (
    add_columns,
    column_norms,
    require_finite_columns,
    require_finite_iteration,
    take,
)
from torchlinop.solve.system import System

Callback = Callable[[Tensor], Any]


class Correction(NamedTuple):
    """What an iteration found, starting from zero."""

    #: (N, K)
    solution: Tensor
    #: (K,)
    iterations: np.ndarray
    #: (K,), as the iteration's own recurrences have them
    residual_norms: np.ndarray
    #: an estimate, from below, of the norm of the matrix; infinite where there is none
    norm: float
    #: why it stopped early, or empty
    reason: str = ""


class Iteration(Protocol):
    """A Krylov method that solves ``system X = B`` from zero."""

    def __call__(
        self,
        system: System,
        B: Tensor,
        tolerances: np.ndarray,
        maxiter: int,
        callback: Callback | None,
    ) -> Correction:
        """Iterate until the residual norms reach ``tolerances``.

        Parameters
        ----------
        B
            Right-hand sides, shape ``(N, K)``, not to be written to.
        tolerances
            Shape ``(K,)``; a column stops when its residual norm is at most this.
        maxiter
            Most iterations.
        callback
            Called with the ``(N, K)`` iterate after each iteration.
        """


class Method(NamedTuple):
    """A system of equations and how it is solved."""

    iterate: Iteration
    name: str
    system: System
    maxiter: int
    #: the part of the columns that a basis of them may have to be solved for instead
    basis_share: float


class Solution(NamedTuple):
    """Solutions ``(N, K)``, and for each its iterations and its residual norm."""

    X: Tensor
    iterations: np.ndarray
    norms: np.ndarray
    #: why not all residuals have reached their tolerances
    reason: str


def solve(
    method: Method,
    B: Tensor,
    X0: Tensor | None,
    tolerances: np.ndarray,
    callback: Callback | None,
) -> Solution:
    """Solve for columns of which none is a combination of others, and combine.

    Parameters
    ----------
    B, X0
        Right-hand sides and starting vectors or None, shape ``(N, K)``.
    tolerances
        What the residual norms have to reach, shape ``(K,)``.
    callback
        Called with each iterate, shape ``(N, K)``.
    """
    X = torch.zeros_like(B) if X0 is None else X0.clone()
    R = B if X0 is None else B - method.system.product(X0)
    norms = column_norms(R)
    require_finite_columns(norms, "The residual of x0")
    left = np.flatnonzero(norms > tolerances)
    residuals = take(R, left)
    basis = basis_of(residuals, norms[left], tolerances[left])
    if basis is None or len(basis.columns) > method.basis_share * len(left):
        return _improve(method, B, X0, (X, R, norms), tolerances, callback)
    combine = torch.as_tensor(basis.combinations, dtype=B.dtype, device=B.device)

    def show(D: Tensor) -> None:
        if callback is not None:
            callback(X.index_add(1, torch.as_tensor(left, device=X.device), D @ combine))

    chosen = take(residuals, basis.columns)
    start = torch.zeros_like(chosen), chosen, norms[left][basis.columns]
    found = _improve(
        method, chosen, None, start, basis.tolerances, show if callback else None
    )
    add_columns(X, left, found.X @ combine)
    iterations = np.zeros(len(norms), dtype=int)
    used = np.abs(basis.combinations) > 0
    iterations[left] = (used * found.iterations[:, None]).max(axis=0)
    # of those that were not solved for, the true residuals
    norms[left[basis.columns]] = found.norms
    check = left if X0 is not None else np.delete(left, basis.columns)
    R = take(B, check) - method.system.product(take(X, check).contiguous())
    norms[check] = column_norms(R)
    require_finite_iteration(norms, method.name, int(iterations.max()))
    rest = np.flatnonzero(norms[check] > tolerances[check])
    if not len(rest):
        return Solution(X, iterations, norms, found.reason)
    check = check[rest]
    some = take(X, check)
    again = _improve(
        method._replace(maxiter=method.maxiter - int(iterations[check].max())),
        take(B, check),
        some,
        (some.clone(), take(R, rest), norms[check]),
        tolerances[check],
        None,
    )
    X[:, torch.as_tensor(check, device=X.device)] = again.X
    iterations[check] += again.iterations
    norms[check] = again.norms
    return Solution(X, iterations, norms, again.reason or found.reason)


def _improve(
    method: Method,
    B: Tensor,
    X0: Tensor | None,
    start: tuple[Tensor, Tensor, np.ndarray],
    tolerances: np.ndarray,
    callback: Callback | None,
) -> Solution:
    """Iterate, and again from the true residuals where rounding left the own ones wrong.

    ``start`` is where to: solutions, which are overwritten, residuals and their norms.
    """
    iterate, name, system, maxiter, _ = method
    X, R, norms = start
    iterations = np.zeros(len(norms), dtype=int)
    goal, reason = tolerances, ""
    seen = X0 is not None  # whether the norms are those of an iterate
    unfinished = norms > tolerances
    while not reason and unfinished.any():
        left = np.flatnonzero(unfinished)
        budget = maxiter - int(iterations[left].max())
        if budget <= 0:
            break
        old = take(X, left).clone() if seen else None
        found = iterate(
            system,
            take(R, left),
            # no cycle can do more than that
            np.maximum(goal[left], system.eps * norms[left]),
            budget,
            _watching(X, left, callback),
        )
        add_columns(X, left, found.solution)
        iterations[left] += found.iterations
        before, norms = norms, norms.copy()
        norms[left], reason = found.residual_norms, found.reason
        lengths = column_norms(X)
        require_finite_iteration(lengths, name, int(iterations.max()))
        # recurrences and true residuals drift apart by about eps |A| |x| (Greenbaum,
        # SIAM J. Matrix Anal. Appl. 18, 1997, doi.org/10.1137/S0895479895284944)
        # a preconditioner takes the large eigenvalues, and so |A|, out of sight
        trusted = X0 is None and not system.preconditioned and np.isfinite(found.norm)
        if trusted:
            drift = system.eps * found.norm * lengths[left]
            trusted = (drift <= 0.5 * np.maximum(norms, tolerances)[left]).all()
        if trusted and ((norms <= tolerances).all() or iterations.max() >= maxiter):
            unfinished = norms > tolerances
            continue
        R, goal = B - system.product(X), tolerances / 2
        norms = column_norms(R)
        require_finite_iteration(norms, name, int(iterations.max()))
        if old is not None:  # what was there before may have been better
            worse = np.flatnonzero(norms[left] > before[left])
            X[:, torch.as_tensor(left[worse], device=X.device)] = take(old, worse)
            norms[left[worse]] = before[left[worse]]
        seen = True
        unfinished &= (norms > tolerances) & (norms <= 0.5 * before)
    if (norms <= tolerances).all():
        reason = ""
    elif not reason:
        reason = "maxiter" if iterations.max() >= maxiter else "rounding"
    return Solution(X, iterations, norms, reason)


def _watching(X: Tensor, left: np.ndarray, callback: Callback | None) -> Callback | None:
    if callback is None:
        return None

    def show(D: Tensor) -> None:
        iterate = X.clone()
        add_columns(iterate, left, D)
        callback(iterate)

    return show

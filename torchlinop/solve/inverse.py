"""What all iterative inverses share: the system, its options, and the bookkeeping."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from torchlinop._operator import TorchLinearOperator
from torchlinop._typing import Array
from torchlinop.solve.arguments import (
    at_least_zero,
    count,
    finite,
    one_for_each_column,
    one_of_failures,
    square_operator,
    starting_vectors,
)
from torchlinop.solve.columns import (
    add_columns,
    are_moderate,
    column_norms,
    require_finite_columns,
    require_finite_iteration,
    take,
)
from torchlinop.solve.preconditioner import as_preconditioner, moved
from torchlinop.solve.report import OnFailure, SolveReport, judge
from torchlinop.solve.system import System

Callback = Callable[[Tensor], Any]

#: most right-hand sides that share one Krylov space
_MAX_BLOCK = 128


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


class KrylovInverse(TorchLinearOperator):
    """``(A + damping I)^-1`` of a Hermitian ``A`` by a Krylov method.

    Not to be made by users; the options are described at
    :class:`~torchlinop.CGInverseLinearOperator`.
    """

    #: name of the method in reports and errors
    solver: str

    def __init__(
        self,
        A: Any,
        *,
        damping: float = 0.0,
        rtol: float = 1e-5,
        atol: float = 0.0,
        maxiter: int | None = None,
        M: Any = None,
        x0: Array | None = None,
        callback: Callback | None = None,
        on_failure: OnFailure = "warn",
    ) -> None:
        A = square_operator(A, self.solver)
        super().__init__(A.shape, A.torch_dtype, A.device)
        self.A = A
        self.damping = finite("damping", damping)
        self.rtol = at_least_zero("rtol", rtol)
        self.atol = at_least_zero("atol", atol)
        self.maxiter = 10 * A.shape[0] if maxiter is None else count("maxiter", maxiter)
        self.M = as_preconditioner(M, A, "M")
        self._x0 = None if x0 is None else starting_vectors(x0, A)
        self._callback = callback
        self.on_failure = one_of_failures(on_failure)
        self.last_solve: SolveReport | None = None

    @abstractmethod
    def _iterate(
        self,
        system: System,
        B: Tensor,
        tolerances: np.ndarray,
        maxiter: int,
        callback: Callback | None,
    ) -> Correction:
        """Solve ``system X = B`` from zero until the residual norms reach ``tolerances``.

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

    def with_damping(self, damping: float) -> Self:
        """Return the inverse of ``A + damping I`` for another ``damping``.

        Nothing is computed: ``A`` with all that it keeps is shared. A
        :class:`~torchlinop.Preconditioner` is moved by the same amount, as long as its
        damping stays positive.
        """
        inverse = copy.copy(self)
        inverse.damping = finite("damping", damping)
        inverse.M = moved(self.M, inverse.damping - self.damping)
        inverse.last_solve = None
        return inverse

    def _apply(self, x: Tensor) -> Tensor:
        system = System(self.A, self.damping, self.M)
        solved = [self._solve(system, B, X0) for B, X0 in self._blocks(x)]
        norms, tolerances, iterations = (
            np.concatenate([getattr(s, name) for s in solved])
            for name in ("residual_norms", "tolerances", "iterations")
        )
        report = SolveReport(
            solver=self.solver,
            iterations=iterations,
            residual_norms=norms,
            tolerances=tolerances,
            converged=norms <= tolerances,
            num_matvecs=system.num_matvecs,
            reason=next((s.reason for s in solved if s.reason), ""),
        )
        parts = [s.solution for s in solved]
        solution = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        self.last_solve = report
        judge(report, solution, self.on_failure)
        return solution

    def _blocks(self, B: Tensor) -> list[tuple[Tensor, Tensor | None]]:
        """Cut right-hand sides and starting vectors into blocks of bounded width."""
        blocks = B.split(_MAX_BLOCK, dim=1)
        if self._x0 is None:
            return [(block, None) for block in blocks]
        starts = one_for_each_column(self._x0, B).split(_MAX_BLOCK, dim=1)
        return list(zip(blocks, starts, strict=True))

    def _solve(self, system: System, B: Tensor, X0: Tensor | None) -> _Solved:
        """Solve for one block; start anew where rounding left the recurrences wrong."""
        b_norms = column_norms(B)
        require_finite_columns(b_norms, "The right-hand side")
        tolerances = np.maximum(self.rtol * b_norms, self.atol)
        iterations = np.zeros(B.shape[1], dtype=int)
        if X0 is None:
            X, R, norms = torch.zeros_like(B), B, b_norms
        else:
            X = X0.clone()
            X[:, torch.as_tensor(b_norms == 0, device=X.device)] = 0
            R = B - system.product(X)
            norms = column_norms(R)
            require_finite_columns(norms, "The residual of x0")
        goal, reason = tolerances, ""
        while not reason and (norms > tolerances).any():
            left = np.flatnonzero(norms > tolerances)
            budget = self.maxiter - int(iterations[left].max())
            if budget <= 0:
                reason = "maxiter"
                break
            found = self._iterate_scaled(
                system,
                take(R, left),
                norms[left],
                goal[left],
                budget,
                self._watching(X, left),
            )
            add_columns(X, left, found.solution)
            iterations[left] += found.iterations
            before, norms = norms, norms.copy()
            norms[left], reason = found.residual_norms, found.reason
            lengths = column_norms(X)
            require_finite_iteration(lengths, self.solver, int(iterations.max()))
            # recurrences and true residuals drift apart by about eps |A| |x| (Greenbaum,
            # SIAM J. Matrix Anal. Appl. 18, 1997, doi.org/10.1137/S0895479895284944)
            # a preconditioner takes the large eigenvalues, and so |A|, out of sight
            trusted = X0 is None and not system.preconditioned and np.isfinite(found.norm)
            if trusted:
                drift = system.eps * found.norm * lengths[left]
                trusted = (drift <= 0.5 * np.maximum(norms, tolerances)[left]).all()
            if trusted and (
                (norms <= tolerances).all() or iterations.max() >= self.maxiter
            ):
                continue
            R, goal = B - system.product(X), tolerances / 2
            norms = column_norms(R)
            require_finite_iteration(norms, self.solver, int(iterations.max()))
            if ((norms > tolerances) & (norms > 0.5 * before)).any() and not reason:
                reason = "maxiter" if iterations.max() >= self.maxiter else "rounding"
        if (norms <= tolerances).all():
            reason = ""
        return _Solved(X, iterations, norms, tolerances, reason)

    def _iterate_scaled(
        self,
        system: System,
        B: Tensor,
        norms: np.ndarray,
        tolerances: np.ndarray,
        maxiter: int,
        callback: Callback | None,
    ) -> Correction:
        """Iterate on columns of moderate size where squares might under- or overflow."""
        if are_moderate(norms):
            return self._iterate(system, B, tolerances, maxiter, callback)
        largest = B.abs().amax(dim=0)
        sizes = largest.double().cpu().numpy()

        def show(X: Tensor) -> None:
            if callback is not None:
                callback(X * largest)

        found = self._iterate(
            system, B / largest, tolerances / sizes, maxiter, show if callback else None
        )
        return found._replace(
            solution=found.solution * largest, residual_norms=found.residual_norms * sizes
        )

    def _watching(self, X: Tensor, left: np.ndarray) -> Callback | None:
        callback = self._callback
        if callback is None:
            return None

        def show(D: Tensor) -> None:
            iterate = X.clone()
            add_columns(iterate, left, D)
            callback(iterate[:, 0] if iterate.shape[1] == 1 else iterate)

        return show

    def _adjoint(self) -> TorchLinearOperator:
        return self


class _Solved(NamedTuple):
    solution: Tensor
    iterations: np.ndarray
    residual_norms: np.ndarray
    tolerances: np.ndarray
    reason: str

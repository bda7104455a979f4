"""What all iterative inverses share: the system, its options, and the bookkeeping."""

from __future__ import annotations

import copy
import os
from abc import abstractmethod
from functools import partial
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from torchlinop._checkpoint import Checkpoint, Run
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
    column_norms,
    column_sizes,
    divided,
    require_finite_columns,
)
from torchlinop.solve.cycles import Cycles
from torchlinop.solve.preconditioner import as_preconditioner, moved
from torchlinop.solve.report import OnFailure, SolveReport, judge
from torchlinop.solve.restart import Callback, Correction, Iteration, Method, solve
from torchlinop.solve.system import System

#: most right-hand sides that share one Krylov space
_MAX_BLOCK = 128


class KrylovInverse(TorchLinearOperator):
    """``(A + damping I)^-1`` of a Hermitian ``A`` by a Krylov method.

    Not to be made by users; the options are described at
    :class:`~torchlinop.CGInverseLinearOperator`.
    """

    #: name of the method in reports and errors
    solver: str
    #: a basis of right-hand sides is solved for if it is at most this part of them: it has
    #: to reach tighter tolerances than they
    basis_share: float

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
        checkpoint: Checkpoint | str | os.PathLike[str] | None = None,
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
        self._checkpoint = Checkpoint.of(checkpoint)
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
        run: Run,
    ) -> Correction:
        """Solve from zero, or from the state of a run.

        An :class:`~torchlinop.solve.restart.Iteration` but for ``run``.
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
        iterate = self._iteration(system, x)
        solved = [self._solve(system, iterate, B, X0) for B, X0 in self._blocks(x)]
        norms, tolerances, iterations, converged = (
            np.concatenate([getattr(s, name) for s in solved])
            for name in ("residual_norms", "tolerances", "iterations", "converged")
        )
        report = SolveReport(
            solver=self.solver,
            iterations=iterations,
            residual_norms=norms,
            tolerances=tolerances,
            converged=converged,
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

    def _iteration(self, system: System, x: Tensor) -> Iteration:
        """Return what iterates on a block, and remembers it where that is wanted."""
        if self._checkpoint is None:
            return partial(self._iterate, run=Run())
        arguments = {"damping": self.damping, "rtol": self.rtol, "atol": self.atol}
        vectors = {"the right-hand side": x, "x0": self._x0}
        run = self._checkpoint.begin(
            self.solver, {"A": self.A, "M": self.M}, arguments, vectors
        )
        return Cycles(self._iterate, run, system)

    def _solve(
        self, system: System, iterate: Iteration, B: Tensor, X0: Tensor | None
    ) -> _Solved:
        """Solve for one block, in units of the size of each right-hand side."""
        b_norms = column_norms(B)
        require_finite_columns(b_norms, "The right-hand side")
        size, units = column_sizes(B) if X0 is None else column_sizes(B, X0)
        tolerances = np.maximum(self.rtol * b_norms, self.atol) / units
        if X0 is not None:
            X0 = divided(X0, size)
            X0[:, torch.as_tensor(b_norms == 0, device=X0.device)] = 0
        B = divided(B, size)
        method = Method(iterate, self.solver, system, self.maxiter, self.basis_share)
        found = solve(method, B, X0, tolerances, self._watching(size))
        X, norms, reason = found.X * size, found.norms, found.reason
        again = divided(X, size)
        if not torch.equal(again, found.X):  # some have left the range of the dtype
            norms = column_norms(B - system.product(again))
            norms, reason = np.nan_to_num(norms, nan=np.inf), reason or "range"
        converged = norms <= tolerances
        return _Solved(
            solution=X,
            iterations=found.iterations,
            residual_norms=norms * units,
            tolerances=tolerances * units,
            converged=converged,
            reason="" if converged.all() else reason,
        )

    def _watching(self, size: Tensor) -> Callback | None:
        callback = self._callback
        if callback is None:
            return None

        def show(X: Tensor) -> None:
            iterate = X * size
            callback(iterate[:, 0] if iterate.shape[1] == 1 else iterate)

        return show

    def _adjoint(self) -> TorchLinearOperator:
        return self


class _Solved(NamedTuple):
    solution: Tensor
    iterations: np.ndarray
    residual_norms: np.ndarray
    tolerances: np.ndarray
    converged: np.ndarray
    reason: str

"""What a solve did, and what is said when it did not converge."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from torch import Tensor

from torchlinop._convergence import ConvergenceWarning, users_frame

#: what happens when a column does not converge
OnFailure: TypeAlias = Literal["warn", "raise", "ignore"]


class ConvergenceError(np.linalg.LinAlgError):
    """A solve ended before it reached the tolerance, and was asked to raise.

    Attributes
    ----------
    report : SolveReport
    solution : torch.Tensor
        What was reached, shape ``(N, K)``.
    """

    def __init__(self, message: str, report: SolveReport, solution: Tensor) -> None:
        super().__init__(message)
        self.report = report
        self.solution = solution

    def __reduce__(self) -> tuple:
        return type(self), (str(self), self.report, self.solution)


class NegativeCurvatureError(np.linalg.LinAlgError):
    """A matrix that has to be positive definite is not.

    Attributes
    ----------
    direction : torch.Tensor
        A vector ``p`` of shape ``(N,)`` and length 1 with ``p^H A p < 0``.
    curvature : float
        ``p^H A p``.
    """

    def __init__(self, message: str, direction: Tensor, curvature: float) -> None:
        super().__init__(message)
        self.direction = direction
        self.curvature = curvature

    def __reduce__(self) -> tuple:
        return type(self), (str(self), self.direction, self.curvature)


@dataclass(frozen=True, eq=False)
class SolveReport:
    """How the columns of a product with an inverse were found.

    A complex right-hand side of a real matrix counts as two columns, its real parts
    first.

    Attributes
    ----------
    solver : str
        Name of the method.
    iterations : numpy.ndarray
        Per column, shape ``(K,)``.
    residual_norms : numpy.ndarray
        2-norms of ``b - A x``, shape ``(K,)``; of LSMR, those of the damped problem.
    tolerances : numpy.ndarray
        What the residual norms were to reach, shape ``(K,)``.
    converged : numpy.ndarray of bool
        Shape ``(K,)``.
    num_matvecs : int
        Vectors that were multiplied with the matrix (and with its adjoint).
    reason : str
        Why columns did not converge: empty, ``"maxiter"``, ``"singular"``,
        ``"rounding"``, ``"range"``, ``"preconditioner"`` or ``"conlim"``.
    normal_residual_norms, normal_tolerances : numpy.ndarray or None
        For a least-squares problem: 2-norms of ``A^H (b - A x) - damp^2 x``, and what they
        were to reach. Either residual converges a column.
    """

    solver: str
    iterations: np.ndarray
    residual_norms: np.ndarray
    tolerances: np.ndarray
    converged: np.ndarray
    num_matvecs: int
    reason: str = ""
    normal_residual_norms: np.ndarray | None = None
    normal_tolerances: np.ndarray | None = None

    def __str__(self) -> str:
        count = len(self.iterations)
        if not count:
            return f"{self.solver}: no columns"
        low, high = int(self.iterations.min()), int(self.iterations.max())
        span = f"{high}" if low == high else f"{low} to {high}"
        worst = int(np.argmax(self.residual_norms - self.tolerances))
        lines = [
            f"{self.solver}: {int(self.converged.sum())} of {count} "
            f"column{'s' if count > 1 else ''} converged"
            + (f" (stopped by {self.reason})" if self.reason else ""),
            f"  iterations     {span}",
            f"  products       {self.num_matvecs}",
            f"  residual norm  {self.residual_norms[worst]:.2e} "
            f"(wanted {self.tolerances[worst]:.2e})",
        ]
        if self.normal_residual_norms is not None and self.normal_tolerances is not None:
            worst = int(np.argmax(self.normal_residual_norms - self.normal_tolerances))
            lines.append(
                f"  or A^H r       {self.normal_residual_norms[worst]:.2e} "
                f"(wanted {self.normal_tolerances[worst]:.2e})"
            )
        return "\n".join(lines)


_ADVICE = {
    "maxiter": (
        "Raise maxiter, accept a larger rtol, add damping, or pass a preconditioner M "
        "(NystromPreconditioner, JacobiPreconditioner)."
    ),
    "singular": (
        "The matrix is singular to working precision and the right-hand side is not in its "
        "range: add damping, or use LSMRInverseLinearOperator for the least-squares "
        "solution."
    ),
    "rounding": (
        "Rounding errors keep the residual there: accept a larger rtol, add damping, or "
        "compute in float64."
    ),
    "range": (
        "Entries of the solution are too large or too small for its dtype: scale the "
        "right-hand side, or compute in float64."
    ),
    "preconditioner": (
        "The preconditioner M is singular to working precision, so it hides what is left "
        "of the residual: pass a positive definite one."
    ),
    "conlim": ("The condition number exceeds conlim: add damping (damp), or raise conlim."),
}


def judge(report: SolveReport, solution: Tensor, on_failure: OnFailure) -> None:
    """Warn or raise if a column did not converge."""
    if on_failure == "ignore" or report.converged.all():
        return
    failed = ~report.converged
    worst = np.flatnonzero(failed)[np.argmax(report.residual_norms[failed])]
    message = (
        f"{report.solver} did not converge for {int(failed.sum())} of {len(failed)} "
        f"right-hand sides: after {int(report.iterations[worst])} iterations the residual "
        f"norm of column {worst} is {report.residual_norms[worst]:.2e}, wanted "
        f"{report.tolerances[worst]:.2e}. {_ADVICE[report.reason or 'rounding']} "
        "(on_failure='ignore' silences this, 'raise' makes it an error.)"
    )
    if on_failure == "raise":
        raise ConvergenceError(message, report, solution)
    warnings.warn(message, ConvergenceWarning, stacklevel=users_frame())

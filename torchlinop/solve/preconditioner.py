"""What a preconditioner is."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Self

import numpy as np
from torch import Tensor

from torchlinop._operator import TorchLinearOperator, aslinearoperator
from torchlinop.solve.columns import column_norms, require_finite_columns
from torchlinop.solve.system import System

#: rounding errors of r^H M r for unit vectors r, in units of eps |M|
_NOISE = 30


class Preconditioner(TorchLinearOperator):
    """A positive definite operator that resembles the inverse of ``A + damping I``.

    Passed as ``M=`` to SciPy's, cupyx's and this package's solvers.

    Attributes
    ----------
    damping : float
    """

    damping: float

    @abstractmethod
    def with_damping(self, damping: float) -> Self:
        """Return the preconditioner for another damping, without products with ``A``."""


def as_preconditioner(M: Any, A: TorchLinearOperator, name: str) -> Any:
    """Return ``M`` as an operator that fits ``A``, or None."""
    if M is None:
        return None
    try:
        if not isinstance(M, TorchLinearOperator):
            M = aslinearoperator(M, device=A.device)
    except TypeError as error:
        raise TypeError(
            f"{name} has to be an operator or a matrix that approximates the inverse of A, "
            f"got {type(M).__name__}. A function f becomes one by "
            "scipy.sparse.linalg.LinearOperator((n, n), matvec=f)."
        ) from error
    if M.shape != A.shape:
        raise ValueError(
            f"{name} is {M.shape[0]} x {M.shape[1]}, but A is {A.shape[0]} x {A.shape[1]}."
        )
    if M.device != A.device:
        raise ValueError(f"{name} is on {M.device}, but A on {A.device}.")
    if M.torch_dtype.is_complex and not A.torch_dtype.is_complex:
        raise TypeError(f"{name} is complex ({M.dtype}), but A is real ({A.dtype}).")
    return M


def moved(M: Any, change: float) -> Any:
    """Return a preconditioner for a changed damping, or the same if it has none to give."""
    if isinstance(M, Preconditioner) and M.damping + change > 0:
        return M.with_damping(M.damping + change)
    return M


def refuse_preconditioner(dots: np.ndarray, R: Tensor, system: System) -> None:
    """Raise if some ``r^H M r`` is negative beyond rounding.

    Parameters
    ----------
    dots
        ``r^H M r``, of which some are not positive.
    R
        Vectors ``r``, shape ``(N, K)``.
    """
    require_finite_columns(dots, "The product with the preconditioner M")
    norms = column_norms(R)
    norms = np.where(norms > 0, norms, 1)
    relative = dots / norms / norms
    if relative.min() < -_NOISE * system.eps * system.preconditioner_norm():
        raise np.linalg.LinAlgError(
            "The preconditioner M is not positive definite: for a vector r of length 1, "
            f"r^H M r = {relative.min():.3e}. Pass a positive definite approximation of "
            "the inverse of A; for an indefinite A one made from absolute values."
        )

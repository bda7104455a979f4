"""Inverses with curvlinops' arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from scipy.sparse.linalg import LinearOperator
from torch import Tensor

import torchlinop
from torchlinop._operator import TorchLinearOperator
from torchlinop._typing import Array
from torchlinop.compat.curvlinops.lists import ListLinearOperator, Shapes, shapes_of

#: an approximate inverse: an operator, or a function of a block ``(N, K)``
Preconditioner = Any


class _Inverse(ListLinearOperator):
    """The inverse of an operator: multiplies its lists of rows."""

    A: TorchLinearOperator

    def row_shapes(self) -> Shapes:
        """Return the shapes of A's columns."""
        return shapes_of(self.A)[1]

    def column_shapes(self) -> Shapes:
        """Return the shapes of A's rows."""
        return shapes_of(self.A)[0]


class CGInverseLinearOperator(_Inverse, torchlinop.CGInverseLinearOperator):
    """:class:`torchlinop.CGInverseLinearOperator` with curvlinops' arguments.

    Parameters
    ----------
    A
        Positive definite operator.
    tolerance
        Relative residual at which a column stops; by default ``stop_updating_after``.
    stop_updating_after
        The same, where no ``tolerance`` is given.
    max_iter
        Most iterations.
    initial_guess
        Where a solve starts.
    preconditioner
        A function of a block ``(N, K)``, or an operator.
    n_tridiag
        Has to be 0: there is no tridiagonal matrix.
    eps, max_tridiag_iter
        Not used: nothing is divided by zero here.

    Notes
    -----
    Nothing is said if ``max_iter`` is not enough, as in that library; ``last_solve`` has
    the residual norms. Its default tolerance, a mean relative residual of 1, is not kept.
    """

    def __init__(
        self,
        A: TorchLinearOperator,
        *,
        n_tridiag: int = 0,
        tolerance: float | None = None,
        eps: float = 1e-10,
        stop_updating_after: float = 1e-10,
        max_iter: int | None = None,
        max_tridiag_iter: int | None = None,
        initial_guess: Array | None = None,
        preconditioner: Preconditioner = None,
    ) -> None:
        if n_tridiag:
            raise ValueError(f"n_tridiag has to be 0, got {n_tridiag}.")
        super().__init__(
            A,
            rtol=stop_updating_after if tolerance is None else tolerance,
            maxiter=1000 if max_iter is None else max_iter,
            M=_as_operator(preconditioner, A),
            x0=initial_guess,
            on_failure="ignore",
        )


def _as_operator(P: Preconditioner, A: TorchLinearOperator) -> Any:
    if callable(P) and not isinstance(P, LinearOperator):
        return _Function(P, A)
    return P  # an operator or a matrix


class _Function(TorchLinearOperator):
    """A symmetric function of blocks as an operator."""

    def __init__(self, f: Callable[[Tensor], Tensor], A: TorchLinearOperator) -> None:
        super().__init__(A.shape, A.torch_dtype, A.device)
        self._f = f

    def _apply(self, x: Tensor) -> Tensor:
        return self._f(x.clone()).clone()

    def _adjoint(self) -> TorchLinearOperator:
        return self


class LSMRInverseLinearOperator(_Inverse, torchlinop.LSMRInverseLinearOperator):
    """:class:`torchlinop.LSMRInverseLinearOperator` with SciPy's names; never warns."""

    def __init__(
        self,
        A: TorchLinearOperator,
        *,
        damp: float = 0.0,
        atol: float = 1e-6,
        btol: float = 1e-6,
        conlim: float = 1e8,
        maxiter: int | None = None,
        show: bool = False,
        x0: Array | None = None,
    ) -> None:
        super().__init__(
            A,
            damp=damp,
            atol=atol,
            btol=btol,
            conlim=conlim,
            maxiter=maxiter,
            x0=x0,
            on_failure="ignore",
        )


class NeumannInverseLinearOperator(_Inverse, torchlinop.NeumannInverseLinearOperator):
    """:class:`torchlinop.NeumannInverseLinearOperator` with curvlinops' arguments.

    A series that diverges is refused, whatever ``check_nan`` says.
    """

    def __init__(
        self,
        A: TorchLinearOperator,
        num_terms: int = 100,
        scale: float = 1.0,
        check_nan: bool = True,
        preconditioner: Preconditioner = None,
    ) -> None:
        super().__init__(A, num_terms, scale, _as_operator(preconditioner, A))

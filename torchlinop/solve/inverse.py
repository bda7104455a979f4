"""What all iterative inverses share: the system, its options, and the bookkeeping."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, Self, get_args

import numpy as np
import torch
from torch import Tensor

from torchlinop._interchange import as_tensor
from torchlinop._operator import TorchLinearOperator, aslinearoperator
from torchlinop._typing import Array
from torchlinop.solve.preconditioner import Preconditioner
from torchlinop.solve.report import OnFailure, SolveReport, judge

Callback = Callable[[Tensor], Any]

#: most right-hand sides that share one Krylov space
_MAX_BLOCK = 128
#: columns from this length on are reduced one by one on a CPU
_LONG = 1 << 15
#: squares of norms in this range are far from underflow and overflow in float32
_SAFE = (1e-4, 1e4)


class System:
    """``A + damping I`` and a preconditioner, as functions of ``(N, K)`` blocks."""

    def __init__(
        self,
        A: TorchLinearOperator,
        damping: float = 0.0,
        M: TorchLinearOperator | None = None,
    ) -> None:
        self._A, self._damping, self._M = A, damping, M
        self.num_matvecs = 0
        self.eps = torch.finfo(A.torch_dtype).eps

    def product(self, X: Tensor) -> Tensor:
        """``(A + damping I) X``."""
        self.num_matvecs += X.shape[1]
        Y = self._A._product(X)
        return Y.add_(X, alpha=self._damping) if self._damping else Y

    @property
    def preconditioned(self) -> bool:
        """Whether there is a preconditioner."""
        return self._M is not None

    def norm(self) -> float:
        """Estimate the norm of the matrix by a few steps of the power method."""
        generator = torch.Generator().manual_seed(0)
        n, dtype = self._A.shape[0], self._A.torch_dtype
        v = torch.randn(n, 1, generator=generator, dtype=torch.float64)
        v = v.to(self._A.device, dtype)
        size = float(column_norms(v)[0])
        for _ in range(5):
            v = self.product(v / size)
            size = float(column_norms(v)[0])
            if not 0 < size < np.inf:
                break
        return size

    def precondition(self, X: Tensor) -> Tensor:
        """``M X``, or ``X`` itself where there is no preconditioner."""
        return X if self._M is None else self._M._product(X).to(X.dtype)


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
        X0 = self._x0
        if X0 is not None and X0.shape[1] not in (1, B.shape[1]):
            raise ValueError(
                f"x0 has {X0.shape[1]} columns, the right-hand side {B.shape[1]}."
            )
        blocks = B.split(_MAX_BLOCK, dim=1)
        if X0 is None:
            return [(block, None) for block in blocks]
        starts = X0.expand(B.shape).split(_MAX_BLOCK, dim=1)
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
                system, take(R, left), goal[left], budget, self._watching(X, left)
            )
            add_columns(X, left, found.solution)
            iterations[left] += found.iterations
            before, norms = norms, norms.copy()
            norms[left], reason = found.residual_norms, found.reason
            lengths = column_norms(X)
            require_finite_iteration(lengths, self.solver, int(iterations.max()))
            # recurrences and true residuals drift apart by about eps |A| |x| (Greenbaum,
            # SIAM J. Matrix Anal. Appl. 18, 1997, doi.org/10.1137/S0895479895284944)
            trusted = X0 is None and np.isfinite(found.norm)
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
        tolerances: np.ndarray,
        maxiter: int,
        callback: Callback | None,
    ) -> Correction:
        """Iterate on columns of moderate size where squares might under- or overflow."""
        norms = column_norms(B)
        if ((norms > _SAFE[0]) & (norms < _SAFE[1])).all():
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


# ------------------------------------------------------------------ columns of blocks


def column_norms(X: Tensor) -> np.ndarray:
    """2-norms of the columns, shape ``(K,)``, in float64 on the host."""
    norms = _column_norms(X)
    if ((norms > _SAFE[0]) & (norms < _SAFE[1])).all() or not X.shape[0]:
        return norms
    largest = X.abs().amax(dim=0)
    scale = torch.where(largest > 0, largest, 1)
    return _column_norms(X / scale) * scale.double().cpu().numpy()


def _column_norms(X: Tensor) -> np.ndarray:
    if X.shape[1] == 1 or _long_columns(X):
        return np.sqrt(column_dots(X, X))
    return torch.linalg.vector_norm(X, dim=0).double().cpu().numpy()


def column_dots(X: Tensor, Y: Tensor) -> np.ndarray:
    """Real parts of ``x_k^H y_k``, shape ``(K,)``, in float64 on the host."""
    if X.shape[1] == 1:
        return np.array([torch.vdot(X.reshape(-1), Y.reshape(-1)).real.item()])
    if _long_columns(X):
        pairs = zip(X.T, Y.T, strict=True)
        return np.array([torch.vdot(x, y).real.item() for x, y in pairs])
    products = X.conj() * Y if X.dtype.is_complex else X * Y
    return products.sum(dim=0).real.double().cpu().numpy()


def _long_columns(X: Tensor) -> bool:
    """Where torch's reductions lose digits (4e-4 at 1e7 float32 entries), or are slow."""
    return X.device.type == "cpu" and X.shape[0] > _LONG


def row(coefficients: np.ndarray, like: Tensor) -> Tensor | float:
    """Coefficients of columns, shape ``(K,)``, for products with ``like``."""
    if len(coefficients) == 1:
        return float(coefficients[0])
    return torch.as_tensor(coefficients).to(like.device, like.dtype)


def take(X: Tensor, columns: np.ndarray) -> Tensor:
    """Return some columns, or ``X`` itself if they are all."""
    if len(columns) == X.shape[1]:
        return X
    return X[:, torch.as_tensor(columns, device=X.device)]


def add_columns(X: Tensor, columns: np.ndarray, D: Tensor) -> None:
    """``X[:, columns] += D``."""
    if len(columns) == X.shape[1]:
        X.add_(D)
    else:
        X.index_add_(1, torch.as_tensor(columns, device=X.device), D)


def require_finite_columns(norms: np.ndarray, what: str) -> None:
    """Refuse NaN and infinity."""
    if not np.isfinite(norms).all():
        bad = np.flatnonzero(~np.isfinite(norms))[:5].tolist()
        raise ValueError(f"{what} has NaN or infinite entries in columns {bad}.")


def require_finite_iteration(norms: np.ndarray, solver: str, iteration: int) -> None:
    """Refuse to go on with NaN."""
    if not np.isfinite(norms).all():
        raise np.linalg.LinAlgError(
            f"NaN or infinity in iteration {iteration} of {solver}: the product with the "
            "matrix or the preconditioner is not finite. For a curvature matrix look for "
            "NaN in parameters and data with check_finite=True."
        )


def moved(M: Any, change: float) -> Any:
    """Return a preconditioner for a changed damping, or the same if it has none to give."""
    if isinstance(M, Preconditioner) and M.damping + change > 0:
        return M.with_damping(M.damping + change)
    return M


# ------------------------------------------------------------------------------ checks


def square_operator(A: Any, solver: str) -> TorchLinearOperator:
    """Return ``A`` as one of our operators, and refuse rectangular ones."""
    A = aslinearoperator(A)
    if A.shape[0] != A.shape[1]:
        raise ValueError(
            f"{solver} inverts square matrices, got {A.shape[0]} x {A.shape[1]}. For the "
            "least-squares solution use LSMRInverseLinearOperator."
        )
    return A


def as_preconditioner(M: Any, A: TorchLinearOperator, name: str) -> Any:
    """Return ``M`` as an operator that fits ``A``, or None."""
    if M is None:
        return None
    try:
        M = (
            M
            if isinstance(M, TorchLinearOperator)
            else aslinearoperator(M, device=A.device)
        )
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


def starting_vectors(x0: Array, A: TorchLinearOperator) -> Tensor:
    """Return ``x0`` as a fresh ``(N, K)`` tensor that fits ``A``."""
    start = as_tensor(x0, A.device)
    if start.ndim not in (1, 2) or start.shape[0] != A.shape[1]:
        raise ValueError(
            f"x0 has to have shape (N,) or (N, K) with N = {A.shape[1]}, got "
            f"{tuple(start.shape)}."
        )
    if start.dtype.is_complex and not A.torch_dtype.is_complex:
        raise TypeError(f"x0 is complex, but A is real ({A.dtype}).")
    start = start.detach().to(A.torch_dtype, copy=True)
    return start.unsqueeze(1) if start.ndim == 1 else start


def finite(name: str, value: float) -> float:
    """Return a real number."""
    number = float(value)
    if not np.isfinite(number):
        raise ValueError(f"{name} has to be a finite number, got {value!r}.")
    return number


def at_least_zero(name: str, value: float) -> float:
    """Return a real number that is not negative."""
    if not finite(name, value) >= 0:
        raise ValueError(f"{name} has to be at least 0, got {value!r}.")
    return float(value)


def count(name: str, value: int) -> int:
    """Return an integer that is not negative."""
    if int(value) != value or value < 0:
        raise ValueError(f"{name} has to be an integer >= 0, got {value!r}.")
    return int(value)


def one_of_failures(value: str) -> Any:
    """Return what to do about columns that do not converge."""
    if value not in get_args(OnFailure):
        raise ValueError(
            f"on_failure has to be 'warn', 'raise' or 'ignore', got {value!r}."
        )
    return value

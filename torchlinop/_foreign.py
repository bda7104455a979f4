"""Matrices of other libraries, as actions: dense arrays, and what multiplies by itself."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.linalg import LinearOperator
from scipy.sparse.linalg import aslinearoperator as as_scipy_operator
from torch import Tensor

from torchlinop._cupy import cupy_device, is_cupyx_matrix, to_cupy
from torchlinop._dtypes import numpy_dtype, torch_dtype
from torchlinop._interchange import as_tensor

_ADJOINT_IS_MISSING = (
    "The {owner} could not be multiplied ({error}). For products with its adjoint it has "
    "to be made with rmatvec=, or to have a method rmatvec."
)


class Dense:
    """A dense matrix of shape ``(M, N)``. Its memory is shared, not copied."""

    def __init__(self, matrix: Tensor) -> None:
        if matrix.ndim != 2:
            raise ValueError(
                f"A matrix has two dimensions, got shape {tuple(matrix.shape)}."
            )
        self.shape = (matrix.shape[0], matrix.shape[1])
        self.dtype, self.device = matrix.dtype, matrix.device
        self.args = (matrix.detach(),)

    def apply(self, x: Tensor) -> Tensor:
        return self.args[0] @ x

    def adjoint(self) -> Dense:
        return Dense(self.args[0].mH)

    def __getstate__(self) -> dict[str, Any]:
        # on the way to another process torch forgets that a tensor is to be conjugated,
        # and the tensor has to live until it has arrived
        self.args = (self.args[0].resolve_conj(),)
        return vars(self)


class OnHost:
    """An operator or sparse matrix that multiplies NumPy arrays by its own code.

    Parameters
    ----------
    operator
        One of SciPy's, or anything with ``shape`` and ``matvec``.
    device
        Where vectors come from; on a GPU every product copies them to the host and back.
    """

    def __init__(
        self, operator: Any, device: torch.device, *, adjoint: bool = False
    ) -> None:
        wrapped = _as_scipy(operator)
        self.shape = wrapped.shape[::-1] if adjoint else wrapped.shape
        self.dtype = torch_dtype(
            np.dtype(float) if wrapped.dtype is None else wrapped.dtype
        )
        self.device = device
        self.args = (wrapped,)
        self._is_adjoint = adjoint

    def apply(self, x: Tensor) -> Tensor:
        (A,) = self.args
        matvec, matmat = (
            (A.rmatvec, A.rmatmat) if self._is_adjoint else (A.matvec, A.matmat)
        )
        host = x.cpu().resolve_conj().resolve_neg().numpy()
        try:
            if host.shape[1] == 0:  # SciPy's default would stack no columns
                y = np.empty((self.shape[0], 0))
            elif host.shape[1] == 1:  # functions of users often know only (N,)
                y = matvec(host[:, 0]).reshape(-1, 1)
            else:
                y = matmat(host)
        except (TypeError, NotImplementedError) as error:
            if not self._is_adjoint:
                raise
            # without rmatvec= SciPy calls None in some places
            message = _ADJOINT_IS_MISSING.format(owner="operator", error=error)
            raise NotImplementedError(message) from error
        y = np.array(y, dtype=numpy_dtype(self.dtype), order="C")
        return torch.from_numpy(y).to(self.device)

    def adjoint(self) -> OnHost:
        return OnHost(self.args[0], self.device, adjoint=not self._is_adjoint)


def _as_scipy(operator: Any) -> LinearOperator:
    if isinstance(operator, LinearOperator) or sparse.issparse(operator):
        return as_scipy_operator(operator)
    # SciPy would pass over matmat, and hand (N, 1) to matvec
    matvec, rmatvec = operator.matvec, getattr(operator, "rmatvec", None)
    by_columns = functools.partial(functools.partial, _by_columns)
    matmat = getattr(operator, "matmat", by_columns(matvec))
    rmatmat = getattr(operator, "rmatmat", by_columns(rmatvec) if rmatvec else None)
    return LinearOperator(
        operator.shape,
        matvec,
        rmatvec=rmatvec,
        matmat=matmat,
        rmatmat=rmatmat,
        dtype=getattr(operator, "dtype", None),
    )


def _by_columns(matvec: Callable[[np.ndarray], np.ndarray], X: np.ndarray) -> np.ndarray:
    return np.column_stack([matvec(column) for column in X.T])


class OnCupy:
    """An operator or sparse matrix of cupyx, multiplied on the GPU by its own code.

    Parameters
    ----------
    operator
        Anything that ``cupyx.scipy.sparse.linalg.aslinearoperator`` accepts.
    device
        Where vectors come from.
    """

    def __init__(self, operator: Any, device: torch.device) -> None:
        cupyx = importlib.import_module("cupyx.scipy.sparse.linalg")
        wrapped = cupyx.aslinearoperator(operator)
        self.shape, self.device = wrapped.shape, device
        self.dtype = torch_dtype(wrapped.dtype)
        self.args = (wrapped,)

    def apply(self, x: Tensor) -> Tensor:
        (operator,) = self.args
        try:
            if x.shape[1] == 1:
                y = operator.matvec(to_cupy(x.reshape(-1)))
            else:
                y = operator.matmat(to_cupy(x))
        except (TypeError, NotImplementedError) as error:
            message = _ADJOINT_IS_MISSING.format(owner="operator of cupyx", error=error)
            raise NotImplementedError(message) from error
        # a copy, since the operator may keep what it returned
        product = as_tensor(y, self.device).to(self.dtype, copy=True)
        return product.reshape(self.shape[0], x.shape[1])

    def adjoint(self) -> OnCupy:
        return OnCupy(self.args[0].H, self.device)


def foreign_action(obj: Any, device: torch.device | None) -> OnHost | OnCupy | None:
    """Return what multiplies by code of its own as an action; None for anything else.

    These are operators and sparse matrices of SciPy and cupyx, and any object that has
    ``shape`` and ``matvec``. The device is by default the one on which they multiply.
    """
    if isinstance(obj, LinearOperator) or sparse.issparse(obj):
        return OnHost(obj, device or torch.device("cpu"))
    if is_cupyx_matrix(obj):
        return OnCupy(obj, device or cupy_device())
    if hasattr(obj, "shape") and hasattr(obj, "matvec"):
        return OnHost(obj, device or torch.device("cpu"))
    return None

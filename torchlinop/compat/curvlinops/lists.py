"""Lists of tensors as vectors and matrices.

An operator of that library multiplies a list with one tensor for each parameter as well as
a flat vector, and returns a list. Here this is a base class of the operators' own, whose
sums, products, multiples and inverses take lists, too.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from torchlinop._operator import TorchLinearOperator
from torchlinop._typing import Scalar
from torchlinop.structured import StructuredLinearOperator

#: shapes of the tensors in a list
Shapes = Sequence[Sequence[int]]


class ListLinearOperator(TorchLinearOperator):
    """An operator that multiplies lists of tensors, too.

    ``A @ [tensors]`` takes tensors of the shapes of A's columns, or with one more dimension
    at the end for the columns of a matrix; ``[tensors] @ A`` tensors of the shapes of its
    rows, or with one more dimension at the front. Both return such a list.
    """

    @abstractmethod
    def row_shapes(self) -> Shapes:
        """Return the shapes of the tensors of a product."""

    @abstractmethod
    def column_shapes(self) -> Shapes:
        """Return the shapes of the tensors that are multiplied."""

    def dot(self, x: Any) -> Any:
        """Product with a list of tensors, or as any operator."""
        if not _is_list(x):
            return super().dot(x)
        flat = _joined(x, self.column_shapes(), columns_last=True)
        return _split(super().dot(flat), self.row_shapes(), columns_last=True)

    def rdot(self, x: Any) -> Any:
        """Product ``x @ self`` with a list of tensors, or as any operator."""
        if not _is_list(x):
            return super().rdot(x)
        flat = _joined(x, self.row_shapes(), columns_last=False)
        return _split(super().rdot(flat), self.column_shapes(), columns_last=False)

    def to_scipy(self, dtype: Any = None) -> Any:
        """Return the operator itself, or one that shows another dtype to SciPy."""
        if dtype is None or np.dtype(dtype) == self.dtype:
            return self
        return LinearOperator(
            self.shape,
            matvec=lambda x: self.matvec(x).astype(dtype),
            rmatvec=lambda x: self.rmatvec(x).astype(dtype),
            matmat=lambda X: self.matmat(X).astype(dtype),
            rmatmat=lambda X: self.rmatmat(X).astype(dtype),
            dtype=np.dtype(dtype),
        )

    # what comes of it takes lists

    def _plus(self, other: TorchLinearOperator) -> TorchLinearOperator:
        return self._like(super()._plus(_bare(other)))

    def _scaled(self, alpha: float | complex) -> TorchLinearOperator:
        return self._like(super()._scaled(alpha))

    def _raised(self, p: Scalar) -> TorchLinearOperator:
        return self._like(super()._raised(p))

    def _times(self, other: TorchLinearOperator) -> TorchLinearOperator:
        product = super()._times(_bare(other))
        return with_lists(product, self.row_shapes(), shapes_of(other)[1])

    def _adjoint(self) -> TorchLinearOperator:
        adjoint = super()._adjoint()  # type: ignore[safe-super]
        if adjoint is self:
            return self
        return with_lists(adjoint, self.column_shapes(), self.row_shapes())

    def _like(self, A: TorchLinearOperator) -> TorchLinearOperator:
        return with_lists(A, self.row_shapes(), self.column_shapes())


class VectorLinearOperator(ListLinearOperator):
    """An operator whose lists hold one vector, or one matrix."""

    def row_shapes(self) -> Shapes:
        """Return the shape of a product."""
        return [self.shape[:1]]

    def column_shapes(self) -> Shapes:
        """Return the shape of a vector that is multiplied."""
        return [self.shape[1:]]


def with_lists(
    A: TorchLinearOperator, rows: Shapes, columns: Shapes
) -> TorchLinearOperator:
    """Return an operator that multiplies lists of tensors of these shapes, too."""
    if isinstance(A, ListLinearOperator):
        return A
    if isinstance(A, StructuredLinearOperator):
        return _StructuredWithLists(A, rows, columns)
    return _WithLists(A, rows, columns)


def shapes_of(A: TorchLinearOperator) -> tuple[Shapes, Shapes]:
    """Return the shapes of rows and columns; those of a flat vector by default."""
    if isinstance(A, ListLinearOperator):
        return A.row_shapes(), A.column_shapes()
    return [A.shape[:1]], [A.shape[1:]]


class _WithLists(ListLinearOperator):
    """Another operator, with lists."""

    def __init__(self, A: TorchLinearOperator, rows: Shapes, columns: Shapes) -> None:
        super().__init__(A.shape, A.torch_dtype, A.device)
        self.A = A
        self._rows, self._columns = rows, columns

    def row_shapes(self) -> Shapes:
        return self._rows

    def column_shapes(self) -> Shapes:
        return self._columns

    def _apply(self, x: Tensor) -> Tensor:
        return self.A._product(x)

    def _adjoint(self) -> TorchLinearOperator:
        adjoint = self.A._adjoint()
        return self if adjoint is self.A else with_lists(adjoint, self._columns, self._rows)


def _bare(A: TorchLinearOperator) -> TorchLinearOperator:
    """Return an operator by whose type its structure is known."""
    return A.A if isinstance(A, _WithLists) else A


class _StructuredWithLists(_WithLists, StructuredLinearOperator):
    """A matrix with a structure, which its multiples, sums and inverses keep."""

    A: StructuredLinearOperator

    def diagonal(self) -> Tensor:
        """Return the diagonal, shape ``(n,)``."""
        return self.A.diagonal()

    def trace(self) -> Tensor:
        """Return the sum of the diagonal."""
        return self.A.trace()

    def frobenius_norm(self) -> Tensor:
        """Return the root of the sum of all squared entries."""
        return self.A.frobenius_norm()

    def slogdet(self) -> tuple[Tensor, Tensor]:
        """Return the determinant's sign and the logarithm of its absolute value."""
        return self.A.slogdet()

    def power(self, exponent: float) -> TorchLinearOperator:
        """Return a power of the matrix."""
        return self._like(self.A.power(exponent))

    def inverse(self, damping: float = 0.0) -> TorchLinearOperator:
        """Return the inverse of the damped matrix."""
        return self._like(self.A.inverse(damping=damping))

    def _fixed(self) -> StructuredLinearOperator:
        return self.A._fixed()

    def _plus(self, other: TorchLinearOperator) -> TorchLinearOperator:
        return self._like(self.A._plus(_bare(other)))

    def _scaled(self, alpha: float | complex) -> TorchLinearOperator:
        return self._like(self.A._scaled(alpha))


# ------------------------------------------------------------------ lists and vectors


def _is_list(x: Any) -> bool:
    return isinstance(x, list) and bool(x) and all(isinstance(t, Tensor) for t in x)


def _joined(tensors: list[Tensor], shapes: Shapes, *, columns_last: bool) -> Tensor:
    """Return a list as a vector ``(N,)`` or a matrix ``(N, K)`` or ``(K, N)``."""
    found = [tuple(t.shape) for t in tensors]
    wanted = [tuple(shape) for shape in shapes]
    if found == wanted:
        return torch.cat([t.reshape(-1) for t in tensors])
    trimmed = [shape[:-1] if columns_last else shape[1:] for shape in found]
    counts = {shape[-1 if columns_last else 0] for shape in found if shape}
    if trimmed != wanted or len(counts) != 1:
        where = "last" if columns_last else "first"
        raise ValueError(
            f"Expected {len(wanted)} tensors of the shapes {wanted}, with one more "
            f"{where} dimension for a matrix, got {found}."
        )
    (k,) = counts
    if columns_last:
        return torch.cat([t.reshape(-1, k) for t in tensors])
    return torch.cat([t.reshape(k, -1) for t in tensors], dim=1)


def _split(flat: Tensor, shapes: Shapes, *, columns_last: bool) -> list[Tensor]:
    """Inverse of :func:`_joined`."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    if flat.ndim == 1:
        return [p.reshape(*s) for p, s in zip(flat.split(sizes), shapes, strict=True)]
    if columns_last:
        parts = zip(flat.split(sizes), shapes, strict=True)
        return [p.reshape(*s, flat.shape[1]) for p, s in parts]
    parts = zip(flat.split(sizes, dim=1), shapes, strict=True)
    return [p.reshape(flat.shape[0], *s) for p, s in parts]

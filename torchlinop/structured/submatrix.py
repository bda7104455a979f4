"""Submatrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchlinop._interchange import as_tensor
from torchlinop._operator import TorchLinearOperator, aslinearoperator
from torchlinop._typing import Array


class SubmatrixLinearOperator(TorchLinearOperator):
    """Rows and columns of a matrix, ``A[rows][:, columns]``.

    Parameters
    ----------
    A
        An operator or a matrix, shape ``(M, N)``.
    rows, columns
        Indices in the order in which they are wanted, each at most once: lists, ranges,
        slices or arrays of integers. Negative ones count from the end.

    Raises
    ------
    IndexError
        An index is out of range.
    ValueError
        An index is repeated, or indices are no integers.

    Examples
    --------
    >>> import torch
    >>> from torchlinop import SubmatrixLinearOperator
    >>> A = torch.arange(9.0).reshape(3, 3)
    >>> SubmatrixLinearOperator(A, [0, 2], [1]).to_dense()
    tensor([[1.],
            [7.]])
    """

    def __init__(
        self, A: Any, rows: Sequence[int] | Array, columns: Sequence[int] | Array
    ) -> None:
        A = aslinearoperator(A)
        self._rows = _indices("rows", rows, A.shape[0], A.device)
        self._columns = _indices("columns", columns, A.shape[1], A.device)
        super().__init__((len(self._rows), len(self._columns)), A.torch_dtype, A.device)
        self.A = A

    def _apply(self, x: Tensor) -> Tensor:
        embedded = x.new_zeros(self.A.shape[1], x.shape[1])
        embedded[self._columns] = x
        return self.A._product(embedded)[self._rows]

    def _adjoint(self) -> TorchLinearOperator:
        adjoint = self.A._adjoint()
        if adjoint is self.A and torch.equal(self._rows, self._columns):
            return self
        return SubmatrixLinearOperator(adjoint, self._columns, self._rows)


def _indices(name: str, given: Any, size: int, device: torch.device) -> Tensor:
    if isinstance(given, slice):
        given = range(*given.indices(size))
    host = np.asarray(given) if isinstance(given, (list, tuple, range)) else given
    numbers = as_tensor(host, device) if hasattr(host, "shape") else None
    kind = str(getattr(host, "dtype", None)).rpartition(".")[2]
    if (
        numbers is None
        or numbers.ndim != 1
        or (numbers.numel() and not kind.startswith(("int", "uint")))
    ):
        mask = " For a mask pass mask.nonzero()[0]." if kind == "bool" else ""
        raise ValueError(f"{name} has to be a list of integers, got {given!r}.{mask}")
    indices = numbers.long()
    outside = (indices < -size) | (indices >= size)
    if outside.any():
        raise IndexError(
            f"{name} holds {indices[outside][0].item()}, but the matrix has {size} {name}."
        )
    indices = indices % size
    if len(indices.unique()) < len(indices):
        raise ValueError(f"{name} has an index twice; each may be there once.")
    return indices

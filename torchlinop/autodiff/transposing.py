"""Columns of matrices, which solvers hold, as rows, which are multiplied, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: length from which torch copies columns quicker one by one than as a transposed matrix
_LONG = 1 << 14
#: bytes of a matrix that are read once for each column before the next ones are: they stay
#: in a CPU's cache
_PIECE = 2 << 20


def as_rows(columns: Tensor, memory: Tensor | None = None) -> Tensor:
    """Return the columns of ``(dim, K)`` as rows ``(K, dim)``, each of them contiguous.

    Parameters
    ----------
    columns
        Is not copied if each of its columns is contiguous.
    memory
        Contiguous, of the same shape: what takes the rows if they are copied.
    """
    dim, count = columns.shape
    if columns.stride(0) == 1:
        return columns.T
    rows = columns.new_empty(count, dim) if memory is None else memory.view(count, dim)
    if columns.is_cuda or dim < _LONG:
        return rows.copy_(columns.T)
    length = max(_LONG, _PIECE // (count * columns.element_size()))
    for piece, target in zip(columns.split(length), rows.split(length, 1), strict=True):
        for column, row in zip(piece.unbind(1), target.unbind(0), strict=True):
            row.copy_(column)
    return rows


def write_columns(rows: Sequence[Tensor], columns: Tensor, *, add: bool = False) -> None:
    """Write rows ``(dim,)`` to the columns of ``(dim, K)``, or add them."""
    if not add and columns.is_contiguous():
        torch.stack(list(rows), 1, out=columns)
    elif not add and columns.T.is_contiguous():
        torch.stack(list(rows), out=columns.T)
    elif columns.is_cuda or len(columns) < _LONG:
        write = Tensor.add_ if add else Tensor.copy_
        write(columns, torch.stack(list(rows)).T)
    else:
        for column, row in zip(columns.unbind(1), rows, strict=True):
            column.add_(row) if add else column.copy_(row)


def by_rows(columns: Tensor) -> Tensor:
    """Return ``(dim, K)`` contiguous row by row, as ``contiguous`` does, in less time."""
    if columns.is_contiguous() or columns.is_cuda or len(columns) < _LONG:
        return columns.contiguous()
    return torch.stack(columns.unbind(1), 1)

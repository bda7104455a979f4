"""Sums of linear functions of rows, one for each batch of data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from torchlinop.autodiff.columns import COPIED, PassingRows, Rows
from torchlinop.autodiff.experience import Experience, Pace
from torchlinop.autodiff.transposing import as_rows, write_columns


class SummedRows(Rows):
    """A sum of linear functions of rows."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._parts = parts
        self.pace = Pace()

    @property
    def nbytes(self) -> int:
        """Of the largest part."""
        return max(part.nbytes for part in self._parts)

    @property
    def row_bytes(self) -> int:
        """Of the largest part: one is applied after the other."""
        return max(part.row_bytes for part in self._parts)

    def row(self, v: Tensor, experience: Experience, remaining: int = 0) -> Tensor:
        """Apply the sum to a contiguous ``(dim,)``."""
        first, *others = self._parts
        total = first.row(v, experience, remaining)
        for part in others:
            total.add_(part.row(v, experience, remaining))
        return total

    def block(self, rows: Tensor) -> Tensor:
        """Apply the sum to ``(K, dim)``."""
        first, *others = self._parts
        total = first.block(rows)
        for part in others:
            total.add_(part.block(rows))
        return total


def sum_of_products(
    functions: Iterable[Rows | PassingRows], X: Tensor, experience: Experience
) -> Tensor:
    """Apply a sum of square functions to the columns of ``X``.

    Parameters
    ----------
    functions
        All of the shape ``(dim, dim)``; none is the sum zero.
    X
        Shape ``(dim, K)``.
    experience
        Of the operator.

    Returns
    -------
    Tensor
        Shape ``(dim, K)``. Up to 64 MiB it has its columns in a row of memory each where
        those of ``X`` are, and there is a second copy of it for a while; of a larger one,
        of as many columns as are less, twice.
    """
    in_rows = X.stride(0) == 1 and X.nbytes <= COPIED
    out = X.new_empty(X.shape[::-1]).T if in_rows else X.new_empty(X.shape)
    if not X.shape[1]:
        return out
    if X.nbytes > COPIED:
        i = -1
        for i, function in enumerate(functions):
            function.apply(X, out, experience, add=i > 0)
        return out if i >= 0 else out.zero_()
    rows = as_rows(X, out)  # they need no memory of their own
    total: list[Tensor] = []
    for function in functions:
        results = function.products(rows, experience)
        for row, other in zip(total, results, strict=False):
            row.add_(other)
        total = total or results
    if not total:
        return out.zero_()
    write_columns(total, out)
    return out

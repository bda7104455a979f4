"""Submatrices with curvlinops' arguments."""

from __future__ import annotations

import torchlinop
from torchlinop._operator import TorchLinearOperator
from torchlinop.compat.curvlinops.lists import VectorLinearOperator


class SubmatrixLinearOperator(VectorLinearOperator, torchlinop.SubmatrixLinearOperator):
    """:class:`torchlinop.SubmatrixLinearOperator` with curvlinops' arguments.

    Parameters
    ----------
    A
        An operator or a matrix.
    row_idxs, col_idxs
        Indices of rows and columns.
    """

    def __init__(
        self, A: TorchLinearOperator, row_idxs: list[int], col_idxs: list[int]
    ) -> None:
        super().__init__(A, row_idxs, col_idxs)

    def set_submatrix(self, row_idxs: list[int], col_idxs: list[int]) -> None:
        """Make it another submatrix of the same matrix."""
        super().__init__(self.A, row_idxs, col_idxs)

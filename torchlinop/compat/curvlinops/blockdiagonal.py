"""Block-diagonal matrices of operators that take lists of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torchlinop
from torchlinop.compat.curvlinops.lists import ListLinearOperator, Shapes, shapes_of


class BlockDiagonalLinearOperator(
    ListLinearOperator, torchlinop.BlockDiagonalLinearOperator
):
    """:class:`torchlinop.BlockDiagonalLinearOperator`; lists have those of all blocks.

    Parameters
    ----------
    blocks
        Square operators or matrices.
    """

    def __init__(self, blocks: Sequence[Any]) -> None:
        super().__init__(blocks)

    def row_shapes(self) -> Shapes:
        """Return the shapes of the blocks' rows."""
        return [shape for block in self.blocks for shape in shapes_of(block)[0]]

    def column_shapes(self) -> Shapes:
        """Return the shapes of the blocks' columns."""
        return [shape for block in self.blocks for shape in shapes_of(block)[1]]

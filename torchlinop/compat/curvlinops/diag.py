"""Diagonal matrices that are given by lists of tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import torchlinop
from torchlinop.compat.curvlinops.lists import ListLinearOperator, Shapes


class DiagonalLinearOperator(ListLinearOperator, torchlinop.DiagonalLinearOperator):
    """:class:`torchlinop.DiagonalLinearOperator` of a list of tensors of any shapes.

    Parameters
    ----------
    diagonal
        Its entries, tensor by tensor.
    """

    def __init__(self, diagonal: list[Tensor]) -> None:
        super().__init__(torch.cat([d.reshape(-1) for d in diagonal]))
        self._shapes = [d.shape for d in diagonal]

    def row_shapes(self) -> Shapes:
        """Return the shapes of the tensors."""
        return self._shapes

    def column_shapes(self) -> Shapes:
        """Return the shapes of the tensors."""
        return self._shapes

    def inverse(self, damping: float = 0.0) -> Any:
        """Return the inverse of the damped matrix."""
        return self._like(super().inverse(damping=damping))

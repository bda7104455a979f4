"""curvlinops' helpers for examples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import torchlinop
from torchlinop._operator import TorchLinearOperator
from torchlinop._typing import Data, Loss, Model, Parameters
from torchlinop.compat.curvlinops.arguments import BatchSize, as_risk
from torchlinop.compat.curvlinops.lists import (
    ListLinearOperator,
    Shapes,
    VectorLinearOperator,
)
from torchlinop.structured.spectrum import is_symmetric

__all__ = [
    "IdentityLinearOperator",
    "OuterProductLinearOperator",
    "TensorLinearOperator",
    "gradient_and_loss",
]


def gradient_and_loss(
    model_func: Model,
    loss_func: Loss,
    params: Parameters,
    data: Data,
    *,
    num_data: int | None = None,
    batch_size_fn: BatchSize | None = None,
    progressbar: bool = False,
) -> tuple[list[Tensor], Tensor]:
    """Return the gradient, one tensor for each parameter, and the loss on all data."""
    options = progressbar, True, num_data, batch_size_fn
    risk = as_risk(model_func, loss_func, params, data, *options)
    return torchlinop.gradient_and_loss(risk)


class IdentityLinearOperator(ListLinearOperator, torchlinop.IdentityLinearOperator):
    """:class:`torchlinop.IdentityLinearOperator` with curvlinops' arguments.

    Parameters
    ----------
    shape
        Shapes of the tensors of a list.
    device, dtype
        Those of torch.
    """

    def __init__(
        self,
        shape: Sequence[Sequence[int]],
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(shape, device, dtype)
        self._shapes = [torch.Size(s) for s in shape]

    def row_shapes(self) -> Shapes:
        """Return the shapes of the tensors."""
        return self._shapes

    def column_shapes(self) -> Shapes:
        """Return the shapes of the tensors."""
        return self._shapes


class TensorLinearOperator(VectorLinearOperator):
    """A matrix as an operator.

    Parameters
    ----------
    A
        Shape ``(M, N)``; its memory is shared.
    """

    def __init__(self, A: Tensor) -> None:
        if A.ndim != 2:
            raise ValueError(f"A has to be a matrix, got shape {tuple(A.shape)}.")
        super().__init__((A.shape[0], A.shape[1]), A.dtype, A.device)
        self._A = A.detach()
        self._symmetric = A.shape[0] == A.shape[1] and is_symmetric(self._A)

    def _apply(self, x: Tensor) -> Tensor:
        return self._A @ x

    def _adjoint(self) -> TorchLinearOperator:
        return self if self._symmetric else TensorLinearOperator(self._A.mH)

    def trace(self) -> Tensor:
        """Return the sum of the diagonal."""
        return self._A.trace()

    def det(self) -> Tensor:
        """Return the determinant."""
        return self._A.det()

    def logdet(self) -> Tensor:
        """Return the logarithm of the determinant."""
        return self._A.logdet()

    def frobenius_norm(self) -> Tensor:
        """Return the root of the sum of all squared entries."""
        return torch.linalg.matrix_norm(self._A)


class OuterProductLinearOperator(
    VectorLinearOperator, torchlinop.LowRankPlusDiagonalLinearOperator
):
    r"""The matrix :math:`\sum_i c_i a_i a_i^\top`.

    Parameters
    ----------
    c
        Coefficients, shape ``(K,)``.
    A
        Vectors in columns, shape ``(D, K)``.
    """

    def __init__(self, c: Tensor, A: Tensor) -> None:
        super().__init__(A.new_zeros(A.shape[0]), A, c)

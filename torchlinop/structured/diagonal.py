"""Diagonal matrices."""

from __future__ import annotations

from torch import Tensor

from torchlinop._interchange import as_tensor
from torchlinop._operator import TorchLinearOperator
from torchlinop._typing import Array


class DiagonalLinearOperator(TorchLinearOperator):
    """A diagonal matrix.

    Parameters
    ----------
    diagonal
        Its entries, shape ``(n,)``: a torch tensor, whose memory is shared, or any other
        array. Integers compute as float64.

    Raises
    ------
    ValueError
        ``diagonal`` is not one-dimensional.

    Examples
    --------
    >>> import torch, torchlinop
    >>> D = torchlinop.DiagonalLinearOperator(torch.tensor([1.0, 2.0]))
    >>> D @ torch.ones(2)
    tensor([1., 2.])
    """

    def __init__(self, diagonal: Array) -> None:
        diagonal = as_tensor(diagonal)
        if diagonal.ndim != 1:
            raise ValueError(
                f"The diagonal has to have shape (n,), got {tuple(diagonal.shape)}."
            )
        n = diagonal.shape[0]
        super().__init__((n, n), diagonal.dtype, diagonal.device)
        self.diagonal = diagonal.detach()

    def _apply(self, x: Tensor) -> Tensor:
        return self.diagonal.unsqueeze(1) * x

    def _adjoint(self) -> TorchLinearOperator:
        if not self.torch_dtype.is_complex:
            return self
        return DiagonalLinearOperator(self.diagonal.conj().resolve_conj())

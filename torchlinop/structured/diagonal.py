"""Diagonal matrices."""

from __future__ import annotations

from torch import Tensor

from torchlinop._algebra import Power
from torchlinop._interchange import as_tensor
from torchlinop._operator import TorchLinearOperator
from torchlinop._typing import Array, Scalar
from torchlinop.structured.base import (
    StructuredLinearOperator,
    damped_inverse,
    norm_of,
    power_of,
    same_place,
    slogdet_of,
)


class DiagonalLinearOperator(StructuredLinearOperator):
    """A diagonal matrix.

    Sums, products, multiples, powers and inverses of diagonal matrices are diagonal.

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
    >>> (D + D).inverse().diagonal()
    tensor([0.5000, 0.2500])
    """

    def __init__(self, diagonal: Array) -> None:
        diagonal = as_tensor(diagonal)
        if diagonal.ndim != 1:
            raise ValueError(
                f"The diagonal has to have shape (n,), got {tuple(diagonal.shape)}."
            )
        n = diagonal.shape[0]
        super().__init__((n, n), diagonal.dtype, diagonal.device)
        self._entries = diagonal.detach()

    def _apply(self, x: Tensor) -> Tensor:
        return self._entries.unsqueeze(1) * x

    def _adjoint(self) -> TorchLinearOperator:
        if not self.torch_dtype.is_complex:
            return self
        return DiagonalLinearOperator(self._entries.conj().resolve_conj())

    def diagonal(self) -> Tensor:
        """Return the entries, shape ``(n,)``."""
        return self._entries.clone()

    def frobenius_norm(self) -> Tensor:
        """Return the root of the sum of all squared entries."""
        return norm_of(self._entries)

    def slogdet(self) -> tuple[Tensor, Tensor]:
        """Return the determinant's sign and the logarithm of its absolute value."""
        return slogdet_of(self._entries)

    def power(self, exponent: float) -> DiagonalLinearOperator:
        """Return the matrix of the entries' powers."""
        return DiagonalLinearOperator(
            power_of(self._entries, exponent, "The diagonal matrix")
        )

    def inverse(self, *, damping: float = 0.0) -> DiagonalLinearOperator:
        r"""Return :math:`(D + \delta I)^{-1}`."""
        return DiagonalLinearOperator(
            damped_inverse(self._entries, damping, "The diagonal matrix")
        )

    def _plus(self, other: TorchLinearOperator) -> TorchLinearOperator:
        if isinstance(other, DiagonalLinearOperator) and same_place(self, other):
            return DiagonalLinearOperator(self._entries + other.diagonal())
        return super()._plus(other)

    def _times(self, other: TorchLinearOperator) -> TorchLinearOperator:
        if isinstance(other, DiagonalLinearOperator) and same_place(self, other):
            return DiagonalLinearOperator(self._entries * other.diagonal())
        return super()._times(other)

    def _scaled(self, alpha: float | complex) -> TorchLinearOperator:
        return DiagonalLinearOperator(self._entries * alpha)

    def _raised(self, p: Scalar) -> TorchLinearOperator:
        _, exponent = Power(self, p).args
        return DiagonalLinearOperator(self._entries**exponent)

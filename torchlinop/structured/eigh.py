"""Matrices that are given by their eigendecomposition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
    total,
    without_noise,
)
from torchlinop.structured.factored import FactoredMatrix


@dataclass(frozen=True)
class Range:
    """Where the eigenvalues of a Kronecker product's function are not all the same.

    They are ``f(0)`` for all eigenvectors in the kernels of the factors, which come first
    in each factor.

    Attributes
    ----------
    vectors : FactoredMatrix
        The other eigenvectors.
    sizes, starts : tuple of int
        How many eigenvectors each factor has, and the first one that is in ``vectors``.
    """

    vectors: FactoredMatrix
    sizes: tuple[int, ...]
    starts: tuple[int, ...]

    def part(self, values: Tensor) -> Tensor:
        """Return the eigenvalues of ``vectors``."""
        return values.view(self.sizes)[tuple(slice(s, None) for s in self.starts)].flatten()


class EighLinearOperator(StructuredLinearOperator):
    r"""A symmetric matrix :math:`Q \,\mathrm{diag}(\lambda)\, Q^\top`.

    Powers and inverses have the same eigenvectors; sums and products with another such
    matrix of the same eigenvectors (the same object) keep them as well.

    Parameters
    ----------
    eigenvalues
        Shape ``(n,)``, real.
    eigenvectors
        An orthogonal matrix, shape ``(n, n)``, or an operator, for instance a
        :class:`~torchlinop.KroneckerLinearOperator` of orthogonal matrices. That it is
        orthogonal is not checked.

    Raises
    ------
    ValueError
        The shapes or devices do not fit.

    Examples
    --------
    >>> import torch
    >>> from torchlinop import EighLinearOperator
    >>> A = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    >>> E = EighLinearOperator(*torch.linalg.eigh(A))
    >>> E.power(2).to_dense().round(decimals=4)
    tensor([[5., 4.],
            [4., 5.]])
    """

    def __init__(self, eigenvalues: Array, eigenvectors: Any) -> None:
        values = as_tensor(eigenvalues).detach()
        if isinstance(eigenvectors, TorchLinearOperator):
            vectors = eigenvectors
        else:
            vectors = FactoredMatrix([as_tensor(eigenvectors).detach()])
        n = vectors.shape[0]
        if vectors.shape != (n, n) or values.shape != (n,):
            raise ValueError(
                "Expected n eigenvalues and an n x n matrix of eigenvectors, got "
                f"{tuple(values.shape)} and {vectors.shape}."
            )
        if values.is_complex():
            raise ValueError(
                "The eigenvalues have to be real: this is a Hermitian matrix. Of complex "
                "ones that have no imaginary parts pass the real parts."
            )
        if values.device != vectors.device:
            raise ValueError(
                f"The eigenvalues are on {values.device}, the eigenvectors on "
                f"{vectors.device}."
            )
        super().__init__((n, n), vectors.torch_dtype, vectors.device)
        self.eigenvectors = vectors
        self._values = values.to(values.new_empty(0, dtype=self.torch_dtype).real.dtype)
        self._range: Range | None = None

    def eigenvalues(self) -> Tensor:
        """Return the eigenvalues in the order of the eigenvectors, shape ``(n,)``."""
        return self._values.clone()

    def of_range(self, found: Range | None) -> EighLinearOperator:
        """Return the same matrix, which is multiplied by way of the range."""
        operator = EighLinearOperator(self._values, self.eigenvectors)
        operator._range = found
        return operator

    def _apply(self, x: Tensor) -> Tensor:
        if self._range is None:
            return self._rotated(self.eigenvectors, self._values, x)
        common = self._values[0]
        values = self._range.part(self._values) - common
        return self._rotated(self._range.vectors, values, x).add_(common * x)

    def _rotated(self, vectors: TorchLinearOperator, values: Tensor, x: Tensor) -> Tensor:
        coordinates = vectors._adjoint()._product(x)
        return vectors._product(values.unsqueeze(1) * coordinates)

    def _adjoint(self) -> TorchLinearOperator:
        return self

    def diagonal(self) -> Tensor:
        """Return the diagonal, shape ``(n,)``."""
        vectors = self.eigenvectors
        if not isinstance(vectors, FactoredMatrix):
            vectors = FactoredMatrix([vectors.to_dense()])
        squares = vectors.squared_entries()
        return squares._product(self._values.unsqueeze(1)).reshape(-1).to(self.torch_dtype)

    def trace(self) -> Tensor:
        """Return the sum of the eigenvalues."""
        return total(self._values)

    def frobenius_norm(self) -> Tensor:
        """Return the root of the sum of the squared eigenvalues."""
        return norm_of(self._values)

    def slogdet(self) -> tuple[Tensor, Tensor]:
        """Return the determinant's sign and the logarithm of its absolute value."""
        return slogdet_of(self._values)

    def power(self, exponent: float) -> EighLinearOperator:
        """Return the matrix of the eigenvalues' powers."""
        values = without_noise(self._values)
        return self._with(power_of(values, exponent, "The matrix"))

    def inverse(self, *, damping: float = 0.0) -> EighLinearOperator:
        r"""Return :math:`(A + \delta I)^{-1}`."""
        values = self._values if damping else without_noise(self._values)
        return self._with(damped_inverse(values, damping, "The matrix"))

    def _with(
        self, values: Tensor, other: EighLinearOperator | None = None
    ) -> EighLinearOperator:
        """Return a function of the eigenvalues, of another matrix's too."""
        found = self._range if other is None or other._range is self._range else None
        return EighLinearOperator(values, self.eigenvectors).of_range(found)

    def _has_vectors_of(self, other: EighLinearOperator) -> bool:
        return same_place(self, other) and other.eigenvectors is self.eigenvectors

    def _plus(self, other: TorchLinearOperator) -> TorchLinearOperator:
        if isinstance(other, EighLinearOperator) and self._has_vectors_of(other):
            return self._with(self._values + other._values, other)
        return super()._plus(other)

    def _times(self, other: TorchLinearOperator) -> TorchLinearOperator:
        if isinstance(other, EighLinearOperator) and self._has_vectors_of(other):
            return self._with(self._values * other._values, other)
        return super()._times(other)

    def _scaled(self, alpha: float | complex) -> TorchLinearOperator:
        if isinstance(alpha, complex):
            return super()._scaled(alpha)
        return self._with(self._values * alpha)

    def _raised(self, p: Scalar) -> TorchLinearOperator:
        _, exponent = Power(self, p).args
        if exponent == 0:  # exactly the identity, which Q Q^T is not
            return super()._raised(p)
        return self._with(self._values**exponent)

"""Kronecker products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from torchlinop._algebra import Power
from torchlinop._interchange import as_tensor
from torchlinop._operator import TorchLinearOperator
from torchlinop._typing import Scalar
from torchlinop.structured.base import (
    StructuredLinearOperator,
    damped_inverse,
    norm_of,
    power_of,
    slogdet_of,
    total,
)
from torchlinop.structured.diagonal import DiagonalLinearOperator
from torchlinop.structured.eigh import EighLinearOperator, Range
from torchlinop.structured.factored import FactoredMatrix
from torchlinop.structured.identity import IdentityLinearOperator
from torchlinop.structured.spectrum import Spectrum, is_symmetric, spectrum_of

#: share of eigenvectors outside of kernels below which the others are left out of products
_FEW = 0.8


class KroneckerLinearOperator(FactoredMatrix, StructuredLinearOperator):
    r"""A Kronecker product :math:`A_1 \otimes A_2 \otimes \dots`.

    Its product with ``vec(X)`` is ``vec(A_1 X A_2^T)`` for two factors and row by row
    vectorization. Products, multiples and powers of Kronecker products are Kronecker
    products. Eigenvalues are those of the factors, each of which is decomposed once.

    Parameters
    ----------
    *factors
        Matrices (tensors, whose memory is shared, or any other arrays), or diagonal and
        identity operators.

    Attributes
    ----------
    factors : tuple of Tensor
        Two-dimensional, or one-dimensional for diagonal factors.

    Raises
    ------
    ValueError
        There is no factor, or one has not two dimensions, or is on another device.

    Examples
    --------
    >>> import torch
    >>> from torchlinop import KroneckerLinearOperator
    >>> A, B = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.diag(torch.tensor([1.0, 4.0]))
    >>> K = KroneckerLinearOperator(A, B)
    >>> torch.equal(K.to_dense(), torch.kron(A, B))
    True
    >>> K.det(), K.power(0.5).trace()
    (tensor(144.), tensor(8.1962))
    """

    def __init__(self, *factors: Any) -> None:
        if not factors:
            raise ValueError("A Kronecker product needs at least one factor.")
        self._setup([_as_factor(factor) for factor in factors], None)

    def _setup(self, factors: list[Tensor], spectra: list[Spectrum] | None) -> None:
        FactoredMatrix.__init__(self, factors)
        self._spectra = spectra
        self._vectors: FactoredMatrix | None = None
        self._range: Range | None = None
        if spectra is not None:
            self._is_symmetric = True

    @classmethod
    def _made(cls, factors: list[Tensor], spectra: list[Spectrum] | None = None) -> Self:
        operator = cls.__new__(cls)
        operator._setup(factors, spectra)
        return operator

    # ------------------------------------------------------------------ the algebra

    def _adjoint(self) -> TorchLinearOperator:
        return self if self._symmetric() else self._made(self._adjoint_factors())

    def _times(self, other: TorchLinearOperator) -> TorchLinearOperator:
        if isinstance(other, KroneckerLinearOperator) and other.device == self.device:
            pairs = list(zip(self.factors, other.factors, strict=False))
            if len(self.factors) == len(other.factors) and all(
                a.shape[-1] == b.shape[0] for a, b in pairs
            ):
                return self._made([_matmul(a, b) for a, b in pairs])
        return super()._times(other)

    def _scaled(self, alpha: float | complex) -> TorchLinearOperator:
        return self._made([self.factors[0] * alpha, *self.factors[1:]])

    def _raised(self, p: Scalar) -> TorchLinearOperator:
        _, exponent = Power(self, p).args
        if any(f.shape[0] != f.shape[-1] for f in self.factors):
            return super()._raised(p)
        return self._made(
            [
                f**exponent if f.ndim == 1 else torch.linalg.matrix_power(f, exponent)
                for f in self.factors
            ]
        )

    # ------------------------------------------------------------------ functions

    def spectra(self) -> list[Spectrum]:
        """Eigendecompositions of the factors, computed once.

        Raises
        ------
        ValueError
            A factor is not symmetric.
        """
        if self._spectra is None:
            self._spectra = [
                spectrum_of(factor, f"Factor {i} of the Kronecker product")
                for i, factor in enumerate(self.factors)
            ]
        return self._spectra

    def known_spectra(self) -> list[Spectrum] | None:
        """Return the decompositions if they have been computed."""
        return self._spectra

    def eigenvalues(self) -> Tensor:
        """Return all eigenvalues, in no order, shape ``(n,)``."""
        return _outer([spectrum.values for spectrum in self.spectra()])

    def diagonal(self) -> Tensor:
        """Return the diagonal, shape ``(n,)``."""
        self._require_square()
        return _outer([f if f.ndim == 1 else f.diagonal() for f in self.factors])

    def trace(self) -> Tensor:
        """Return the product of the factors' traces."""
        self._require_square()
        traces = [total(f if f.ndim == 1 else f.diagonal()) for f in self.factors]
        return torch.stack(traces).prod()

    def frobenius_norm(self) -> Tensor:
        """Return the product of the factors' norms."""
        return torch.stack([norm_of(factor) for factor in self.factors]).prod()

    def slogdet(self) -> tuple[Tensor, Tensor]:
        """Return the determinant's sign and the logarithm of its absolute value."""
        self._require_square()
        sign = torch.ones((), dtype=self.torch_dtype, device=self.device)
        logabs = torch.zeros((), dtype=torch.float64, device=self.device)
        for i, factor in enumerate(self.factors):
            if factor.ndim == 1:
                parts = slogdet_of(factor)
            elif is_symmetric(factor):
                parts = slogdet_of(self.spectra()[i].values)
            else:
                parts = torch.linalg.slogdet(factor)
            times = self.shape[0] // factor.shape[0]
            sign = sign * parts[0] ** (times % 2 if not sign.is_complex() else times)
            logabs = logabs + times * parts[1].double()
        return sign, logabs.to(parts[1].dtype)

    def power(self, exponent: float) -> KroneckerLinearOperator:
        """Return the Kronecker product of the factors' powers."""
        spectra = []
        for i, spectrum in enumerate(self.spectra()):
            what = f"Factor {i} of the Kronecker product"
            values = power_of(spectrum.values, exponent, what, spectrum.smallest)
            spectra.append(spectrum.with_values(values))
        return self.of_spectra(spectra)

    def inverse(self, *, damping: float = 0.0) -> TorchLinearOperator:
        r"""Return :math:`(A + \delta I)^{-1}` by the factors' eigendecompositions.

        A Kronecker product if there is no damping.
        """
        if damping:
            values = damped_inverse(self.eigenvalues(), damping, "The Kronecker product")
            return self.with_eigenvalues(values).of_range(self._find_range())
        self._require_square()
        if all(f.ndim == 1 or is_symmetric(f) for f in self.factors):
            return self.power(-1)
        return self._made(
            [1 / f if f.ndim == 1 else torch.linalg.inv(f) for f in self.factors]
        )

    def with_eigenvalues(self, values: Tensor) -> EighLinearOperator:
        """Return the matrix with the same eigenvectors and other eigenvalues."""
        if self._vectors is None:
            self._vectors = FactoredMatrix(
                [
                    torch.ones_like(s.values) if s.vectors is None else s.vectors
                    for s in self.spectra()
                ]
            )
        return EighLinearOperator(values, self._vectors)

    def _find_range(self) -> Range | None:
        """Return the eigenvectors that are in no factor's kernel, if they are few."""
        if self._range is None:
            spectra = self.spectra()
            starts = [0 if s.vectors is None else _first_positive(s) for s in spectra]
            sizes = [len(spectrum.values) for spectrum in spectra]
            left = math.prod(n - s for n, s in zip(sizes, starts, strict=True))
            if left > _FEW * math.prod(sizes):
                return None
            vectors = [
                torch.ones_like(s.values) if s.vectors is None else s.vectors[:, start:]
                for s, start in zip(spectra, starts, strict=True)
            ]
            thin = FactoredMatrix([v.contiguous() for v in vectors])
            self._range = Range(thin, tuple(sizes), tuple(starts))
        return self._range

    @classmethod
    def of_spectra(cls, spectra: Sequence[Spectrum]) -> Self:
        """Return the product of symmetric factors whose decompositions are known."""
        return cls._made([spectrum.matrix() for spectrum in spectra], list(spectra))

    @classmethod
    def of_factors(cls, factors: Sequence[Tensor], spectra: list[Spectrum] | None) -> Self:
        """Return the product of factors whose decompositions may be known."""
        return cls._made(list(factors), spectra)

    def _require_square(self) -> None:
        for factor in self.factors:
            if factor.shape[0] != factor.shape[-1]:
                raise ValueError(
                    "Only square factors have traces, determinants and inverses, got "
                    f"shape {tuple(factor.shape)}."
                )


def _first_positive(spectrum: Spectrum) -> int:
    """Return how many zeros come first, at least one eigenvalue less than there are."""
    return int((spectrum.values == 0).cumprod(0)[:-1].sum())


def _as_factor(factor: Any) -> Tensor:
    if isinstance(factor, (DiagonalLinearOperator, IdentityLinearOperator)):
        return factor.diagonal()
    if isinstance(factor, TorchLinearOperator):
        return factor.to_dense()
    return as_tensor(factor).detach()


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    if a.ndim == 2 and b.ndim == 2:
        dtype = torch.promote_types(a.dtype, b.dtype)
        return a.to(dtype) @ b.to(dtype)
    if a.ndim == 1:
        return a * b if b.ndim == 1 else a.unsqueeze(1) * b
    return a * b


def _outer(parts: Sequence[Tensor]) -> Tensor:
    product = parts[0]
    for part in parts[1:]:
        product = (product.unsqueeze(1) * part).reshape(-1)
    return product.clone() if len(parts) == 1 else product

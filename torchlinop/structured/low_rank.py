"""Diagonal matrices with a low-rank correction."""

from __future__ import annotations

import torch
from torch import Tensor

from torchlinop._interchange import as_tensor
from torchlinop._operator import TorchLinearOperator
from torchlinop._typing import Array
from torchlinop.structured.base import (
    StructuredLinearOperator,
    damped_inverse,
    power_of,
    same_place,
    slogdet_of,
    without_noise,
)
from torchlinop.structured.diagonal import DiagonalLinearOperator


class LowRankPlusDiagonalLinearOperator(StructuredLinearOperator):
    r"""A matrix :math:`\mathrm{diag}(d) + U \,\mathrm{diag}(s)\, U^\top`.

    Sums, multiples and inverses of such matrices are such matrices.

    Parameters
    ----------
    diagonal
        :math:`d`, shape ``(n,)``, real.
    factor
        :math:`U`, shape ``(n, r)``.
    weights
        :math:`s`, shape ``(r,)``; ones by default.

    Raises
    ------
    ValueError
        The shapes or devices do not fit.

    References
    ----------
    Woodbury's identity and the matrix determinant lemma: Golub and Van Loan, "Matrix
    Computations", 4th edition (2013), section 2.1

    Examples
    --------
    >>> import torch
    >>> from torchlinop import LowRankPlusDiagonalLinearOperator
    >>> A = LowRankPlusDiagonalLinearOperator(torch.ones(3), torch.ones(3, 1))
    >>> A.det()  # the eigenvalues are 1, 1 and 4
    tensor(4.)
    >>> A.inverse() @ torch.ones(3)
    tensor([0.2500, 0.2500, 0.2500])
    """

    def __init__(
        self, diagonal: Array, factor: Array, weights: Array | None = None
    ) -> None:
        d, U = as_tensor(diagonal).detach(), as_tensor(factor).detach()
        s = U.new_ones(U.shape[-1]) if weights is None else as_tensor(weights).detach()
        if U.ndim != 2 or d.shape != U.shape[:1] or s.shape != U.shape[1:]:
            raise ValueError(
                "Expected a diagonal (n,), a factor (n, r) and weights (r,), got "
                f"{tuple(d.shape)}, {tuple(U.shape)} and {tuple(s.shape)}."
            )
        if not d.device == U.device == s.device:
            raise ValueError(
                f"The parts are on several devices: {d.device}, {U.device}, {s.device}."
            )
        if d.is_complex() or U.is_complex() or s.is_complex():
            raise ValueError("The diagonal, the factor and the weights have to be real.")
        dtype = torch.promote_types(torch.promote_types(d.dtype, U.dtype), s.dtype)
        n = d.shape[0]
        super().__init__((n, n), dtype, d.device)
        self._d, self._U, self._s = d.to(dtype), U.to(dtype), s.to(dtype)

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """The diagonal, the factor and its weights."""
        return self._d, self._U, self._s

    def _apply(self, x: Tensor) -> Tensor:
        low = self._U @ (self._s.unsqueeze(1) * (self._U.mT @ x))
        return low.add_(self._d.unsqueeze(1) * x)

    def _adjoint(self) -> TorchLinearOperator:
        return self

    def diagonal(self) -> Tensor:
        """Return the diagonal, shape ``(n,)``."""
        return self._d + self._U.square() @ self._s

    def frobenius_norm(self) -> Tensor:
        """Return the root of the sum of all squared entries."""
        d, U, s = self._d.double(), self._U.double(), self._s.double()
        gram = U.mT @ U
        mixed = 2 * (d.unsqueeze(1) * U.square()).sum(0) @ s
        low = (s.unsqueeze(1) * gram * s * gram).sum()
        return (d.square().sum() + mixed + low).clamp(min=0).sqrt().to(self.torch_dtype)

    def slogdet(self) -> tuple[Tensor, Tensor]:
        """Return the determinant's sign and the logarithm of its absolute value."""
        zeros = int((self._d == 0).sum())
        if zeros > len(self._s):  # the rank is less than n
            sign = torch.zeros((), dtype=self.torch_dtype, device=self.device)
            return sign, torch.full_like(sign, -torch.inf)
        if zeros:
            return torch.linalg.slogdet(self.to_dense())
        sign, logabs = slogdet_of(self._d)
        capacitance = self._capacitance(self._d)
        low = torch.linalg.slogdet(capacitance)
        return sign * low[0].to(sign), logabs + low[1].to(logabs)

    def _capacitance(self, d: Tensor) -> Tensor:
        """Return ``I + diag(s) U^T diag(d)^-1 U`` in float64."""
        U, s = self._U.double(), self._s.double()
        product = s.unsqueeze(1) * (U.mT @ (U / d.double().unsqueeze(1)))
        return product + torch.eye(len(s), dtype=product.dtype, device=product.device)

    def inverse(self, *, damping: float = 0.0) -> LowRankPlusDiagonalLinearOperator:
        r"""Return :math:`(A + \delta I)^{-1}` by Woodbury's identity.

        Raises
        ------
        ValueError
            The damped diagonal has a zero, or the matrix is singular.
        """
        inverse_diagonal = damped_inverse(self._d, damping, "The diagonal part")
        capacitance = self._capacitance(self._d + damping)
        middle, info = torch.linalg.solve_ex(capacitance, torch.diag(self._s.double()))
        if int(info) or not torch.isfinite(middle).all():
            smallest = torch.linalg.svdvals(capacitance).min().item()
            raise ValueError(
                "The matrix is singular: the smallest singular value of its capacitance "
                f"matrix is {smallest:.3e}. Pass a positive damping."
            )
        # middle is symmetric: -Q diag(w) Q^T are the new weights
        w, Q = torch.linalg.eigh((middle + middle.mT) / 2)
        factor = inverse_diagonal.unsqueeze(1) * (self._U @ Q.to(self.torch_dtype))
        return LowRankPlusDiagonalLinearOperator(
            inverse_diagonal, factor, -w.to(self.torch_dtype)
        )

    def power(self, exponent: float) -> TorchLinearOperator:
        """Return a power: -1 and 1 of any, others where the diagonal part is constant.

        Raises
        ------
        ValueError
            The power has no such structure, or does not exist.
        """
        if exponent == 1:
            return self
        if exponent == -1:
            return self.inverse()
        if bool((self._d != self._d[0]).any()):
            raise ValueError(
                f"The power {exponent} of a low-rank matrix plus a diagonal has no such "
                "structure, unless the diagonal is constant. For a small one use "
                "EighLinearOperator(*torch.linalg.eigh(A.to_dense()))."
            )
        Q, R = torch.linalg.qr(self._U)
        low, vectors = torch.linalg.eigh((R * self._s) @ R.mT)
        values = without_noise(torch.cat([self._d[:1], self._d[0] + low]))
        if len(low) == len(self._d):  # the constant is no eigenvalue of its own
            powers = power_of(values[1:], exponent, "The matrix")
            rest = torch.zeros_like(powers[:1])
        else:
            powers = power_of(values, exponent, "The matrix")
            rest, powers = powers[:1], powers[1:]
        return LowRankPlusDiagonalLinearOperator(
            rest.expand(len(self._d)), Q @ vectors, powers - rest
        )

    def _plus(self, other: TorchLinearOperator) -> TorchLinearOperator:
        if isinstance(other, DiagonalLinearOperator) and same_place(self, other):
            d = self._d + other.diagonal()
            if not d.is_complex():
                return LowRankPlusDiagonalLinearOperator(d, self._U, self._s)
        if isinstance(other, LowRankPlusDiagonalLinearOperator) and same_place(self, other):
            assert isinstance(other, LowRankPlusDiagonalLinearOperator)
            return LowRankPlusDiagonalLinearOperator(
                self._d + other._d,
                torch.cat([self._U, other._U], dim=1),
                torch.cat([self._s, other._s]),
            )
        return super()._plus(other)

    def _scaled(self, alpha: float | complex) -> TorchLinearOperator:
        if isinstance(alpha, complex):
            return super()._scaled(alpha)
        return LowRankPlusDiagonalLinearOperator(alpha * self._d, self._U, alpha * self._s)

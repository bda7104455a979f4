"""Matrices with a spectrum of our choice, and operators that misbehave."""

from __future__ import annotations

import torch
from torch import Tensor
from torchlinop import TorchLinearOperator


def with_spectrum(values: Tensor, dtype: torch.dtype = torch.float64, seed: int = 0):
    """A Hermitian matrix with these eigenvalues and random eigenvectors."""
    n = len(values)
    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float64)
    Q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=wide))
    matrix = (Q * values.to(torch.float64)) @ Q.mH
    return ((matrix + matrix.mH) / 2).to(dtype)


def decaying(n: int = 60, rate: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Positive definite with eigenvalues ``j^-rate``."""
    return with_spectrum(torch.arange(1, n + 1).double() ** -rate, dtype)


class Counted(TorchLinearOperator):
    """A matrix as an operator that counts the vectors it multiplies."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(tuple(matrix.shape), matrix.dtype, matrix.device)
        self.matrix, self.columns = matrix, 0

    def _apply(self, x: Tensor) -> Tensor:
        self.columns += x.shape[1]
        return self.matrix @ x

    def _adjoint(self) -> TorchLinearOperator:
        return self


class Failing(Counted):
    """Raises after a number of products."""

    def __init__(self, matrix: Tensor, after: int, error: BaseException) -> None:
        super().__init__(matrix)
        self.after, self.error = after, error

    def _apply(self, x: Tensor) -> Tensor:
        if self.columns >= self.after:
            raise self.error
        return super()._apply(x)

"""Kronecker products of matrices by their factors: products with vectors."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torchlinop._operator import TorchLinearOperator


class FactoredMatrix(TorchLinearOperator):
    """A Kronecker product of matrices of any shapes; one of one factor is that matrix.

    Parameters
    ----------
    factors
        Two-dimensional, or one-dimensional for diagonal matrices.
    """

    def __init__(self, factors: Sequence[Tensor]) -> None:
        dtype = functools.reduce(torch.promote_types, (f.dtype for f in factors))
        device = factors[0].device
        for factor in factors:
            if factor.ndim not in (1, 2):
                raise ValueError(
                    f"A factor has to be a matrix, got shape {tuple(factor.shape)}."
                )
            if factor.device != device:
                raise ValueError(
                    f"All factors have to be on one device, got {device} and "
                    f"{factor.device}."
                )
        rows = math.prod(factor.shape[0] for factor in factors)
        columns = math.prod(factor.shape[-1] for factor in factors)
        TorchLinearOperator.__init__(self, (rows, columns), dtype, device)
        self.factors = tuple(factor.to(dtype) for factor in factors)
        self._is_symmetric: bool | None = None

    def _apply(self, x: Tensor) -> Tensor:
        k = x.shape[1]
        y = x.T
        before, after = 1, x.shape[0]
        for factor in self.factors:
            after //= factor.shape[-1]
            y = y.reshape(k * before, factor.shape[-1], after)
            if factor.ndim == 1:
                y = factor.unsqueeze(1) * y
            elif after == 1:
                y = y.squeeze(2) @ factor.mT
            else:
                y = factor @ y
            before *= factor.shape[0]
        return y.reshape(k, self.shape[0]).T

    def _adjoint(self) -> TorchLinearOperator:
        return self if self._symmetric() else FactoredMatrix(self._adjoint_factors())

    def _adjoint_factors(self) -> list[Tensor]:
        return [_adjoint(factor) for factor in self.factors]

    def _symmetric(self) -> bool:
        if self._is_symmetric is None:
            self._is_symmetric = all(
                f.shape[0] == f.shape[-1] and torch.equal(f, _adjoint(f))
                for f in self.factors
            )
        return self._is_symmetric

    def squared_entries(self) -> FactoredMatrix:
        """Return the matrix of the squared absolute values of all entries."""
        return FactoredMatrix([factor.abs().square() for factor in self.factors])


def _adjoint(factor: Tensor) -> Tensor:
    return factor.conj().resolve_conj() if factor.ndim == 1 else factor.mH

"""Matrices with a spectrum that was chosen."""

from __future__ import annotations

import numpy as np
import torch
from torchlinop import TorchLinearOperator, aslinearoperator


def with_spectrum(
    spectrum: np.ndarray, dtype: torch.dtype = torch.float64
) -> tuple[TorchLinearOperator, np.ndarray]:
    """A symmetric operator with these eigenvalues, and its eigenvectors as columns."""
    size = len(spectrum)
    V, _ = np.linalg.qr(np.random.default_rng(5).standard_normal((size, size)))
    dense = torch.from_numpy(V * spectrum @ V.T).to(dtype)
    return Symmetric((dense + dense.T) / 2), V


class Symmetric(TorchLinearOperator):
    """A dense matrix that is its own adjoint, as the curvature matrices are."""

    def __init__(self, dense: torch.Tensor) -> None:
        super().__init__(tuple(dense.shape), dense.dtype, dense.device)
        self.dense = dense

    def _apply(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense @ x

    def _adjoint(self) -> TorchLinearOperator:
        return self


def dense_operator(array: np.ndarray) -> TorchLinearOperator:
    """Any matrix as an operator."""
    return aslinearoperator(torch.from_numpy(np.ascontiguousarray(array)))

"""What every test of CuPy arrays compares."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

TORCH = {
    "f": torch.float32,
    "d": torch.float64,
    "F": torch.complex64,
    "D": torch.complex128,
}
REAL = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def torch_dtype(dtype: Any) -> torch.dtype:
    return TORCH[np.dtype(dtype).char]


def close(actual: Any, matrix: np.ndarray, x: np.ndarray, dtype: Any) -> None:
    """Compare with ``matrix @ x`` to some tens of ulps of the largest possible entry."""
    scale = np.abs(matrix).sum(axis=1).max() * max(np.abs(x).max(initial=0), 1)
    atol = 100 * np.finfo(dtype).eps * scale
    np.testing.assert_allclose(actual.get(), matrix @ x, rtol=0, atol=atol)


def check_result(cupy: ModuleType, y: Any, shape: tuple, dtype: Any) -> None:
    """CuPy's kind, the dtype and shape of a dense product, and memory to write to."""
    assert type(y) is cupy.ndarray
    assert y.shape == shape
    assert y.dtype == dtype
    assert y.flags.c_contiguous
    copy = y.copy()
    y.fill(7)
    np.testing.assert_array_equal(y.get(), 7)
    y[...] = copy


def check_eigenpairs(dense, values, vectors, expected, dtype):
    """Compare with the dense eigenvalues, and check vectors by their residuals."""
    atol = 1e3 * np.finfo(dtype).eps * np.linalg.norm(dense, 2)
    values, vectors = values.get(), vectors.get()
    np.testing.assert_allclose(values, expected, rtol=0, atol=atol)
    np.testing.assert_allclose(dense @ vectors, vectors * values, rtol=0, atol=atol)
    gram = vectors.conj().T @ vectors
    np.testing.assert_allclose(gram, np.eye(len(values)), rtol=0, atol=atol)

"""Scalars and matrices of CuPy in expressions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchlinop import (
    DiagonalLinearOperator,
    TorchLinearOperator,
    aslinearoperator,
)

from tests.cases import CASES
from tests.cupyx.checks import REAL, check_result, close, torch_dtype


@REAL
@pytest.mark.parametrize("char", "iqefd")
def test_0d_arrays_are_scalars(cupy, dtype, char):
    A, dense = CASES["damped_ggn"](torch_dtype(dtype))
    two = cupy.asarray(np.array(2, char))
    assert two.shape == ()
    x = np.linspace(-1, 1, A.shape[1]).astype(dtype)
    for scaled, matrix in [
        *((B, 2 * dense) for B in (two * A, A * two, A.dot(two), A(two))),
        (A / two, dense / 2),
        (A**two, dense @ dense),
    ]:
        assert isinstance(scaled, TorchLinearOperator)
        assert scaled.dtype == dtype  # a scalar changes no precision
        close(scaled @ cupy.asarray(x), matrix, x, dtype)
    for wrong in (lambda: A @ two, lambda: two @ A):
        with pytest.raises(ValueError, match="use \\* instead"):
            wrong()


@REAL
def test_0d_complex_arrays_are_scalars(cupy, dtype):
    A, dense = CASES["damped_ggn"](torch_dtype(dtype))
    scalar = cupy.asarray(np.array(1 - 2j))
    x = np.linspace(-1, 1, A.shape[1]).astype(dtype)
    for scaled in (scalar * A, A * scalar):
        assert scaled.dtype == np.result_type(dtype, "F")
        y = scaled @ cupy.asarray(x)
        assert y.dtype == scaled.dtype
        close(y, (1 - 2j) * dense, x, dtype)


@REAL
def test_cupy_matrices_are_operands(cupy, dtype, rng):
    A, dense = CASES["ggn"](torch_dtype(dtype))
    host = rng.standard_normal(A.shape).astype(dtype)
    matrix = cupy.asarray(host)
    x = rng.standard_normal(A.shape[1]).astype(dtype)
    for B, expected in [
        (aslinearoperator(matrix), host),
        (aslinearoperator(matrix).H, host.T),
        (A + matrix, dense + host),
        (matrix + A, dense + host),
        (A - matrix, dense - host),
        (matrix - A, host - dense),
        (A @ aslinearoperator(matrix), dense @ host),
        (DiagonalLinearOperator(matrix[0]), np.diag(host[0])),
    ]:
        assert isinstance(B, TorchLinearOperator)
        assert B.dtype == dtype
        y = B @ cupy.asarray(x)
        check_result(cupy, y, x.shape, dtype)
        close(y, expected, x, dtype)


@pytest.mark.parametrize(
    ("build", "reference"),
    [
        (lambda A, m: aslinearoperator(m[::-1]), lambda A, m: m[::-1]),
        (lambda A, m: aslinearoperator(m[:, ::-1]), lambda A, m: m[:, ::-1]),
        (lambda A, m: A + m[::-1], lambda A, m: A + m[::-1]),
        (lambda A, m: m[::-1] - A, lambda A, m: m[::-1] - A),
        (lambda A, m: DiagonalLinearOperator(m[0, ::-1]), lambda A, m: np.diag(m[0, ::-1])),
    ],
    ids=["rows reversed", "columns reversed", "summand", "minuend", "diagonal"],
)
def test_operators_made_of_reversed_cupy_arrays(cupy, build, reference):
    A, dense = CASES["ggn"](torch.float64)
    x = np.linspace(-1, 1, A.shape[1])
    host = np.arange(float(dense.size)).reshape(dense.shape) / dense.size
    y = build(A, cupy.asarray(host)) @ cupy.asarray(x)
    check_result(cupy, y, x.shape, float)
    close(y, reference(dense, host), x, float)


@pytest.mark.parametrize(
    ("char", "computed"),
    [*zip("fdFD", "fdFD", strict=True), ("e", "f"), ("i", "d"), ("?", "d")],
)
def test_operators_made_of_cupy_arrays_compute_in_their_dtype(cupy, char, computed):
    host = np.array([[0, 1], [1, 1]], char)
    x = np.array([1, 2], computed)
    for A, dense in [
        (aslinearoperator(cupy.asarray(host)), host),
        (DiagonalLinearOperator(cupy.asarray(host[0])), np.diag(host[0])),
    ]:
        assert A.dtype == computed
        y = A @ cupy.asarray(x)
        check_result(cupy, y, (2,), computed)
        close(y, dense.astype(computed), x, computed)

"""Every operator, on every kind of array, obeys every law."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torchlinop import TorchLinearOperator

from tests.cases import CASES, numpy_dtype
from tests.conftest import array_api_strict

pytestmark = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@pytest.fixture(params=list(CASES))
def case(request, dtype):
    return CASES[request.param](dtype)


def tolerance(dense: np.ndarray, dtype: torch.dtype, x: np.ndarray) -> dict:
    """Rounding of a product: some tens of ulps of the largest possible entry."""
    scale = np.abs(dense).sum(axis=1).max() * max(np.abs(x).max(initial=0), 1)
    return {"rtol": 0, "atol": 100 * torch.finfo(dtype).eps * scale}


def close(actual, dense, x, dtype, *, expected=None):
    """Compare a product with the dense one."""
    expected = dense @ x if expected is None else expected
    np.testing.assert_allclose(actual, expected, **tolerance(dense, dtype, x))


def vector(rng, n, dtype, *, columns=None):
    shape = n if columns is None else (n, columns)
    return rng.standard_normal(shape).astype(numpy_dtype(dtype))


def test_is_a_scipy_operator(case, dtype):
    A, dense = case
    assert isinstance(A, TorchLinearOperator)
    assert isinstance(A, scipy.sparse.linalg.LinearOperator)
    assert scipy.sparse.linalg.aslinearoperator(A) is A
    assert A.to_scipy() is A
    assert A.shape == dense.shape
    real = numpy_dtype(dtype)
    assert A.dtype == (np.result_type(real, "F") if np.iscomplexobj(dense) else real)
    assert isinstance(A.dtype, np.dtype)
    assert f"{A.shape[0]}x{A.shape[1]}" in repr(A)


@pytest.mark.parametrize("columns", [None, 0, 1, 3])
def test_product_equals_dense(case, arrays, dtype, columns, rng):
    A, dense = case
    x = vector(rng, A.shape[1], dtype, columns=columns)
    for _ in range(6):  # recorded kernels are replayed from the fourth product on
        y = arrays.read(A @ arrays.make(x))
    assert y.dtype == A.dtype
    assert y.shape == (dense @ x).shape
    close(y, dense, x, dtype)


def test_all_spellings_agree(case, arrays, dtype, rng):
    A, dense = case
    m, n = A.shape
    x, X = vector(rng, n, dtype), vector(rng, n, dtype, columns=2)
    u, U = vector(rng, m, dtype), vector(rng, m, dtype, columns=2)
    make, read = arrays.make, arrays.read
    for product in (A.matvec, A.dot, A, A._matvec, lambda v: A * v):
        close(read(product(make(x))), dense, x, dtype)
    for product in (A.matmat, A.dot, A, A._matmat):
        close(read(product(make(X))), dense, X, dtype)
    close(read(A.matvec(make(x[:, None]))), dense, x[:, None], dtype)
    H = dense.conj().T
    for product in (A.rmatvec, A.H.matvec, A._rmatvec, A.adjoint()):
        close(read(product(make(u))), H, u, dtype)
    for product in (A.rmatmat, A.H.matmat, A._rmatmat):
        close(read(product(make(U))), H, U, dtype)
    close(read(A.T @ make(u)), dense.T, u, dtype)
    close(read(A.transpose() @ make(U)), dense.T, U, dtype)
    close(read(A.rdot(make(u))), dense.T, u, dtype)
    close(read(A.rdot(make(np.ascontiguousarray(U.T)))).T, dense.T, U, dtype)


def test_array_on_the_left(case, arrays, dtype, rng):
    A, dense = case
    if arrays.kind.value == "array-api-strict":
        pytest.skip("array-api-strict refuses foreign operands before we are asked")
    u, U = vector(rng, A.shape[0], dtype), vector(rng, A.shape[0], dtype, columns=2)
    close(arrays.read(arrays.make(u) @ A), dense.T, u, dtype)
    close(arrays.read(arrays.make(np.ascontiguousarray(U.T)) @ A).T, dense.T, U, dtype)


def test_adjoint_dot(case, arrays, dtype, rng):
    A, dense = case
    x, u = vector(rng, A.shape[1], dtype), vector(rng, A.shape[0], dtype)
    left = np.vdot(u, arrays.read(A @ arrays.make(x)))
    right = np.vdot(arrays.read(A.H @ arrays.make(u)), x)
    bound = np.abs(u) @ np.abs(dense) @ np.abs(x)
    assert abs(left - right) <= 100 * torch.finfo(dtype).eps * bound


def test_linearity(case, arrays, dtype, rng):
    A, dense = case
    x, z = vector(rng, A.shape[1], dtype), vector(rng, A.shape[1], dtype)
    y = arrays.read(A @ arrays.make(2 * x - z))
    parts = 2 * arrays.read(A @ arrays.make(x)) - arrays.read(A @ arrays.make(z))
    scale = 3 * max(np.abs(x).max(), np.abs(z).max())
    np.testing.assert_allclose(y, parts, **tolerance(dense, dtype, np.array([scale])))


def test_algebra(case, arrays, dtype, rng):
    A, dense = case
    make, read = arrays.make, arrays.read
    x, u = vector(rng, A.shape[1], dtype), vector(rng, A.shape[0], dtype)
    close(read((2 * A) @ make(x)), 2 * dense, x, dtype)
    close(read((A * 2) @ make(x)), 2 * dense, x, dtype)
    close(read((A / 4) @ make(x)), dense / 4, x, dtype)
    close(read((-A) @ make(x)), -dense, x, dtype)
    close(read((A + A) @ make(x)), 2 * dense, x, dtype)
    close(read((A - 3 * A) @ make(x)), -2 * dense, x, dtype)
    gram = dense.conj().T @ dense
    slack = {"rtol": 0, "atol": 1e3 * torch.finfo(dtype).eps * np.linalg.norm(dense) ** 2}
    slack["atol"] *= max(np.abs(x).max(), 1) * len(x)
    np.testing.assert_allclose(read((A.H @ A) @ make(x)), gram @ x, **slack)
    np.testing.assert_allclose(read((A.H @ A) ** 0 @ make(x)), x)
    close(read((A + A).H @ make(u)), 2 * dense.conj().T, u, dtype)
    close(read((3 * A).T @ make(u)), 3 * dense.T, u, dtype)


def test_scalars_keep_the_precision(case, dtype):
    A, _ = case
    for scalar in (2, 2.0, np.float64(2), np.array(2.0), torch.tensor(2.0), True):
        assert (scalar * A).dtype == A.dtype
        assert (A * scalar).dtype == A.dtype
        assert (A / scalar).dtype == A.dtype
    assert (1j * A).dtype == np.result_type(A.dtype, np.complex64)


INPUT_DTYPES = ["?", "i1", "i8", "u4", "f2", "f4", "f8", "c8", "c16"]


@pytest.mark.parametrize("input_dtype", INPUT_DTYPES)
def test_result_dtype_is_that_of_a_matrix(case, dtype, input_dtype, rng):
    A, dense = case
    x = (4 * rng.standard_normal(A.shape[1])).astype(np.dtype(input_dtype))
    if input_dtype[0] == "c":
        x = x + (1j * rng.standard_normal(A.shape[1])).astype(x.dtype)
    y = A @ x
    assert y.dtype == np.result_type(A.dtype, x.dtype)
    close(y, dense, x.astype(np.result_type(x, "f4")), dtype)


def _strided(a):
    return np.repeat(a, 3, axis=0)[::3]


LAYOUTS = {
    "negative stride": lambda a: a[::-1].copy()[::-1],
    "strided": _strided,
    "negative and strided": lambda a: _strided(a[::-1])[::-1],
    "fortran": np.asfortranarray,
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "packed": lambda a: _packed(a),
    "unaligned": lambda a: _unaligned(a),
    "matrix": lambda a: np.asmatrix(a) if a.ndim == 2 else a,
    "longdouble": lambda a: a.astype(np.longdouble),
    "list": lambda a: a.tolist(),
}


def _packed(a):
    record = np.zeros(a.shape, dtype=[("pad", "i1"), ("value", a.dtype)])
    record["value"] = a
    return record["value"]


def _unaligned(a):
    memory = np.zeros(a.nbytes + 1, dtype=np.uint8)
    view = memory[1:].view(a.dtype).reshape(a.shape)
    view[...] = a
    return view


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("columns", [None, 2])
def test_any_layout(case, dtype, layout, columns, rng):
    A, dense = case
    x = vector(rng, A.shape[1], dtype, columns=columns)
    given = LAYOUTS[layout](x)
    kept = np.array(given, copy=True)
    y = A @ given
    close(np.asarray(y), dense, x, dtype)
    np.testing.assert_array_equal(np.asarray(given), kept)
    assert isinstance(y, np.matrix) == (layout == "matrix" and columns is not None)


def test_output_is_fresh(case, arrays, dtype, rng):
    A, dense = case
    x = vector(rng, A.shape[1], dtype)
    given = arrays.make(x)
    kept = []
    for _ in range(6):
        y = A @ given
        kept.append((y, arrays.read(y).copy()))
        other = arrays.make(np.ones_like(x))
        z = A @ other
        arrays.fill(z, np.nan)
    for y, copy in kept:
        np.testing.assert_array_equal(arrays.read(y), copy)
        arrays.fill(y, np.nan)
    np.testing.assert_array_equal(arrays.read(given), x)
    close(arrays.read(A @ given), dense, x, dtype)


def test_input_is_not_kept(case, arrays, dtype, rng):
    A, dense = case
    x = vector(rng, A.shape[1], dtype)
    given = arrays.make(x)
    y = A @ given
    arrays.fill(given, np.nan)
    close(arrays.read(y), dense, x, dtype)
    close(arrays.read(A @ arrays.make(x)), dense, x, dtype)


def test_reversed_array_of_another_library(dtype):
    """Handing one to torch directly would abort the process."""
    strict = array_api_strict()
    A, dense = CASES["ggn"](dtype)
    x = np.arange(len(dense), dtype=numpy_dtype(dtype))
    y = A @ strict.asarray(x.copy())[::-1]
    close(np.from_dlpack(y), dense, x[::-1], dtype)


def test_output_is_contiguous(case, dtype, rng):
    A, _ = case
    X = vector(rng, A.shape[1], dtype, columns=3)
    assert (A @ X).flags.c_contiguous
    assert (A @ X[:, :1]).flags.c_contiguous
    assert (A @ torch.from_numpy(X)).is_contiguous()


def test_dense_matrix(case, dtype):
    A, dense = case
    close(A.to_dense().numpy(), dense, np.eye(A.shape[1]), dtype)

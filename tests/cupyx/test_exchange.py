"""CuPy arrays in, CuPy arrays out, in shared memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import as_strided

from tests.cases import CASES
from tests.cupyx.checks import REAL, check_result, close, torch_dtype


@pytest.mark.parametrize("columns", [None, 0, 3])
@REAL
@pytest.mark.parametrize("case", list(CASES))
def test_every_operator_takes_and_returns_cupy_arrays(cupy, case, dtype, columns, rng):
    A, dense = CASES[case](torch_dtype(dtype))
    for operator, matrix in ((A, dense), (A.H, dense.conj().T), (A.T, dense.T)):
        host = rng.standard_normal((matrix.shape[1], columns or 1))[:, :columns]
        host = (host[:, 0] if columns is None else host).astype(dtype)
        x = cupy.asarray(host)
        # recorded kernels are replayed from the fourth product of vectors on
        for _ in range(5 if columns is None else 1):
            y = operator @ x
        check_result(cupy, y, (matrix @ host).shape, A.dtype)
        close(y, matrix, host, dtype)
        np.testing.assert_array_equal(x.get(), host)


@REAL
@pytest.mark.parametrize("case", ["ggn", "jacobian", "complex_matrix", "complex_shift"])
def test_every_spelling_of_a_product(cupy, case, dtype, rng):
    A, dense = CASES[case](torch_dtype(dtype))
    m, n = A.shape
    x, X = (cupy.asarray(rng.standard_normal(s).astype(dtype)) for s in ((n,), (n, 3)))
    u, U = (cupy.asarray(rng.standard_normal(s).astype(dtype)) for s in ((m,), (m, 3)))
    column, other_column = x.reshape(-1, 1), u.reshape(-1, 1)
    adjoint = dense.conj().T
    for y, matrix, factor in [
        *((f(x), dense, x) for f in (A, A.dot, A.matvec, A.__mul__)),
        *((f(X), dense, X) for f in (A, A.dot, A.matmat, A.__matmul__)),
        *((f(u), adjoint, u) for f in (A.rmatvec, A.H.matvec, A.H)),
        *((f(U), adjoint, U) for f in (A.rmatmat, A.H.matmat, A.H)),
        (A.matvec(column), dense, column),
        (A.rmatvec(other_column), adjoint, other_column),
        (u @ A, dense.T, u),
        (u * A, dense.T, u),
    ]:
        check_result(cupy, y, (len(matrix), *factor.shape[1:]), A.dtype)
        close(y, matrix, factor.get(), dtype)
    y = U.T @ A
    assert type(y) is cupy.ndarray
    assert y.dtype == A.dtype
    assert y.flags.c_contiguous or y.flags.f_contiguous
    close(y.T, dense.T, U.get(), dtype)


INPUTS = "?bBhiqefdFD"


@pytest.mark.parametrize("char", INPUTS)
@pytest.mark.parametrize("case", ["ggn", "jacobian_transposed", "complex_matrix"])
@REAL
def test_dtypes_promote_as_those_of_dense_matrices(cupy, case, dtype, char, rng):
    A, dense = CASES[case](torch_dtype(dtype))
    m, n = A.shape
    for shape in ((n,), (n, 2)):
        host = (3 * rng.standard_normal(shape)).astype(int)
        host = (host % 3 if char in "?B" else host).astype(char)
        if host.dtype.kind == "c":
            host = host - 1j * host[::-1]
        y = A @ cupy.asarray(host)
        check_result(cupy, y, (m, *shape[1:]), np.result_type(A.dtype, host.dtype))
        close(y, dense, host.astype("D"), dtype)
    host = np.ones(m, char)
    y = cupy.asarray(host) @ A
    check_result(cupy, y, (n,), np.result_type(A.dtype, host.dtype))
    close(y, dense.T, host.astype("D"), dtype)


def field(x: np.ndarray) -> np.ndarray:
    """The same numbers at strides that are no multiples of their size."""
    records = np.zeros(x.shape, [("value", x.dtype), ("flag", "?")])
    records["value"] = x
    return records["value"]


LAYOUTS: dict[str, Callable] = {
    "C": lambda x: x,
    "F": lambda x: x.T.copy().T,
    "every second row": lambda x: x.repeat(2, 0)[::2],
    "every second column": lambda x: x.repeat(2, -1)[..., ::2],
    "rows reversed": lambda x: x[::-1].copy()[::-1],
    "columns reversed": lambda x: x[..., ::-1].copy()[..., ::-1],
    "field of records": field,
    # not broadcast_to: NumPy's result is read-only, CuPy has no such thing
    "stride 0": lambda x: as_strided(x, x.shape, (0, *x.strides[1:])),
}


@REAL
@pytest.mark.parametrize("columns", [None, 1, 3])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_any_strides(cupy, layout, columns, dtype, rng):
    A, dense = CASES["jacobian"](torch_dtype(dtype))
    trailing = () if columns is None else (columns,)
    for operator, matrix in ((A, dense), (A.T, dense.T)):
        host = rng.standard_normal((matrix.shape[1], *trailing)).astype(dtype)
        host = LAYOUTS[layout](host)
        x = cupy.ndarray(host)  # this very layout; a copy would not keep it
        y = operator @ x
        check_result(cupy, y, (matrix @ host).shape, dtype)
        close(y, matrix, host, dtype)
        left = x.T @ operator.T
        assert left.dtype == dtype
        close(left.T, matrix, host, dtype)


@pytest.mark.parametrize(
    ("product", "shape"),
    [
        *((name, (5,)) for name in ("matvec", "rmatvec", "dot", "rdot")),
        *((name, (5, 2)) for name in ("matmat", "rmatmat", "dot", "rdot")),
        ("matmat", (7,)),
        ("matvec", (7, 2)),
        ("dot", (7, 2, 2)),
    ],
)
def test_wrong_shapes_are_refused(cupy, product, shape):
    A, _ = CASES["identity"](torch.float64)
    with pytest.raises(ValueError, match="expects shape"):
        getattr(A, product)(cupy.zeros(shape))

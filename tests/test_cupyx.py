"""CuPy arrays in, CuPy arrays out, and CuPy's solvers, without a GPU.

The arrays are those of ``tests/standin``, the solvers are CuPy's own files where its
wheel is installed. Tests of real CuPy arrays on a GPU are in ``test_laws.py``.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import pickle
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import scipy.linalg
import torch
from numpy.lib.stride_tricks import as_strided
from torch import nn
from torchlinop import (
    CGInverseLinearOperator,
    DiagonalLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    IdentityLinearOperator,
    JacobianLinearOperator,
    NystromPreconditioner,
    SubmatrixLinearOperator,
    TorchLinearOperator,
    aslinearoperator,
    verify,
)
from torchlinop.reference import dense_ggn, dense_hessian, dense_jacobian

from tests import standin
from tests.cases import CASES
from tests.problems import Problem, mlp

TORCH = {
    "f": torch.float32,
    "d": torch.float64,
    "F": torch.complex64,
    "D": torch.complex128,
}
REAL = pytest.mark.parametrize("dtype", [np.float32, np.float64])


@pytest.fixture
def cupy() -> Iterator[ModuleType]:
    """The stand-in, in ``sys.modules`` for one test."""
    with standin.installed() as module:
        yield module


@pytest.fixture
def solvers(cupy: ModuleType) -> ModuleType:
    """``cupyx.scipy.sparse.linalg`` from CuPy's own files."""
    if standin.wheel() is None:
        pytest.skip("CuPy's files are not installed; see tests/standin/__init__.py")
    return importlib.import_module("cupyx.scipy.sparse.linalg")


def torch_dtype(dtype: Any) -> torch.dtype:
    return TORCH[np.dtype(dtype).char]


# ----------------------------------------------------------------------- the stand-in


def test_the_stand_in_refuses_what_cupy_refuses(cupy):
    x = cupy.asarray(np.ones(3))
    with pytest.raises(TypeError, match="Implicit conversion"):
        np.asarray(x)
    with pytest.raises(TypeError, match="Unsupported type"):
        x + np.ones(3)
    with pytest.raises(TypeError, match="Unsupported type"):
        np.ones(3) @ x
    with pytest.raises(TypeError, match="Unsupported type"):
        cupy.dot(x, np.ones(3))
    with pytest.raises(TypeError, match="no implementation found"):
        np.dot(x, x)
    with pytest.raises(BufferError, match="negative strides"):
        torch.from_dlpack(x[::-1])
    assert not hasattr(x, "__array_interface__")
    assert not hasattr(x.flags, "writeable")


def test_the_stand_in_gives_views_for_integers_and_0d_arrays_for_scalars(cupy):
    x = cupy.asarray(np.ones((2, 3)))
    x[1, 2][...] = 5.0
    assert x.get()[1, 2] == 5.0
    assert isinstance(x.sum(), cupy.ndarray)
    assert x.sum().shape == ()
    assert isinstance(np.float64(2.0) * x, cupy.ndarray)


def test_the_stand_in_is_taken_out_again():
    mine = ModuleType("cupy")
    before = {name: m for name, m in sys.modules.items() if name.startswith("cupy")}
    sys.modules["cupy"] = mine
    try:
        with standin.installed() as cupy:
            assert sys.modules["cupy"] is cupy is not mine
        assert sys.modules["cupy"] is mine
    finally:
        del sys.modules["cupy"]
        sys.modules.update(before)
    assert before == {n: m for n, m in sys.modules.items() if n.startswith("cupy")}


def test_blas_leaves_alone_what_a_zero_scalar_makes_irrelevant(cupy):
    raw = sys.modules["cupy_backends.cuda.libs.cublas"]
    garbage, y = cupy.empty(2), cupy.asarray(np.ones(2))
    matrix, zero, one = cupy.eye(2), np.array(0.0), np.array(1.0)
    raw.daxpy(0, 2, zero.ctypes.data, garbage.data.ptr, 1, y.data.ptr, 1)
    np.testing.assert_array_equal(y.get(), [1, 1])
    scalars = one.ctypes.data, zero.ctypes.data
    raw.dgemv(
        *(0, raw.CUBLAS_OP_N, 2, 2, scalars[0], matrix.data.ptr, 2, y.data.ptr, 1),
        *(scalars[1], garbage.data.ptr, 1),
    )
    np.testing.assert_array_equal(garbage.get(), [1, 1])


# --------------------------------------------------------------------------- exchange


class Spy(TorchLinearOperator):
    """Twice the identity; notes what it reads and where it writes."""

    def __init__(
        self,
        n: int,
        dtype: torch.dtype,
        product: Callable[[torch.Tensor], torch.Tensor] = lambda x: 2 * x,
    ) -> None:
        super().__init__((n, n), dtype, torch.device("cpu"))
        self.product = product
        self.read: list[torch.Tensor] = []
        self.written: list[torch.Tensor] = []

    def _apply(self, x):
        y = self.product(x)
        self.read.append(x)
        self.written.append(y)
        return y

    def _adjoint(self):
        return self


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


LAYOUTS: dict[str, Callable] = {
    "C": lambda x: x,
    "F": lambda x: x.T.copy().T,
    "every second row": lambda x: x.repeat(2, 0)[::2],
    "every second column": lambda x: x.repeat(2, -1)[..., ::2],
    "rows reversed": lambda x: x[::-1].copy()[::-1],
    "columns reversed": lambda x: x[..., ::-1].copy()[..., ::-1],
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


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex64, np.complex128])
def test_memory_is_shared_both_ways(cupy, dtype):
    spy = Spy(6, torch_dtype(dtype))
    block = cupy.zeros((6, 4), dtype=dtype)
    long = cupy.zeros((12,), dtype=dtype)
    for x in (long[:6], long[6:], long[::2], block[:, 0], block, block[:, 1:3]):
        y = spy @ x
        assert spy.read[-1].data_ptr() == x.data.ptr
        assert spy.written[-1].data_ptr() == y.data.ptr
    by_columns = cupy.asfortranarray(block)
    spy @ by_columns
    assert spy.read[-1].data_ptr() == by_columns.data.ptr


@REAL
def test_memory_is_shared_in_products_from_the_left(cupy, dtype):
    """Of real arrays: complex ones are conjugated first."""
    spy = Spy(6, torch_dtype(dtype))
    block = cupy.zeros((4, 6), dtype=dtype)
    for x in (block, block[1:3], block[0]):
        y = x @ spy
        assert spy.read[-1].data_ptr() == x.data.ptr
    assert spy.written[-1].data_ptr() == y.data.ptr


def test_memory_is_copied_where_it_cannot_be_shared(cupy):
    spy = Spy(6, torch.float64)
    x = cupy.asarray(np.arange(6.0))
    for other in (x[::-1], x.astype("f"), x.astype("q")):
        y = spy @ other
        assert spy.read[-1].data_ptr() != other.data.ptr
        np.testing.assert_array_equal(y.get(), 2 * other.get())
    np.testing.assert_array_equal(x.get(), np.arange(6.0))


#: twice a matrix, in memory that is not plain
LAZY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "strided": lambda x: (2 * x).repeat_interleave(2, 1)[:, ::2],
    "to be conjugated": lambda x: (2 * x).conj_physical().conj(),
    "to be negated": lambda x: torch._neg_view(-2 * x),
}


@pytest.mark.parametrize("lazy", list(LAZY))
@pytest.mark.parametrize("columns", [None, 1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.complex128])
def test_results_are_plain_memory_whatever_the_operator_returns(cupy, dtype, columns, lazy):
    A = Spy(6, torch_dtype(dtype), LAZY[lazy])
    host = np.arange(18).reshape(6, 3).astype(dtype)
    if np.dtype(dtype).kind == "c":
        host = host - 1j * host[::-1]
    host = host[:, 0] if columns is None else host[:, :columns]
    y = A @ cupy.asarray(host)
    check_result(cupy, y, host.shape, dtype)
    np.testing.assert_array_equal(y.get(), 2 * host)


@REAL
def test_results_share_nothing_with_inputs_and_later_results(cupy, dtype, rng):
    for case in ("identity", "ggn", "hessian", "jacobian", "cube", "damped_ggn"):
        A, _ = CASES[case](torch_dtype(dtype))
        host = rng.standard_normal(A.shape[1]).astype(dtype)
        x = cupy.asarray(host)
        expected = (A @ x).get()
        for _ in range(6):  # recorded kernels are replayed from the fourth product on
            y = A @ x
            np.testing.assert_array_equal(x.get(), host)
            np.testing.assert_allclose(y.get(), expected, rtol=1e-5, atol=1e-6)
            kept, copy = A @ x, y.get()
            y[...] = np.nan
            A @ (2 * x)
            np.testing.assert_allclose(kept.get(), copy, rtol=1e-5, atol=1e-6)


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


# ---------------------------------------------------------------------------- solvers


@functools.cache
def problem(char: str) -> Problem:
    """A 4-5-3 network (43 parameters), 63 predictions in two uneven batches."""
    dtype = TORCH[char]
    torch.manual_seed(4)
    model = mlp(4, 5, 3).to(dtype)
    data = [(torch.randn(n, 4).to(dtype), torch.randn(n, 3).to(dtype)) for n in (13, 8)]
    return Problem(model, nn.MSELoss(), list(model.parameters()), data)


class Matrices(NamedTuple):
    """The GGN, the Hessian, the Jacobian, the identity: operators, or dense in float64."""

    G: Any
    H: Any
    J: Any
    I: Any  # noqa: E741


@functools.cache
def references(char: str) -> Matrices:
    """Dense matrices in float64 at the very numbers that the operators have."""
    model, loss, _, data = problem(char)
    double = mlp(4, 5, 3)
    double.load_state_dict(model.state_dict())
    params = list(double.parameters())
    data = [(X.double(), y.double()) for X, y in data]
    dense = (
        dense_ggn(double, loss, params, data),
        dense_hessian(double, loss, params, data),
        dense_jacobian(double, params, data),
    )
    G, H, J = (matrix.numpy() for matrix in dense)
    return Matrices(G, H, J, np.eye(len(G)))


def operators(char: str) -> Matrices:
    p = problem(char)
    return Matrices(
        GGNLinearOperator(*p.arguments),
        HessianLinearOperator(*p.arguments),
        JacobianLinearOperator(p.model, p.params, p.data),
        IdentityLinearOperator([t.shape for t in p.params], "cpu", TORCH[char]),
    )


def part(A: Any, size: int) -> Any:
    """The leading submatrix."""
    if isinstance(A, np.ndarray):
        return A[:size, :size]
    return SubmatrixLinearOperator(A, range(size), range(size))


def inverse(A: Any, damping: float) -> Any:
    """The damped inverse."""
    if isinstance(A, np.ndarray):
        return np.linalg.inv(A + damping * np.eye(len(A)))
    rtol = 4 * torch.finfo(A.torch_dtype).eps
    return CGInverseLinearOperator(A, damping=damping, rtol=rtol)


#: applied to operators it gives an operator, applied to dense matrices the reference
Formula = Callable[[Matrices], Any]

FORMULAS: dict[str, Formula] = {
    "G": lambda m: m.G,
    "H": lambda m: m.H,
    "J": lambda m: m.J,
    "J^T": lambda m: m.J.T,
    "G + I/100": lambda m: m.G + 1e-2 * m.I,
    "H H + I/10": lambda m: m.H @ m.H + 0.1 * m.I,
    "(J^T J + I)/63": lambda m: (m.J.T @ m.J + m.I) / 63,
    "J G - J": lambda m: m.J @ m.G - m.J,
    "G[:20, :20] + I/50": lambda m: part(m.G, 20) + 0.02 * part(m.I, 20),
    "(G + I/2)^-1": lambda m: inverse(m.G, 0.5),
    # Hermitian, since the commutator of symmetric matrices is skew
    "G + I + i[G, H]/2": lambda m: m.G + m.I + 0.5j * (m.G @ m.H - m.H @ m.G),
}
POSITIVE = [
    "G + I/100",
    "H H + I/10",
    "(J^T J + I)/63",
    "G[:20, :20] + I/50",
    "(G + I/2)^-1",
]
COMPLEX = "G + I + i[G, H]/2"


def operator_and_dense(formula: str, dtype: Any) -> tuple[TorchLinearOperator, np.ndarray]:
    char = np.dtype(dtype).char
    build = FORMULAS[formula]
    return build(operators(char)), build(references(char))


def tolerance(solver: Callable, value: float) -> dict[str, float]:
    """Relative tolerance of a linear solver: ``tol`` in CuPy 13, ``rtol`` since 14."""
    names = inspect.signature(solver).parameters
    return {"rtol" if "rtol" in names else "tol": value}


def inverse_diagonal(dense: np.ndarray, dtype: Any) -> TorchLinearOperator:
    """Jacobi's preconditioner, positive definite also for indefinite matrices."""
    diagonal = 1 / (np.abs(dense.diagonal().real) + 0.1)
    return DiagonalLinearOperator(torch.from_numpy(diagonal).to(torch_dtype(dtype)))


def check_eigenpairs(dense, values, vectors, expected, dtype):
    """Compare with the dense eigenvalues, and check vectors by their residuals."""
    atol = 1e3 * np.finfo(dtype).eps * np.linalg.norm(dense, 2)
    values, vectors = values.get(), vectors.get()
    np.testing.assert_allclose(values, expected, rtol=0, atol=atol)
    np.testing.assert_allclose(dense @ vectors, vectors * values, rtol=0, atol=atol)
    gram = vectors.conj().T @ vectors
    np.testing.assert_allclose(gram, np.eye(len(values)), rtol=0, atol=atol)


@REAL
@pytest.mark.parametrize(
    ("formula", "which"),
    [
        ("G", "LM"),
        ("H", "LM"),
        ("H", "LA"),
        ("H", "SA"),
        ("G + I/100", "LA"),
        ("(G + I/2)^-1", "SA"),
    ],
)
def test_eigsh(solvers, cupy, formula, which, dtype):
    A, dense = operator_and_dense(formula, dtype)
    values, vectors = solvers.eigsh(A, k=4, which=which)
    spectrum = np.linalg.eigvalsh(dense)
    by = {"LM": -np.abs(spectrum), "LA": -spectrum, "SA": spectrum}[which]
    assert type(values) is type(vectors) is cupy.ndarray
    assert values.dtype == vectors.dtype == dtype
    check_eigenpairs(dense, values, vectors, np.sort(spectrum[np.argsort(by)[:4]]), dtype)


@REAL
@pytest.mark.parametrize("formula", ["J", "J^T", "J G - J"])
def test_svds(solvers, cupy, formula, dtype):
    A, dense = operator_and_dense(formula, dtype)
    U, s, Vh = solvers.svds(A, k=4)
    assert all(type(x) is cupy.ndarray and x.dtype == dtype for x in (U, s, Vh))
    check_eigenpairs(dense @ dense.T, s**2, U, np.sort(s.get() ** 2), dtype)
    expected = np.linalg.svd(dense, compute_uv=False)[:4]
    atol = 1e3 * np.finfo(dtype).eps * expected[0]
    np.testing.assert_allclose(np.sort(s.get())[::-1], expected, rtol=0, atol=atol)
    np.testing.assert_allclose(dense.T @ U.get(), Vh.get().T * s.get(), rtol=0, atol=atol)
    without = solvers.svds(A, k=4, return_singular_vectors=False)
    np.testing.assert_allclose(without.get(), s.get(), rtol=0, atol=atol)


def solve_and_check(cupy, solver, A, dense, rhs, **options):
    """Solve to a relative residual of ``rtol``, and compare with the dense solution."""
    rtol = 1e-4 if np.finfo(rhs.dtype).eps > 1e-10 else 1e-10
    b = cupy.asarray(rhs)
    x, info = solver(A, b, **tolerance(solver, rtol), **options)
    assert info == 0
    assert type(x) is cupy.ndarray
    assert x.shape == (len(dense),)
    np.testing.assert_array_equal(b.get(), rhs)
    # cg and its like bound the residual by norm(b), minres by norm(A) norm(x), where
    # norm(A) is the Frobenius norm of a tridiagonal matrix
    slack = 2 * np.linalg.cond(dense, "fro") if solver.__name__ == "minres" else 2
    rhs = rhs.ravel()
    residual = np.linalg.norm(dense @ x.get() - rhs) / np.linalg.norm(rhs)
    assert residual < slack * rtol
    expected = np.linalg.solve(dense, rhs)
    error = np.linalg.norm(x.get() - expected) / np.linalg.norm(expected)
    assert error < np.linalg.cond(dense) * slack * rtol


# CuPy's gmres leaves rcond to numpy.linalg.lstsq, about which NumPy 1 warns
NUMPY_1_LSTSQ = "ignore:.rcond. parameter will change:FutureWarning"
LINEAR_SOLVERS = ["cg", "cgs", "bicgstab", "gmres", "minres"]


def linear_solver(solvers: ModuleType, name: str) -> Callable:
    if not hasattr(solvers, name):
        pytest.skip(f"this version of CuPy has no {name}")
    return getattr(solvers, name)


@REAL
@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("formula", POSITIVE)
@pytest.mark.parametrize("name", LINEAR_SOLVERS)
@pytest.mark.filterwarnings(NUMPY_1_LSTSQ)
def test_linear_solvers(solvers, cupy, name, formula, preconditioned, dtype, rng):
    solver = linear_solver(solvers, name)
    A, dense = operator_and_dense(formula, dtype)
    M = inverse_diagonal(dense, dtype) if preconditioned else None
    rhs = rng.standard_normal(len(dense)).astype(dtype)
    solve_and_check(cupy, solver, A, dense, rhs, M=M)


@REAL
def test_minres_on_an_indefinite_hessian(solvers, cupy, dtype, rng):
    A, dense = operator_and_dense("H", dtype)
    rhs = rng.standard_normal(len(dense)).astype(dtype)
    solve_and_check(cupy, solvers.minres, A, dense, rhs)


@REAL
@pytest.mark.parametrize("name", LINEAR_SOLVERS)
@pytest.mark.filterwarnings(NUMPY_1_LSTSQ)
def test_linear_solvers_with_a_start_and_columns(solvers, cupy, name, dtype, rng):
    solver = linear_solver(solvers, name)
    A, dense = operator_and_dense("G + I/100", dtype)
    rhs, start = rng.standard_normal((2, len(dense), 1)).astype(dtype)
    solve_and_check(cupy, solver, A, dense, rhs, x0=cupy.asarray(start))


@REAL
@pytest.mark.parametrize("damp", [0.1, 1.0])
@pytest.mark.parametrize("formula", ["J", "J^T", "G"])
def test_lsmr(solvers, cupy, formula, damp, dtype, rng):
    A, dense = operator_and_dense(formula, dtype)
    m, n = dense.shape
    rhs = rng.standard_normal(m).astype(dtype)
    rtol = 1e-5 if dtype == np.float32 else 1e-12
    x, istop, *_ = solvers.lsmr(A, cupy.asarray(rhs), damp=damp, atol=rtol, btol=rtol)
    assert istop in (1, 2)
    assert type(x) is cupy.ndarray
    stacked = np.vstack([dense, damp * np.eye(n)])
    expected = np.linalg.lstsq(stacked, np.r_[rhs, np.zeros(n)], rcond=None)[0]
    # stopped by the normal equations' residual relative to norm(stacked) norm(r)
    sigma = np.linalg.svd(stacked, compute_uv=False)
    residual = np.linalg.norm(stacked @ expected - np.r_[rhs, np.zeros(n)])
    bound = 2 * rtol * np.linalg.norm(sigma) * residual / sigma[-1] ** 2
    assert np.linalg.norm(x.get() - expected) < bound


LOBPCG = pytest.mark.parametrize(
    ("formula", "largest"),
    [("H", True), ("H", False), ("G + I/100", True), ("(J^T J + I)/63", True)],
)


def check_lobpcg(dense, B, result, largest, tol, dtype):
    """Three eigenpairs of the pencil, to a residual of ``tol``."""
    values, vectors = (x.get() for x in result)
    assert values.dtype == vectors.dtype == dtype
    spectrum = scipy.linalg.eigvalsh(dense, B)
    expected = spectrum[::-1][:3] if largest else spectrum[:3]
    np.testing.assert_allclose(values, expected, rtol=0, atol=tol)
    residual = np.linalg.norm(dense @ vectors - B @ vectors * values, axis=0)
    assert residual.max() < 2 * tol


@REAL
@pytest.mark.parametrize("preconditioned", [False, True])
@LOBPCG
def test_lobpcg(solvers, cupy, formula, largest, preconditioned, dtype, rng):
    A, dense = operator_and_dense(formula, dtype)
    X = cupy.asarray(rng.standard_normal((len(dense), 3)).astype(dtype))
    M = inverse_diagonal(dense, dtype) if preconditioned else None
    tol = 1e-3 if dtype == np.float32 else 1e-7
    result = solvers.lobpcg(A, X, M=M, largest=largest, maxiter=300, tol=tol)
    check_lobpcg(dense, np.eye(len(dense)), result, largest, tol, dtype)


@REAL
@LOBPCG
def test_lobpcg_on_a_pencil(solvers, cupy, formula, largest, dtype, rng):
    A, dense = operator_and_dense(formula, dtype)
    B, dense_B = operator_and_dense("(J^T J + I)/63", dtype)
    X = cupy.asarray(rng.standard_normal((len(dense), 3)).astype(dtype))
    tol = 1e-3 if dtype == np.float32 else 1e-7
    result = solvers.lobpcg(A, X, B=B, largest=largest, maxiter=300, tol=tol)
    check_lobpcg(dense, dense_B, result, largest, tol, dtype)


@REAL
@pytest.mark.parametrize("formula", ["H", "G"])
def test_lobpcg_on_large_blocks(solvers, cupy, formula, dtype, rng):
    """More than a fifth of the columns: the identity is multiplied as one block."""
    A, dense = operator_and_dense(formula, dtype)
    X = cupy.asarray(rng.standard_normal((len(dense), 10)).astype(dtype))
    values, vectors = solvers.lobpcg(A, X)
    check_eigenpairs(dense, values, vectors, np.linalg.eigvalsh(dense)[::-1][:10], dtype)


@pytest.mark.parametrize("name", LINEAR_SOLVERS[:-1])  # minres is for real matrices
@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
@pytest.mark.filterwarnings(NUMPY_1_LSTSQ)
def test_linear_solvers_on_a_complex_composite(solvers, cupy, name, dtype, rng):
    solver = linear_solver(solvers, name)
    A, dense = operator_and_dense(COMPLEX, np.finfo(dtype).dtype)
    assert A.dtype == dtype
    rhs = rng.standard_normal((2, len(dense)))
    rhs = (rhs[0] + 1j * rhs[1]).astype(dtype)
    solve_and_check(cupy, solver, A, dense, rhs)


@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
def test_eigsh_on_a_complex_composite(solvers, cupy, dtype):
    A, dense = operator_and_dense(COMPLEX, np.finfo(dtype).dtype)
    values, vectors = solvers.eigsh(A, k=4, which="LA")
    check_eigenpairs(dense, values, vectors, np.linalg.eigvalsh(dense)[-4:], dtype)


# ------------------------------------------------------- one of cupyx's own operators


def test_an_operator_is_one_of_cupyx_while_cupyx_is_there(solvers, cupy):
    A, _ = operator_and_dense("G", np.float64)
    assert isinstance(A, solvers.LinearOperator)
    assert solvers.aslinearoperator(A) is A
    assert type(A) is GGNLinearOperator
    assert isinstance(A, GGNLinearOperator)
    assert A.__class__.__name__ == "GGNLinearOperator"
    assert not isinstance(3 * A, GGNLinearOperator)


@pytest.mark.parametrize("protocol", range(6))
def test_operators_are_copied_and_pickled_while_cupyx_is_there(solvers, cupy, protocol):
    A, _ = operator_and_dense("(G + I/2)^-1", np.float64)
    B = 2 * A + A
    x = np.linspace(0, 1, A.shape[1])
    for again in (
        pickle.loads(pickle.dumps(B, protocol)),
        copy.copy(B),
        copy.deepcopy(B),
    ):
        assert type(again) is type(B)
        np.testing.assert_allclose(again @ x, B @ x, rtol=1e-12)


def test_a_class_that_cannot_have_another_base(solvers, cupy):
    class Choosy(DiagonalLinearOperator):
        def __init_subclass__(cls, *, key):
            super().__init_subclass__()

    A = Choosy(torch.ones(3))
    assert not isinstance(A, dict)
    np.testing.assert_array_equal((A @ cupy.asarray(np.ones(3, "f"))).get(), np.ones(3))


def test_an_operator_of_cupyx_without_an_adjoint(solvers, cupy):
    H, _ = operator_and_dense("H", np.float64)
    C = solvers.LinearOperator(H.shape, lambda x: x, dtype=np.float64)
    with pytest.raises(NotImplementedError, match="rmatvec="):
        (H + C).T @ np.ones(H.shape[0])


def test_an_operator_is_not_one_of_cupyx_where_nobody_uses_it():
    A, _ = operator_and_dense("G", np.float64)
    if "cupyx.scipy.sparse.linalg" not in sys.modules:
        assert A.__class__ is GGNLinearOperator


def test_lobpcg_multiplies_blocks(solvers, cupy, rng):
    """Of a wrapper that cupyx makes itself it would ask for one column after another."""
    A, dense = operator_and_dense("G + I/100", np.float64)
    widths = []

    class Counted(TorchLinearOperator):
        def _apply(self, x):
            widths.append(x.shape[1])
            return A._product(x)

        def _adjoint(self):
            return self

    counted = Counted(A.shape, A.torch_dtype, A.device)
    X = cupy.asarray(rng.standard_normal((len(dense), 3)))
    M = NystromPreconditioner(A, 0.01)
    values, _ = solvers.lobpcg(counted, X, M=M, maxiter=100, tol=1e-6)
    np.testing.assert_allclose(
        values.get(), np.linalg.eigvalsh(dense)[::-1][:3], rtol=0, atol=1e-6
    )
    assert widths[0] == 3
    assert sum(width == 3 for width in widths) > len(widths) / 2


CUPYX_EXPRESSIONS = {
    "C + A": lambda A, C: C + A,
    "A + C": lambda A, C: A + C,
    "C - A": lambda A, C: C - A,
    "A - C": lambda A, C: A - C,
    "C @ A": lambda A, C: C @ A,
    "A @ C": lambda A, C: A @ C,
    "A @ C + A": lambda A, C: A @ C + A,
}


@REAL
@pytest.mark.parametrize("expression", CUPYX_EXPRESSIONS)
@pytest.mark.parametrize("made", ["matrix", "functions"])
def test_operators_of_cupyx_in_expressions(solvers, cupy, expression, made, dtype, rng):
    A, dense = operator_and_dense("H", dtype)
    host = rng.standard_normal(A.shape).astype(dtype)
    matrix = cupy.asarray(host)
    C = solvers.aslinearoperator(matrix)
    if made == "functions":
        C = solvers.LinearOperator(
            A.shape, lambda x: matrix @ x, rmatvec=lambda x: matrix.T @ x, dtype=dtype
        )
    B = CUPYX_EXPRESSIONS[expression](A, C)
    expected = CUPYX_EXPRESSIONS[expression](dense, host)
    x = rng.standard_normal((A.shape[1], 3)).astype(dtype)
    for given in (x[:, 0], x):
        y = B @ cupy.asarray(np.ascontiguousarray(given))
        check_result(cupy, y, given.shape, dtype)
        np.testing.assert_allclose(
            y.get(), expected @ given, rtol=0, atol=3e3 * np.finfo(dtype).eps
        )
    if expression.startswith("A"):  # ours: any kind of array, and an adjoint
        assert isinstance(B, TorchLinearOperator)
        np.testing.assert_allclose(
            B.H @ x, expected.T @ x, rtol=0, atol=3e3 * np.finfo(dtype).eps
        )


def test_aslinearoperator_of_a_cupyx_operator(solvers, cupy, rng):
    host = rng.standard_normal((5, 3))
    C = solvers.aslinearoperator(cupy.asarray(host))
    A = aslinearoperator(C)
    assert isinstance(A, TorchLinearOperator)
    assert A.shape == (5, 3)
    np.testing.assert_allclose(A @ np.eye(3), host)
    np.testing.assert_allclose(A.T @ np.eye(5), host.T)
    kept = A @ cupy.asarray(np.ones(3))
    kept[...] = 0
    np.testing.assert_allclose((A @ cupy.asarray(np.ones(3))).get(), host.sum(axis=1))


@REAL
def test_our_inverses_take_cupy_vectors_and_preconditioners(solvers, cupy, dtype, rng):
    A, dense = operator_and_dense("G", dtype)
    damped = dense + 0.1 * np.eye(len(dense))
    M = solvers.aslinearoperator(cupy.asarray(np.linalg.inv(damped).astype(dtype)))
    rhs = rng.standard_normal((len(dense), 3)).astype(dtype)
    inverse = CGInverseLinearOperator(A, damping=0.1, M=M, rtol=1e-5)
    x = inverse @ cupy.asarray(rhs)
    check_result(cupy, x, rhs.shape, dtype)
    np.testing.assert_allclose(damped @ x.get(), rhs, rtol=0, atol=1e-3)
    assert inverse.last_solve.iterations.max() <= 3


def test_an_unconverged_cupyx_eigsh_is_found_out(solvers, cupy):
    """It returns in silence what it has when its iterations are used up."""
    A, _ = operator_and_dense("H", np.float64)
    good = solvers.eigsh(A, k=3)
    assert verify.eigenpairs(A, *good)
    early = solvers.eigsh(A, k=3, ncv=6, maxiter=6, tol=1e-12)
    report = verify.eigenpairs(A, *early, rtol=1e-8)
    assert not report
    assert "not converged" in str(report)

"""Random expressions of operators, matrices and numbers, against dense matrices."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
import scipy.sparse
import scipy.sparse.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchlinop import (
    BlockDiagonalLinearOperator,
    DiagonalLinearOperator,
    EighLinearOperator,
    HessianLinearOperator,
    IdentityLinearOperator,
    JacobianLinearOperator,
    KroneckerLinearOperator,
    LowRankPlusDiagonalLinearOperator,
    SubmatrixLinearOperator,
    TorchLinearOperator,
    aslinearoperator,
)

from tests import standin


class Term(NamedTuple):
    """An operator, its matrix, the dtype it has, and the size that its roundings have."""

    operator: Any
    dense: np.ndarray
    dtype: np.dtype
    bound: np.ndarray


def _term(operator: Any, dense: Any, dtype: Any) -> Term:
    dense = np.array(dense, dtype="c16" if np.iscomplexobj(dense) else "f8")
    return Term(operator, dense, np.dtype(dtype), np.abs(dense))


def _entries(draw: Any, m: int, n: int, dtype: str) -> np.ndarray:
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    matrix = rng.uniform(-2, 2, (m, n)).astype(dtype)
    return matrix + 1j * rng.uniform(-2, 2, (m, n)) if dtype in "FD" else matrix


@functools.cache
def _hessian(n: int, dtype: torch.dtype) -> tuple[TorchLinearOperator, np.ndarray]:
    x = torch.linspace(-1, 1, n, dtype=dtype)

    def f(x: torch.Tensor) -> torch.Tensor:
        return (x.sin() * x.sum()).pow(2).sum()

    H = HessianLinearOperator.from_function(f, x)
    return H, torch.func.hessian(f)(x.double()).numpy()


@functools.cache
def _jacobian(m: int, n: int, dtype: torch.dtype) -> tuple[TorchLinearOperator, np.ndarray]:
    x = torch.linspace(-1, 1, n, dtype=dtype)
    weights = torch.linspace(0, 3, m * n, dtype=torch.float64).reshape(m, n).cos()

    def f(x: torch.Tensor) -> torch.Tensor:
        return (weights.to(x) @ x).sin()

    J = JacobianLinearOperator.from_function(f, x)
    return J, torch.func.jacrev(f)(x.double()).numpy()


TORCH = {"f": torch.float32, "d": torch.float64, "F": torch.complex64}
TORCH["D"] = torch.complex128


@st.composite
def ours(draw: Any, m: int, n: int) -> Term:
    """An operator of this package."""
    dtype = draw(st.sampled_from("ffddFD"))
    kinds = ["matrix", "jacobian", "kronecker", "submatrix"]
    if m == n:
        kinds += ["hessian", "identity", "diagonal", "eigh", "low_rank", "blocks"] * 2
    kind = draw(st.sampled_from(kinds))
    if kind in ("jacobian", "hessian", "identity"):
        dtype = dtype.lower()
    here = TORCH[dtype]
    if kind == "jacobian":
        return _term(*_jacobian(m, n, here), dtype)
    if kind == "hessian":
        return _term(*_hessian(n, here), dtype)
    if kind == "identity":
        return _term(IdentityLinearOperator([(n,)], "cpu", here), np.eye(n), dtype)
    if kind == "submatrix":
        whole = _entries(draw, m + 2, n + 1, dtype).astype(dtype)
        rows, columns = np.arange(m)[::-1], np.arange(1, n + 1)
        operator = SubmatrixLinearOperator(aslinearoperator(whole), rows, columns)
        return _term(operator, whole[rows][:, columns], dtype)
    if kind == "kronecker":
        left = torch.from_numpy(_entries(draw, m, 1, dtype).astype(dtype))
        right = torch.from_numpy(_entries(draw, 1, n, dtype).astype(dtype))
        dense = np.kron(left.numpy(), right.numpy())
        return _term(KroneckerLinearOperator(left, right), dense, dtype)
    matrix = _entries(draw, m, n, dtype).astype(dtype)
    a = torch.from_numpy(matrix)
    if kind == "diagonal":
        return _term(DiagonalLinearOperator(a[0]), np.diag(matrix[0]), dtype)
    if kind == "blocks":
        k = n // 2
        blocks = [a[:k, :k], DiagonalLinearOperator(a[0, k:])] if k else [a]
        parts = matrix[:k, :k], np.diag(matrix[0, k:])
        dense = scipy.linalg.block_diag(*parts) if k else matrix
        return _term(BlockDiagonalLinearOperator(blocks), dense, dtype)
    if kind == "eigh":
        vectors = torch.linalg.qr(a.to(torch.complex128 if a.is_complex() else here))[0]
        vectors = vectors.to(here)
        values = a[0].real.contiguous()
        dense = (vectors.numpy() * values.numpy()) @ vectors.numpy().conj().T
        return _term(EighLinearOperator(values, vectors), dense, dtype)
    if kind == "low_rank":
        d, column = matrix[0].real.copy(), matrix[:, :1].real
        operator = LowRankPlusDiagonalLinearOperator(d, column)
        return _term(operator, np.diag(d) + column @ column.T, dtype.lower())
    return _term(aslinearoperator(matrix if draw(st.booleans()) else a), matrix, dtype)


@st.composite
def foreign(draw: Any, m: int, n: int) -> Term:
    """What may stand beside an operator of ours."""
    dtype = draw(st.sampled_from("fdD"))
    matrix = _entries(draw, m, n, dtype).astype(dtype)
    kind = draw(st.sampled_from(["array", "csr", "csc matrix", "scipy"]))
    if kind == "csr":
        return _term(scipy.sparse.csr_array(matrix), matrix, dtype)
    if kind == "csc matrix":
        return _term(scipy.sparse.csc_matrix(matrix), matrix, dtype)
    if kind == "scipy":
        return _term(scipy.sparse.linalg.aslinearoperator(matrix), matrix, dtype)
    return _term(matrix, matrix, dtype)


SCALARS = [
    *(0, 1, -2, 0.5, True, np.float32(3), np.float64(-0.25), np.int8(2), np.array(1.5)),
    *(torch.tensor(2.0), torch.tensor(-1), 1j, 0.5 - 2j, np.complex64(1 - 1j)),
]


def _sum(a: Term, b: Term, sign: int) -> Term:
    operator = a.operator + b.operator if sign > 0 else a.operator - b.operator
    dtype = np.result_type(a.dtype, b.dtype)
    return Term(operator, a.dense + sign * b.dense, dtype, a.bound + b.bound)


def _product(a: Term, b: Term) -> Term:
    dtype = np.result_type(a.dtype, b.dtype)
    bound = a.bound @ b.bound * (1 + a.dense.shape[1])
    return Term(a.operator @ b.operator, a.dense @ b.dense, dtype, bound)


def _multiple(a: Term, scalar: Any, how: str) -> Term:
    number = complex(scalar) if np.iscomplexobj(scalar) else float(scalar)
    if how == "/" and number:
        operator, factor = a.operator / scalar, 1 / number
    elif how == "left":
        operator, factor = scalar * a.operator, number
    else:
        operator, factor = a.operator * scalar, number
    dtype = np.result_type(a.dtype, "F") if isinstance(number, complex) else a.dtype
    return Term(operator, factor * a.dense, dtype, abs(factor) * a.bound)


@st.composite
def expressions(draw: Any, m: int, n: int, depth: int) -> Term:
    """An operator of ``m`` rows and ``n`` columns."""
    if depth == 0:
        return draw(ours(m, n))
    kinds = ["sum", "difference", "product", "multiple", "minus", "T", "H", "mixed"]
    kind = draw(st.sampled_from([*kinds, "power"] if m == n else kinds))
    if kind in ("T", "H"):
        a = draw(expressions(n, m, depth - 1))
        if kind == "T":
            return Term(a.operator.T, a.dense.T, a.dtype, a.bound.T)
        return Term(a.operator.H, a.dense.conj().T, a.dtype, a.bound.T)
    if kind == "product":
        k = draw(st.integers(1, 5))
        left = draw(expressions(m, k, depth - 1))
        return _product(left, draw(expressions(k, n, depth - 1)))
    if kind == "mixed":
        return _mixed(draw, m, n, depth - 1)
    a = draw(expressions(m, n, depth - 1))
    if kind == "minus":
        return a._replace(operator=-a.operator, dense=-a.dense)
    if kind == "multiple":
        how = draw(st.sampled_from(["left", "right", "/"]))
        return _multiple(a, draw(st.sampled_from(SCALARS)), how)
    if kind == "power":
        power = draw(st.integers(0, 3))
        dense = np.linalg.matrix_power(a.dense, power)
        bound = np.linalg.matrix_power(a.bound * (1 + n), power)
        return Term(a.operator**power, dense, a.dtype, bound)
    return _sum(a, draw(expressions(m, n, depth - 1)), 1 if kind == "sum" else -1)


def _mixed(draw: Any, m: int, n: int, depth: int) -> Term:
    """With another library's matrix, on either side."""
    k = draw(st.integers(1, 5))
    how = draw(st.sampled_from(["+", "-", "@", "left +", "left -", "left @"]))
    if how == "@":
        b = draw(foreign(k, n))
        if isinstance(b.operator, np.ndarray):  # A @ array is a product, no operator
            b = b._replace(operator=aslinearoperator(b.operator))
        return _product(draw(expressions(m, k, depth)), b)
    if how == "left @":
        b = draw(foreign(m, k))
        b = b._replace(operator=_lifted(b.operator))
        return _product(b, draw(expressions(k, n, depth)))
    a, b, sign = (
        draw(expressions(m, n, depth)),
        draw(foreign(m, n)),
        1 if "+" in how else -1,
    )
    if how.startswith("left"):
        return _sum(b._replace(operator=_lifted(b.operator)), a, sign)
    return _sum(a, b, sign)


def _lifted(left: Any) -> Any:
    """Python asks the left operand first: only a sparse matrix leaves it to ours."""
    return left if scipy.sparse.issparse(left) else aslinearoperator(left)


@st.composite
def terms(draw: Any) -> Term:
    m, n = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    if draw(st.booleans()):
        n = m
    return draw(expressions(m, n, draw(st.integers(1, 4))))


def _check(y: np.ndarray, term: Term, matrix: np.ndarray, x: np.ndarray) -> None:
    bound = term.bound if matrix.shape == term.bound.shape else term.bound.T
    size = bound.sum(axis=1).max() * max(np.abs(x).max(initial=0), 1)
    atol = 100 * np.finfo(np.float32).eps * size  # parts may be of single precision
    np.testing.assert_allclose(y, matrix @ x, rtol=0, atol=atol)


@given(st.data(), terms(), st.sampled_from([None, 1, 3]), st.sampled_from("fdD"))
def test_expressions(data: Any, term: Term, columns: int | None, char: str) -> None:
    A, dense, dtype, _ = term
    assert isinstance(A, TorchLinearOperator)
    assert isinstance(A, scipy.sparse.linalg.LinearOperator)
    assert A.shape == dense.shape
    assert A.dtype == dtype
    m, n = A.shape
    x = _entries(data.draw, n, columns or 1, char)
    u = _entries(data.draw, m, columns or 1, char)
    if columns is None:
        x, u = x[:, 0], u[:, 0]
    for B, matrix, v in ((A, dense, x), (A.T, dense.T, u), (A.H, dense.conj().T, u)):
        result = np.result_type(dtype, v.dtype)
        y = B @ v
        assert y.dtype == result
        _check(y, term, matrix, v)
        z = B @ torch.from_numpy(v.copy())
        assert type(z) is torch.Tensor
        _check(z.numpy(), term, matrix, v)
        with standin.installed() as cupy:
            w = B @ cupy.asarray(v)
            assert type(w) is cupy.ndarray
        _check(w.get(), term, matrix, v)
    _check((u.T @ A).T, term, dense.T, u)
    _check(A.to_dense().numpy(), term, dense, np.eye(n))


def test_kronecker_products_of_two_dtypes():
    a, b = torch.ones(2, 2), torch.arange(4.0, dtype=torch.float64).reshape(2, 2)
    A, B = KroneckerLinearOperator(a, a), KroneckerLinearOperator(b, b)
    product = A @ B
    assert product.dtype == np.float64
    expected = A.to_dense().double() @ B.to_dense()
    torch.testing.assert_close(product.to_dense(), expected)

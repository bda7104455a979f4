"""CuPy's solvers, from its own files, on our operators."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import scipy.linalg

from tests.cupyx.checks import REAL, check_eigenpairs
from tests.cupyx.matrices import (
    COMPLEX,
    POSITIVE,
    factored_inverse,
    inverse_diagonal,
    linear_model,
    operator_and_dense,
)


def tolerance(solver: Callable, value: float) -> dict[str, float]:
    """Relative tolerance of a linear solver: ``tol`` in CuPy 13, ``rtol`` since 14."""
    names = inspect.signature(solver).parameters
    return {"rtol" if "rtol" in names else "tol": value}


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
@pytest.mark.parametrize("name", LINEAR_SOLVERS)
@pytest.mark.filterwarnings(NUMPY_1_LSTSQ)
def test_kfac_as_preconditioner(solvers, cupy, name, dtype, rng):
    solver = linear_solver(solvers, name)
    A, dense = operator_and_dense("G + I/100", dtype)
    M = factored_inverse(1e-2, dtype)
    rhs = rng.standard_normal(len(dense)).astype(dtype)
    solve_and_check(cupy, solver, A, dense, rhs, M=M)


@REAL
def test_kfac_of_a_linear_model_is_its_inverse(solvers, cupy, dtype, rng):
    """One step of conjugate gradients, where it is the very inverse."""
    A, M = linear_model(1e-2, dtype)
    b = cupy.asarray(rng.standard_normal(A.shape[0]).astype(dtype))
    counts = []
    for preconditioner in (None, M):
        steps = []
        rtol = tolerance(solvers.cg, 1e-4)
        solvers.cg(A, b, M=preconditioner, callback=steps.append, **rtol)
        assert all(type(x) is cupy.ndarray for x in steps)
        counts.append(len(steps))
    assert counts[1] == 1 < counts[0]


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

"""Where rounding ends a solve, and numbers whose squares are out of range."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchlinop import (
    CGInverseLinearOperator,
    ConvergenceWarning,
    LSMRInverseLinearOperator,
    MINRESInverseLinearOperator,
    multishift_cg,
    verify,
)
from torchlinop.solve.columns import column_dots, column_norms
from torchlinop.solve.directions import refuse_indefinite
from torchlinop.solve.system import System

from tests.solve.matrices import KRYLOV, eps, positive, residuals, vectors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("columns", [None, 3])
@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("solver", KRYLOV)
def test_a_tolerance_of_zero_ends(solver, preconditioned, columns, dtype):
    A, b = positive(20, 10.0, dtype), vectors(20, columns, dtype)
    M = torch.diag(torch.linspace(0.5, 2, 20)).to(dtype) if preconditioned else None
    for scale in (1.0, 1e-30, 1e30):  # of the matrix
        inverse = KRYLOV[solver](scale * A, rtol=0, M=M, on_failure="ignore")
        x = inverse @ b
        assert (residuals(scale * A, x, b) < 100 * eps(dtype)).all()
        assert inverse.last_solve.iterations.max() <= 80


def test_a_tolerance_of_zero_ends_multishift():
    A, b = positive(20, 10.0), vectors(20, 2, torch.float64)
    X, report = multishift_cg(A, b, [0.0, 1.0], rtol=0, on_failure="ignore")
    assert (residuals(A, X[0], b) < 1e-13).all()
    assert report.iterations.max() <= 60
    assert report.reason == "rounding"


def test_the_curvature_along_a_direction_that_has_underflowed():
    for matrix in (torch.eye(3), 1e-30 * torch.eye(3)):
        for size in (0.0, 1e-42, 1e-30, 1e30):
            system = System(CGInverseLinearOperator(matrix).A)
            assert refuse_indefinite(torch.full((3,), size), system) > 0


@pytest.mark.parametrize("solver", KRYLOV)
def test_the_best_iterate_is_returned(solver):
    """A start that rounding cannot improve on is not made worse."""
    for seed in range(10):
        A, b = positive(40, 1e5, torch.float32), vectors(40, None, torch.float32, seed)
        x0 = torch.linalg.solve(A.double(), b.double()).float()
        inverse = KRYLOV[solver](A, rtol=0, x0=x0, on_failure="ignore", maxiter=300)
        x = inverse @ b
        assert torch.linalg.vector_norm(b - A @ x) <= torch.linalg.vector_norm(b - A @ x0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("columns", [1, 3])
def test_norms_and_products_out_of_range(columns, dtype):
    X = torch.ones(4, columns, dtype=dtype)
    for size in (1e-30, 1e30) if dtype is torch.float32 else (1e-200, 1e150):
        np.testing.assert_allclose(column_norms(size * X), 2 * size, rtol=1e-6)
        mixed = column_dots(size * X, X / size * 1e-3)
        np.testing.assert_allclose(mixed, 4e-3, rtol=1e-5)
    if dtype is torch.float32:
        np.testing.assert_allclose(column_dots(1e-30 * X, 1e-30 * X), 4e-60, rtol=1e-5)
    assert (column_norms(0 * X) == 0).all()


@pytest.mark.parametrize("kind", [*KRYLOV.values(), LSMRInverseLinearOperator])
@pytest.mark.parametrize("columns", [None, 3])
def test_solutions_out_of_range(kind, columns):
    """What the dtype holds is right, and what it does not hold is said."""
    A = positive(20, 5.0, torch.float32)
    b = vectors(20, columns, torch.float32)
    for matrix, size in ((1e6, 1e-30), (1e-6, 1e25), (1.0, 1e-37), (1e5, 1e-35)):
        inverse = kind(matrix * A, on_failure="ignore")
        x = inverse @ (size * b)
        wide = matrix * A.double() @ x.double() - size * b.double()
        norms = torch.linalg.vector_norm(wide / size, dim=0).reshape(-1).numpy()
        report = inverse.last_solve
        np.testing.assert_allclose(report.residual_norms / size, norms, rtol=0.1, atol=2e-5)
        good = norms <= 5e-5
        assert (good | ~report.converged).all()
        assert good.all() or report.reason == "range"
    for matrix, size in ((1e10, 1e-35), (1e-20, 1e25)):
        with pytest.warns(ConvergenceWarning, match="too large or too small"):
            kind(matrix * A) @ (size * b)


def test_multishift_solutions_out_of_range():
    A, b = 1e10 * positive(20, 5.0, torch.float32), vectors(20, 2, torch.float32)
    with pytest.warns(ConvergenceWarning, match="too large or too small"):
        _, report = multishift_cg(A, 1e-35 * b, [0.0, 1.0])
    assert not report.converged.any()


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_squares_out_of_the_range_of_float64(size):
    A, b = positive(20, 5.0), vectors(20, 2, torch.float64)
    exact = torch.linalg.solve(A, b)
    for kind in (*KRYLOV.values(), LSMRInverseLinearOperator):
        for matrix, right in ((A, size * b), (size**0.9 * A, b)):
            inverse = kind(matrix, on_failure="raise")
            x = (inverse @ right) * ((1 / size) if matrix is A else size**0.9)
            torch.testing.assert_close(x, exact, rtol=1e-3, atol=1e-3)
            assert (inverse.last_solve.residual_norms > 0).all()
    X, report = multishift_cg(A, size * b, [0.0])
    torch.testing.assert_close(X[0] / size, exact, rtol=1e-3, atol=1e-3)
    assert report.converged.all()


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_verification_out_of_range(size):
    A, b = torch.diag(torch.tensor([1.0, 2.0, 4.0])).double(), torch.ones(3).double()
    x = b / A.diagonal()
    assert verify.solution(A, size * x, size * b)
    wrong = verify.solution(A, 1.1 * size * x, size * b)
    assert not wrong
    assert wrong.relative_residuals[0] == pytest.approx(0.1)
    V = torch.eye(3, dtype=torch.float64)
    assert verify.eigenpairs(A, A.diagonal(), size * V)
    assert not verify.eigenpairs(A, A.diagonal().flip(0), size * V)
    assert verify.eigenpairs(size * A, size * A.diagonal(), V)
    assert not verify.eigenpairs(size * A, 1.1 * size * A.diagonal(), V)
    assert verify.singular_triplets(size * A, V, size * A.diagonal(), V)
    assert not verify.singular_triplets(size * A, V, 1.1 * size * A.diagonal(), V)


def test_rounding_in_a_preconditioner_is_no_error():
    """``r^H M r`` of a residual that is rounding, for an ``M`` of condition 1e9."""
    A = positive(30, 1e4, torch.float32)
    M = torch.linalg.inv(A.double() @ A.double()).float()
    for kind in (CGInverseLinearOperator, MINRESInverseLinearOperator):
        for columns in (None, 3):
            b = vectors(30, columns, torch.float32)
            inverse = kind(A, M=(M + M.T) / 2, rtol=0, on_failure="ignore", maxiter=200)
            assert torch.isfinite(inverse @ b).all()


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e22])
@pytest.mark.parametrize("columns", [None, 3])
@pytest.mark.parametrize("solver", KRYLOV)
def test_vectors_whose_squares_are_out_of_range(solver, columns, size):
    A = positive(30, 20.0, torch.float32)
    b = vectors(30, columns, torch.float32) * size
    seen = []
    inverse = KRYLOV[solver](A, rtol=1e-4, callback=lambda x: seen.append(x.clone()))
    x = inverse @ b
    wide = torch.linalg.solve(A.double(), b.double())
    torch.testing.assert_close(x.double() / size, wide / size, rtol=0, atol=1e-2)
    torch.testing.assert_close(seen[-1], x)
    assert inverse.last_solve.iterations.min() > 3


@pytest.mark.parametrize("solver", KRYLOV)
def test_norms_beyond_the_range_of_float32(solver):
    b = torch.full((100,), 1e38)
    torch.testing.assert_close(KRYLOV[solver](torch.eye(100)) @ b, b)
    inverse = KRYLOV[solver](1e-20 * torch.eye(3))
    with pytest.warns(ConvergenceWarning, match="too large or too small"):
        inverse @ torch.full((3,), 1e25)
    assert inverse.last_solve.reason == "range"
    for size in (1e-30, 1e20):
        A = size * positive(20, 5.0, torch.float32)
        c = vectors(20, 2, torch.float32)
        inverse = KRYLOV[solver](A, rtol=1e-4)
        assert (residuals(A, inverse @ c, c) < 1e-3).all()
    X, _ = multishift_cg(torch.eye(5), 1e-30 * torch.ones(5), [0.0, 1.0])
    torch.testing.assert_close(X[1], 0.5e-30 * torch.ones(5))

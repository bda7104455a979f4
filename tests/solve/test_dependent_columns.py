"""Right-hand sides that depend on each other cost what a basis of them does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchlinop import (
    CGInverseLinearOperator,
    LSMRInverseLinearOperator,
    multishift_cg,
)

from tests.solve.matrices import KRYLOV, positive, residuals, vectors


def solve(A, B, solver="CG", **options):
    """Products of a solve, after a look at the residuals."""
    inverse = KRYLOV[solver](A, on_failure="raise", **{"rtol": 1e-8} | options)
    X = inverse @ B
    norms = residuals(A, X, B).numpy()
    report = inverse.last_solve
    assert (norms <= 1.1 * report.tolerances).all()
    np.testing.assert_allclose(
        report.residual_norms, norms, atol=(0.1 * report.tolerances).max()
    )
    assert len(report.iterations) == B.shape[1]
    return report.num_matvecs


@pytest.mark.parametrize("solver", KRYLOV)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("started", [False, True])
def test_columns_of_rank_four(solver, dtype, started):
    A, b = positive(100, 1e3, dtype), vectors(100, 4, dtype)
    options = {"solver": solver}
    if started:
        options["x0"] = vectors(100, None, dtype, 9)
    alone = solve(A, b, **options)
    mixed = b @ vectors(4, 16, dtype, 5)
    if started:  # residuals of one start depend on each other if all columns are equal
        one = solve(A, b[:, :1], **options)
        assert solve(A, b[:, :1].expand(-1, 8), **options) <= one + 2 * 8 + 2
        return
    for B in (torch.cat([b] * 4, dim=1), mixed, torch.cat([0 * b, b, -3 * b], dim=1)):
        assert solve(A, B, **options) <= 1.1 * alone + 2 * B.shape[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_columns_of_rank_four_in_single_precision(dtype):
    A, b = positive(60, 100.0, dtype), vectors(60, 4, dtype)
    alone = solve(A, b, rtol=1e-4)
    for B in (torch.cat([b] * 4, dim=1), b @ vectors(4, 16, dtype, 5)):
        assert solve(A, B, rtol=1e-4) <= 1.2 * alone + 2 * 16


def test_columns_of_very_different_size():
    A, b = positive(100, 1e3), vectors(100, 4, torch.float64)
    sizes = torch.tensor([1e-20, 1e-10, 1e10, 1e20], dtype=torch.float64)
    B = torch.cat([b * sizes, 0 * b, b * sizes.flip(0), b @ (b.T @ b)], dim=1)
    assert solve(A, B) <= 1.1 * solve(A, b) + 2 * 16
    inverse = CGInverseLinearOperator(A, rtol=1e-8)
    X = inverse @ B
    exact = torch.linalg.solve(A, B)
    error = (X - exact).norm(dim=0) / exact.norm(dim=0).clamp(min=1e-300)
    assert error.max() < 1e-5


@pytest.mark.parametrize("difference", [1e-3, 1e-5, 1e-7])
def test_columns_that_are_nearly_equal(difference):
    """Their differences matter at this tolerance; no column is the others' copy."""
    A, b = positive(100, 1e3), vectors(100, 1, torch.float64)
    B = b + difference * vectors(100, 8, torch.float64, 7)
    assert solve(A, B) <= 8 * solve(A, b)
    if difference < 1e-4:  # for a tolerance like this they do not
        assert solve(A, B, rtol=1e-2) <= 1.2 * solve(A, b, rtol=1e-2) + 2 * 8


def test_the_callback_sees_all_columns():
    A, b = positive(30, 100.0), vectors(30, 2, torch.float64)
    B = torch.cat([b, b @ vectors(2, 3, torch.float64, 4)], dim=1)
    seen = []
    inverse = CGInverseLinearOperator(A, rtol=1e-8, callback=seen.append)
    X = inverse @ B
    assert len(seen) == inverse.last_solve.iterations.max()
    assert all(iterate.shape == B.shape for iterate in seen)
    torch.testing.assert_close(seen[-1], X)


def test_methods_with_a_krylov_space_for_each_column():
    """There repeated columns do no harm: each takes what it takes alone."""
    A, b = positive(60, 100.0), vectors(60, 2, torch.float64)
    B = torch.cat([b] * 3, dim=1)
    inverse = LSMRInverseLinearOperator(A, atol=1e-9, btol=1e-9)
    inverse @ b
    alone = inverse.last_solve.iterations
    inverse @ B
    np.testing.assert_allclose(inverse.last_solve.iterations, np.tile(alone, 3), atol=1)
    assert inverse.last_solve.converged.all()
    _, few = multishift_cg(A, b, [0.0, 1.0])
    _, many = multishift_cg(A, B, [0.0, 1.0])
    assert many.converged.all()
    assert abs(many.iterations.max() - few.iterations.max()) <= 1

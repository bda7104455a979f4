"""Conjugate gradients on several columns."""

from __future__ import annotations

import pytest
import torch
from torchlinop import (
    CGInverseLinearOperator,
    DiagonalLinearOperator,
)

from tests.solve.matrices import (
    KRYLOV,
    positive,
    vectors,
    with_spectrum,
)


def test_block_cg_minimizes_over_the_common_krylov_space():
    A, B = positive(40, 200.0), vectors(40, 3, torch.float64)
    blocks = [B]
    for k in range(1, 6):
        K, _ = torch.linalg.qr(torch.cat(blocks, dim=1))
        galerkin = K @ torch.linalg.solve(K.T @ A @ K, K.T @ B)
        X = CGInverseLinearOperator(A, rtol=0, maxiter=k, on_failure="ignore") @ B
        torch.testing.assert_close(X, galerkin, rtol=0, atol=1e-9)
        blocks.append(A @ blocks[-1])


def test_a_block_needs_fewer_products():
    """A few eigenvalues far from the others: 20 columns find them together."""
    values = torch.cat([torch.logspace(1, 3, 15), torch.linspace(0.5, 1, 185)])
    A, B = with_spectrum(values, torch.float64), vectors(200, 20, torch.float64)
    inverse = CGInverseLinearOperator(A, rtol=1e-8)
    inverse @ B
    together = inverse.last_solve
    singles = 0
    for b in B.T:
        inverse @ b
        singles += inverse.last_solve.num_matvecs
    assert together.converged.all()
    assert together.num_matvecs < 0.5 * singles


def test_columns_stop_one_by_one():
    """An easy column costs no more products than it needs."""
    A = torch.diag(torch.cat([torch.ones(20), torch.linspace(1, 100, 40)])).double()
    easy = torch.zeros(60, dtype=torch.float64)
    easy[:20] = 1
    hard = vectors(60, None, torch.float64)
    for kind in KRYLOV.values():
        inverse = kind(A, rtol=1e-10)
        X = inverse @ torch.stack([hard, easy, 0 * easy, hard], dim=1)
        report = inverse.last_solve
        torch.testing.assert_close(A @ X[:, 1], easy, rtol=0, atol=1e-8)
        assert report.iterations[1] <= 1
        assert report.iterations[2] == 0
        assert report.iterations[0] > 10
        assert report.num_matvecs <= 2 * report.iterations.max() + 4 + report.iterations[1]
        assert not X[:, 2].any()


@pytest.mark.parametrize("solver", KRYLOV)
def test_dependent_and_many_columns(solver):
    A = positive(12, 50.0)
    b = vectors(12, 2, torch.float64)
    B = torch.cat(
        [b, b, 1e-9 * b, b @ torch.ones(2, 2, dtype=b.dtype), torch.eye(12)], dim=1
    )
    inverse = KRYLOV[solver](A, rtol=1e-12)
    torch.testing.assert_close(inverse @ B, torch.linalg.solve(A, B), rtol=0, atol=1e-9)
    many = vectors(12, 300, torch.float64)
    torch.testing.assert_close(
        inverse @ many, torch.linalg.solve(A, many), rtol=0, atol=1e-9
    )
    assert len(inverse.last_solve.iterations) == 300


def test_identity_gives_the_whole_inverse():
    A = positive(20, 1e4)
    inverse = CGInverseLinearOperator(A, rtol=1e-10)
    exact = torch.linalg.inv(A)
    torch.testing.assert_close(inverse.to_dense(), exact, rtol=1e-7, atol=1e-6)
    assert inverse.last_solve.num_matvecs <= 60  # a block of all columns needs one step


def test_long_columns():
    """From 2^15 entries on, columns are reduced one by one."""
    d = torch.linspace(1, 3, 40_000)
    A = DiagonalLinearOperator(d)
    for kind in KRYLOV.values():
        for b in (torch.ones(40_000), torch.stack([d, d.flip(0), d**2], dim=1)):
            x = kind(A, rtol=1e-5) @ b
            torch.testing.assert_close(
                x * (d if b.ndim == 1 else d[:, None]), b, rtol=0, atol=1e-3
            )

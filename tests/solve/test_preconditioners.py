"""Jacobi and Nyström preconditioners, and multi-shift conjugate gradients."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse.linalg as spla
import torch
from torchlinop import (
    CGInverseLinearOperator,
    ConvergenceWarning,
    DiagonalLinearOperator,
    GGNLinearOperator,
    JacobiPreconditioner,
    NegativeCurvatureError,
    NystromPreconditioner,
    multishift_cg,
)

from tests.problems import regression
from tests.solve.matrices import indefinite, positive, relative, vectors, with_spectrum

# ----------------------------------------------------------------------------- Jacobi


@pytest.mark.parametrize("n", [5, 150])
def test_exact_diagonal(n):
    A = with_spectrum(torch.linspace(-1, 3, n), torch.float64)
    M = JacobiPreconditioner(A, damping=0.1)
    torch.testing.assert_close(M.diagonal, A.diagonal().abs())
    torch.testing.assert_close(M.to_dense(), torch.diag(1 / (A.diagonal().abs() + 0.1)))
    torch.testing.assert_close(
        M.with_damping(1.0).to_dense(), torch.diag(1 / (A.diagonal().abs() + 1.0))
    )
    assert M.num_matvecs == n


def test_estimated_diagonal():
    A = torch.diag(torch.linspace(1, 5, 100)) + 0.05 * positive(100, 10.0, torch.float32)
    M = JacobiPreconditioner.estimated(A, num_matvecs=100, seed=3)
    off = A - torch.diag(A.diagonal())
    bound = 5 * torch.linalg.vector_norm(off, dim=1).max() / 10  # five standard deviations
    assert (M.diagonal - A.diagonal()).abs().max() < bound
    assert M.num_matvecs == 100
    again = JacobiPreconditioner.estimated(A, num_matvecs=100, seed=3)
    torch.testing.assert_close(M.diagonal, again.diagonal)
    # exact for a diagonal matrix, whatever the signs
    D = DiagonalLinearOperator(torch.linspace(1, 2, 7))
    torch.testing.assert_close(
        JacobiPreconditioner.estimated(D, num_matvecs=1).diagonal, D.diagonal()
    )


def test_bad_diagonals():
    with pytest.raises(ValueError, match=r"1 of 2 entries.*positive damping"):
        JacobiPreconditioner(torch.diag(torch.tensor([1.0, 0.0])))
    with pytest.raises(ValueError, match="damping has to be at least 0"):
        JacobiPreconditioner(torch.eye(2), damping=-1)
    with pytest.raises(ValueError, match="No entry of the estimated"):
        JacobiPreconditioner.estimated(-torch.eye(2), num_matvecs=3)
    with pytest.raises(ValueError, match="at least 1"):
        JacobiPreconditioner.estimated(torch.eye(2), num_matvecs=0)
    with pytest.raises(ValueError, match=r"shape \(N,\)"):
        JacobiPreconditioner.from_diagonal(torch.eye(2))
    with pytest.raises(ValueError, match="NaN"):
        JacobiPreconditioner.from_diagonal(np.array([1.0, np.nan]))


def test_jacobi_helps_a_badly_scaled_matrix():
    scales = torch.logspace(0, 3, 60, dtype=torch.float64)
    A = scales.unsqueeze(1) * positive(60, 5.0) * scales
    b = vectors(60, None, torch.float64)
    plain = CGInverseLinearOperator(A, rtol=1e-8)
    helped = CGInverseLinearOperator(A, rtol=1e-8, M=JacobiPreconditioner(A))
    torch.testing.assert_close(A @ (helped @ b), b, rtol=0, atol=1e-6)
    plain @ b
    assert helped.last_solve.num_matvecs < plain.last_solve.num_matvecs / 3


# ---------------------------------------------------------------------------- Nyström


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128], ids=str)
def test_nystrom_of_a_low_rank_matrix_is_exact(dtype):
    top = torch.logspace(0, 2, 8, dtype=torch.float64)
    values = torch.cat([top, torch.zeros(42)])
    A = with_spectrum(values, dtype)
    M = NystromPreconditioner(A, damping=0.1, rank=8)
    # the sketch of rank 8 has no spare vectors: its condition number is in the errors
    tolerance = 1e4 * torch.finfo(dtype).eps
    expected = top.flip(0).to(M.eigenvalues.dtype)
    torch.testing.assert_close(
        M.eigenvalues, expected, rtol=tolerance, atol=100 * tolerance
    )
    # lambda_l + damping times the inverse on the range, the identity beside it
    identity = torch.eye(50, dtype=dtype)
    U = M.eigenvectors
    projected = U @ U.mH
    dense = (values[0] + 0.1) * torch.linalg.inv(A + 0.1 * identity) @ projected
    dense = dense + identity - projected
    torch.testing.assert_close(M.to_dense(), dense, rtol=0, atol=1e2 * tolerance)


def test_nystrom_finds_a_rank():
    values = torch.cat([torch.logspace(-2, 3, 60), torch.full((240,), 1e-6)])
    A = with_spectrum(values, torch.float64)
    M = NystromPreconditioner(A, damping=1e-2)
    assert M.rank in (40, 80)  # 10 doubled
    assert M.eigenvalues[-1] <= 0.1
    assert M.num_matvecs == M.rank
    assert (M.eigenvalues.diff() <= 0).all()
    assert NystromPreconditioner(A, damping=1e-2, max_rank=25).rank == 25
    assert NystromPreconditioner(A, damping=1e3).rank == 10
    # the paper's bound of the condition number, with room for the sketch
    damped = A + 1e-2 * torch.eye(300, dtype=torch.float64)
    spectrum = torch.linalg.eigvals(M.to_dense() @ damped).real
    assert spectrum.max() / spectrum.min() < 28


def test_nystrom_preconditioning():
    values = torch.cat([torch.logspace(-1, 4, 50), torch.linspace(0.01, 0.1, 150)])
    A = with_spectrum(values, torch.float64)
    B = vectors(200, 3, torch.float64)
    M = NystromPreconditioner(A, damping=1e-1)
    plain = CGInverseLinearOperator(A, damping=1e-1, rtol=1e-8)
    helped = CGInverseLinearOperator(A, damping=1e-1, rtol=1e-8, M=M)
    for b in (B, B[:, 0]):
        x = helped @ b
        torch.testing.assert_close(A @ x + 0.1 * x, b, rtol=0, atol=1e-6)
        plain @ b
        assert 3 * helped.last_solve.num_matvecs <= plain.last_solve.num_matvecs
    steps = []
    damped = A.numpy() + 0.1 * np.eye(200)
    b = B[:, 0].numpy()
    options = relative(spla.cg, 1e-8)
    _, info = spla.cg(damped, b, M=M, callback=steps.append, **options)
    assert info == 0
    assert abs(len(steps) - helped.last_solve.iterations[0]) <= 1


def test_nystrom_with_damping():
    A = positive(50, 1e4)
    M = NystromPreconditioner(A, damping=1e-2, rank=20)
    fresh = NystromPreconditioner(A, damping=1e-1, rank=20)
    torch.testing.assert_close(M.with_damping(1e-1).to_dense(), fresh.to_dense())
    torch.testing.assert_close(
        M.to_dense(), NystromPreconditioner(A, damping=1e-2, rank=20).to_dense()
    )
    other = NystromPreconditioner(A, damping=1e-2, rank=20, seed=1)
    assert not torch.allclose(M.to_dense(), other.to_dense())


def test_bad_nystrom():
    A = positive(20, 10.0)
    with pytest.raises(ValueError, match="positive damping, or a rank"):
        NystromPreconditioner(A, damping=0.0)
    with pytest.raises(ValueError, match="damping has to be at least 0"):
        NystromPreconditioner(A, damping=-1e-3, rank=3)
    with pytest.raises(ValueError, match="between 1 and N = 20, got 21"):
        NystromPreconditioner(A, damping=1.0, rank=21)
    with pytest.raises(ValueError, match="singular"):
        NystromPreconditioner(torch.zeros(5, 5), damping=0.0, rank=3)
    with pytest.raises(ValueError, match="not finite"):
        NystromPreconditioner(torch.full((5, 5), torch.nan), damping=1.0)
    with pytest.raises(NegativeCurvatureError) as error:
        NystromPreconditioner(indefinite(20, 3.0), damping=1.0)
    p = error.value.direction
    assert (p @ indefinite(20, 3.0) @ p).item() == pytest.approx(error.value.curvature)


# ------------------------------------------------------------------------ multi-shift


@pytest.mark.parametrize("columns", [None, 1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128], ids=str)
def test_multishift(columns, dtype):
    A, b = positive(60, 100.0, dtype), vectors(60, columns, dtype)
    shifts = [1.0, 0.0, 10.0, 0.1]
    rtol = torch.finfo(dtype).eps ** 0.6
    X, report = multishift_cg(A, b, shifts, rtol=rtol, on_failure="raise")
    assert X.shape == (4, *b.shape)
    identity = torch.eye(60, dtype=dtype)
    norms = []
    for x, shift in zip(X, shifts, strict=True):
        r = (A + shift * identity) @ x - b
        norms.append(torch.linalg.vector_norm(r, dim=0).reshape(-1))
    norms = torch.cat(norms).double().numpy()
    assert (norms <= 1.1 * report.tolerances).all()
    np.testing.assert_allclose(report.residual_norms, norms, atol=report.tolerances.max())
    assert report.converged.shape == (4 * (columns or 1),)


def test_multishift_costs_one_solve():
    A, b = positive(100, 1e3), vectors(100, None, torch.float64)
    X, report = multishift_cg(A, b.numpy(), np.logspace(-3, 0, 10), rtol=1e-8)
    assert isinstance(X, np.ndarray)
    inverse = CGInverseLinearOperator(A, damping=1e-3, rtol=1e-8)
    inverse @ b
    # rounding alone tells them apart
    assert report.num_matvecs == pytest.approx(inverse.last_solve.num_matvecs, rel=0.1)
    assert (np.diff(report.iterations) <= 0).all()  # larger shifts stop earlier


def test_multishift_of_a_ggn_and_a_complex_vector():
    G = GGNLinearOperator(*regression().arguments)
    b = np.exp(1j * np.arange(26))
    X, _ = multishift_cg(G, b, [0.1, 1.0], rtol=1e-10)
    dense = G.to_dense().numpy()
    for x, shift in zip(X, (0.1, 1.0), strict=True):
        np.testing.assert_allclose(x, np.linalg.solve(dense + shift * np.eye(26), b))


def test_bad_multishift():
    A, b = positive(30, 1e4), vectors(30, None, torch.float64)
    with pytest.raises(ValueError, match="shifts is empty"):
        multishift_cg(A, b, [])
    with pytest.raises(ValueError, match="N = 30"):
        multishift_cg(A, b[:20], [1.0])
    with pytest.raises(NegativeCurvatureError, match="damping"):
        multishift_cg(A, b, [-0.5, 1.0])
    with pytest.warns(
        ConvergenceWarning, match="Multi-shift CG did not converge for 1 of 2"
    ):
        multishift_cg(A, b, [0.0, 100.0], maxiter=6, rtol=1e-6)
    with pytest.raises(ValueError, match="NaN"):
        multishift_cg(A, b * torch.nan, [1.0])

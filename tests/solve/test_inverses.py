"""Inverses against dense solutions of matrices with a chosen spectrum."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse.linalg as spla
import torch
from torchlinop import (
    CGInverseLinearOperator,
    CholeskyInverseLinearOperator,
    EighInverseLinearOperator,
    GGNLinearOperator,
    JacobiPreconditioner,
    MINRESInverseLinearOperator,
    NeumannInverseLinearOperator,
    NystromPreconditioner,
)

from tests.problems import regression
from tests.solve.matrices import (
    KRYLOV,
    eps,
    indefinite,
    positive,
    relative,
    residuals,
    vectors,
)

ALL = [torch.float32, torch.float64, torch.complex64, torch.complex128]
COLUMNS = [None, 1, 3, 20, 45]


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("solver", KRYLOV)
@pytest.mark.parametrize("preconditioned", [False, True])
def test_residuals_are_what_was_asked_for(solver, columns, dtype, preconditioned):
    A = (positive if solver == "CG" else indefinite)(40, 30.0, dtype)
    M = torch.diag(torch.linspace(0.5, 2, 40)).to(dtype) if preconditioned else None
    b = vectors(40, columns, dtype)
    rtol = eps(dtype) ** 0.75
    inverse = KRYLOV[solver](A, rtol=rtol, M=M, on_failure="raise")
    x = inverse @ b
    assert x.shape == b.shape
    assert x.dtype == b.dtype
    norms = residuals(A, x, b).numpy()
    wanted = rtol * torch.linalg.vector_norm(b, dim=0).reshape(-1).double().numpy()
    assert (norms <= 1.1 * wanted).all()
    report = inverse.last_solve
    assert report.converged.all()
    np.testing.assert_allclose(report.tolerances, wanted, rtol=1e-5)
    np.testing.assert_allclose(report.residual_norms, norms, atol=0.1 * wanted.max())
    # of MINRES between 80 and 91, as the processor rounds
    assert report.num_matvecs <= (60 if solver == "CG" else 100) * len(norms)


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_every_inverse_is_the_dense_one(damping):
    A, b = positive(30, 100.0), vectors(30, 4, torch.float64)
    exact = torch.linalg.solve(A + damping * torch.eye(30, dtype=A.dtype), b)
    inverses = [
        CGInverseLinearOperator(A, damping=damping, rtol=1e-13),
        MINRESInverseLinearOperator(A, damping=damping, rtol=1e-13),
        NeumannInverseLinearOperator(A, num_terms=4000, damping=damping),
        CholeskyInverseLinearOperator(A, damping=damping),
        EighInverseLinearOperator(A, damping=damping),
    ]
    for inverse in inverses:
        torch.testing.assert_close(inverse @ b, exact, rtol=0, atol=1e-9)
        torch.testing.assert_close(
            inverse.with_damping(0.7) @ b,
            torch.linalg.solve(A + 0.7 * torch.eye(30, dtype=A.dtype), b),
            rtol=0,
            atol=1e-10,
        )
        torch.testing.assert_close(inverse @ b, exact, rtol=0, atol=1e-9)


def test_indefinite_matrices():
    A, b = indefinite(30, 100.0), vectors(30, 4, torch.float64)
    for damping in (0.0, -0.05):
        exact = torch.linalg.solve(A + damping * torch.eye(30, dtype=A.dtype), b)
        for inverse in (
            MINRESInverseLinearOperator(A, damping=damping, rtol=1e-13),
            EighInverseLinearOperator(A, damping=damping),
        ):
            torch.testing.assert_close(inverse @ b, exact, rtol=0, atol=1e-8)


def test_steps_are_those_of_scipy():
    """The same mathematics, so the same number of steps; one more or less by rounding."""
    b = vectors(60, None, torch.float64)
    for inverse, solver, A in (
        (CGInverseLinearOperator, spla.cg, positive(60, 50.0)),
        (MINRESInverseLinearOperator, spla.minres, indefinite(60, 20.0)),
    ):
        for steps in (1, 5, 12):
            x = inverse(A, on_failure="ignore", rtol=0, maxiter=steps) @ b
            options = relative(solver, 0.0)
            theirs, _ = solver(A.numpy(), b.numpy(), maxiter=steps, **options)
            np.testing.assert_allclose(x.numpy(), theirs, rtol=0, atol=1e-11)
    seen = []
    A = positive(60, 50.0)
    spla.cg(A.numpy(), b.numpy(), callback=seen.append, **relative(spla.cg, 1e-6))
    mine = CGInverseLinearOperator(A, rtol=1e-6)
    mine @ b
    assert abs(mine.last_solve.iterations[0] - len(seen)) <= 1


def test_minres_minimizes_the_residual():
    """Against least squares over the Krylov space, step by step."""
    A, b = indefinite(25, 10.0), vectors(25, None, torch.float64)
    basis = [b]
    for k in range(1, 8):
        K = torch.stack(basis, dim=1)
        K, _ = torch.linalg.qr(K)
        best = torch.linalg.lstsq(A @ K, b.unsqueeze(1)).solution
        expected = torch.linalg.vector_norm(A @ (K @ best).squeeze(1) - b).item()
        inverse = MINRESInverseLinearOperator(A, rtol=0, maxiter=k, on_failure="ignore")
        x = inverse @ b
        assert torch.linalg.vector_norm(A @ x - b).item() == pytest.approx(
            expected, rel=1e-9
        )
        assert inverse.last_solve.residual_norms[0] == pytest.approx(expected, rel=1e-9)
        basis.append(A @ basis[-1])


def test_a_complex_vector_for_a_real_matrix():
    A = positive(20, 50.0)
    b = torch.complex(vectors(20, 2, torch.float64, 3), vectors(20, 2, torch.float64, 4))
    x = CGInverseLinearOperator(A, rtol=1e-12) @ b
    torch.testing.assert_close(x, torch.linalg.solve(A.to(b.dtype), b), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "kind",
    [CGInverseLinearOperator, CholeskyInverseLinearOperator, EighInverseLinearOperator],
)
def test_an_optimizer_step_is_noticed(kind):
    problem = regression()
    G = GGNLinearOperator(*problem.arguments)
    options = {"rtol": 1e-12} if kind is CGInverseLinearOperator else {}
    inverse = kind(G, damping=0.1, **options)
    b = vectors(26, None, torch.float64)
    for _ in range(6):
        x = inverse @ b
        torch.testing.assert_close(G @ x + 0.1 * x, b)
    with torch.no_grad():
        for p in problem.params:
            p.add_(0.1)
    x = inverse @ b
    fresh = GGNLinearOperator(*problem.arguments)
    torch.testing.assert_close(fresh @ x + 0.1 * x, b)


def test_with_damping_shares_the_linearization():
    problem = regression()
    G = GGNLinearOperator(*problem.arguments)
    M = NystromPreconditioner(G, damping=0.1)
    inverse = CGInverseLinearOperator(G, damping=0.1, M=M, rtol=1e-10)
    other = inverse.with_damping(0.5)
    assert other.A is G
    assert other.M.damping == pytest.approx(0.5)
    assert other.M.eigenvectors is M.eigenvectors
    assert inverse.damping == 0.1
    assert inverse.M is M
    b = vectors(26, None, torch.float64)
    x = other @ b
    torch.testing.assert_close(G @ x + 0.5 * x, b)
    assert inverse.last_solve is None


def test_with_a_damping_below_that_of_the_preconditioner():
    A = positive(20, 10.0)
    inverse = MINRESInverseLinearOperator(A, M=JacobiPreconditioner(A, damping=0.1))
    shifted = inverse.with_damping(-0.45)
    assert shifted.M is inverse.M
    b = vectors(20, None, torch.float64)
    torch.testing.assert_close(A @ (x := shifted @ b) - 0.45 * x, b, rtol=0, atol=1e-3)

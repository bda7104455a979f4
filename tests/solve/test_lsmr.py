"""LSMR against dense least squares."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse.linalg as spla
import torch
from torchlinop import (
    ConvergenceWarning,
    JacobianLinearOperator,
    LSMRInverseLinearOperator,
)

from tests.problems import regression
from tests.solve.matrices import (
    positive,
    vectors,
)


@pytest.mark.parametrize("shape", [(40, 25), (25, 40), (30, 30)])
@pytest.mark.parametrize("rank", [None, 12])
@pytest.mark.parametrize("damp", [0.0, 0.6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_lsmr_is_the_pseudo_inverse(shape, rank, damp, dtype):
    m, n = shape
    A = vectors(m, n, dtype)
    if rank:
        A = vectors(m, rank, dtype) @ vectors(rank, n, dtype, 5)
    B = vectors(m, 3, dtype, 6)
    inverse = LSMRInverseLinearOperator(A, damp=damp, atol=1e-13, btol=1e-13)
    if damp:
        gram = A.mH @ A + damp**2 * torch.eye(n, dtype=dtype)
        dense = torch.linalg.solve(gram, A.mH)
    else:
        dense = torch.linalg.pinv(A, rtol=1e-10)
    scale = dense.abs().max().item()
    torch.testing.assert_close(inverse @ B, dense @ B, rtol=0, atol=1e-8 * scale)
    torch.testing.assert_close(
        inverse.H @ B.new_ones(n), dense.mH @ B.new_ones(n), rtol=0, atol=1e-7 * scale
    )
    report = inverse.last_solve
    assert report.converged.all()
    X = dense @ B
    lengths = [torch.linalg.vector_norm(Y, dim=0) for Y in (B - A @ X, damp * X)]
    true = torch.hypot(*lengths).numpy()
    np.testing.assert_allclose(report.residual_norms, true, atol=1e-7)
    assert "or A^H r" in str(report)


@pytest.mark.parametrize("shape", [(50, 30), (30, 50)])
@pytest.mark.parametrize("damp", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 1e-9])
def test_lsmr_takes_scipys_steps(shape, damp, tolerance):
    A, b = vectors(*shape, torch.float64), vectors(shape[0], None, torch.float64)
    options = {"damp": damp, "atol": tolerance, "btol": tolerance, "maxiter": 99}
    inverse = LSMRInverseLinearOperator(A, **options)
    x = inverse @ b
    theirs = spla.lsmr(A.numpy(), b.numpy(), **options)
    steps = inverse.last_solve.iterations[0]
    assert abs(steps - theirs[2]) <= 1  # by rounding
    options |= {"atol": 0, "btol": 0, "maxiter": steps}
    theirs = spla.lsmr(A.numpy(), b.numpy(), **options)
    np.testing.assert_allclose(x.numpy(), theirs[0], atol=1e-12)


def test_lsmr_options_and_failures():
    A, B = vectors(30, 20, torch.float64), vectors(30, 2, torch.float64)
    exact = torch.linalg.lstsq(A, B).solution
    seen = []
    warm = LSMRInverseLinearOperator(
        A, x0=exact, atol=1e-9, btol=1e-9, callback=lambda x: seen.append(x.shape)
    )
    torch.testing.assert_close(warm @ B, exact)
    cold = LSMRInverseLinearOperator(A, atol=1e-9, btol=1e-9, maxiter=3)
    with pytest.warns(ConvergenceWarning, match="LSMR did not converge for 2 of 2"):
        cold @ B
    assert warm.last_solve.iterations.max() <= 1
    tepid = LSMRInverseLinearOperator(
        A, x0=exact + 1e-3, atol=1e-9, btol=1e-9, callback=lambda x: seen.append(x.shape)
    )
    torch.testing.assert_close(tepid @ B, exact)
    assert set(seen) == {(20, 2)}
    conlim = LSMRInverseLinearOperator(
        torch.diag(torch.logspace(0, 9, 12)).double(), conlim=1e3
    )
    with pytest.warns(ConvergenceWarning, match="exceeds conlim"):
        conlim @ torch.ones(12)
    with pytest.raises(ValueError, match="damp has to be at least 0"):
        LSMRInverseLinearOperator(A, damp=-1)
    damped = cold.with_damping(0.5)
    assert damped.damp == 0.5
    assert cold.damp == 0


def test_lsmr_of_a_jacobian():
    """A Gauss-Newton step is a least-squares problem."""
    problem = regression()
    J = JacobianLinearOperator(problem.model, problem.params, problem.data)
    b = vectors(J.shape[0], None, torch.float64)
    step = LSMRInverseLinearOperator(J, damp=0.1, atol=1e-12, btol=1e-12) @ b
    dense = J.to_dense()
    gram = dense.T @ dense + 0.01 * torch.eye(26, dtype=torch.float64)
    torch.testing.assert_close(step, torch.linalg.solve(gram, dense.T @ b))


def test_conlim_of_zero_is_no_limit():
    A = 1e-9 * torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    for conlim in (0, 10):
        x = LSMRInverseLinearOperator(A, conlim=conlim, maxiter=50) @ torch.ones(3)
        torch.testing.assert_close(
            A @ x, torch.ones(3), rtol=0, atol=1e-5, check_dtype=False
        )


def test_lsmr_calls_nothing_converged_that_is_not():
    b = vectors(30, None, torch.float32)
    A = positive(30, 1e6, torch.float32)
    inverse = LSMRInverseLinearOperator(A, maxiter=1000, conlim=0, on_failure="ignore")
    x = inverse @ b
    report = inverse.last_solve
    r = b.double() - A.double() @ x.double()
    assert report.residual_norms[0] == pytest.approx(r.norm().item(), rel=1e-2)
    assert not report.converged[0] or (
        report.residual_norms[0] <= 2 * report.tolerances[0]
        or report.normal_residual_norms[0] <= 2 * report.normal_tolerances[0]
    )

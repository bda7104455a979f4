"""What users pass, and the errors they get."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg as spla
import torch
from torchlinop import (
    CGInverseLinearOperator,
    CholeskyInverseLinearOperator,
    ConvergenceError,
    ConvergenceWarning,
    DiagonalLinearOperator,
    EighInverseLinearOperator,
    HessianLinearOperator,
    JacobiPreconditioner,
    LSMRInverseLinearOperator,
    MINRESInverseLinearOperator,
    NegativeCurvatureError,
    NeumannInverseLinearOperator,
    NystromPreconditioner,
    multishift_cg,
    neumann_scale,
)

from tests.problems import classification
from tests.solve.matrices import (
    KRYLOV,
    indefinite,
    positive,
    vectors,
)

SQUARE = [
    CGInverseLinearOperator,
    MINRESInverseLinearOperator,
    NeumannInverseLinearOperator,
    CholeskyInverseLinearOperator,
    EighInverseLinearOperator,
    JacobiPreconditioner,
    lambda A: NystromPreconditioner(A, damping=1.0),
    lambda A: multishift_cg(A, torch.ones(4), [1.0]),
    neumann_scale,
]


def test_starting_vectors():
    A, B = positive(30, 100.0), vectors(30, 3, torch.float64)
    exact = torch.linalg.solve(A, B)
    for kind in KRYLOV.values():
        inverse = kind(A, rtol=1e-10, x0=exact.numpy())
        torch.testing.assert_close(inverse @ B, exact)
        assert inverse.last_solve.iterations.max() == 0
        near = kind(A, rtol=1e-10, x0=exact[:, 0] + 1e-6)
        torch.testing.assert_close(near @ B[:, 0], exact[:, 0])
        cold = kind(A, rtol=1e-10)
        cold @ B[:, 0]
        assert near.last_solve.iterations[0] < cold.last_solve.iterations[0]
        with pytest.raises(ValueError, match="x0 has 3 columns, the right-hand side 2"):
            inverse @ B[:, :2]
        with pytest.raises(ValueError, match="N = 30, got"):
            kind(A, x0=torch.ones(29))


@pytest.mark.parametrize("solver", KRYLOV)
@pytest.mark.parametrize("columns", [None, 3])
def test_callback_sees_every_iterate(solver, columns):
    A, b = positive(30, 100.0), vectors(30, columns, torch.float64)
    seen = []
    start = torch.ones(30, dtype=torch.float64)
    inverse = KRYLOV[solver](
        A, rtol=1e-8, x0=start, callback=lambda x: seen.append(x.clone())
    )
    x = inverse @ b
    assert len(seen) == inverse.last_solve.iterations.max()
    assert seen[0].shape == b.shape
    torch.testing.assert_close(seen[-1], x)
    gaps = [torch.linalg.vector_norm(A @ s - b).item() for s in seen]
    assert gaps[-1] < 1e-3 * gaps[0]


def test_negative_curvature_names_minres():
    A = indefinite(30, 10.0)
    for b in (vectors(30, None, torch.float64), vectors(30, 5, torch.float64)):
        with pytest.raises(NegativeCurvatureError, match="MINRES") as error:
            CGInverseLinearOperator(A) @ b
        p = error.value.direction
        assert torch.linalg.vector_norm(p).item() == pytest.approx(1)
        assert (p @ A @ p).item() == pytest.approx(error.value.curvature)
        assert error.value.curvature < 0
    with pytest.raises(NegativeCurvatureError, match="EighInverse"):
        CholeskyInverseLinearOperator(A) @ b
    with pytest.raises(NegativeCurvatureError, match="not the Hessian"):
        NystromPreconditioner(A, damping=1e-3)


@pytest.mark.parametrize("kind", SQUARE)
def test_rectangular_matrices_are_refused(kind):
    with pytest.raises(ValueError, match=r"got 4 x 3.*LSMRInverse"):
        kind(torch.ones(4, 3))


@pytest.mark.parametrize("kind", KRYLOV.values())
def test_bad_preconditioners(kind):
    A, b = positive(10, 5.0), torch.ones(10, dtype=torch.float64)
    with pytest.raises(ValueError, match="M is 9 x 9, but A is 10 x 10"):
        kind(A, M=torch.eye(9))
    with pytest.raises(TypeError, match="matvec=f"):
        kind(A, M=lambda x: x)
    with pytest.raises(TypeError, match="M is complex"):
        kind(A, M=torch.eye(10, dtype=torch.complex128))
    with pytest.raises(ValueError, match="M is on meta, but A on cpu"):
        kind(A, M=DiagonalLinearOperator(torch.ones(10, device="meta")))
    for columns in (b, torch.stack([b, b.cumsum(0)], dim=1)):
        with pytest.raises(np.linalg.LinAlgError, match="not positive definite"):
            kind(A, M=-torch.eye(10, dtype=torch.float64)) @ columns


@pytest.mark.parametrize("kind", KRYLOV.values())
def test_preconditioners_of_any_kind(kind):
    A, b = positive(10, 5.0), torch.ones(10, dtype=torch.float64)
    exact = torch.linalg.solve(A, b)
    d = np.linspace(1, 2, 10)
    for M in (
        np.diag(d),
        scipy.sparse.diags(d),
        spla.LinearOperator((10, 10), matvec=lambda x: x * d.reshape(x.shape), dtype=float),
        DiagonalLinearOperator(torch.tensor(d, dtype=torch.float32)),
        JacobiPreconditioner(A),
    ):
        torch.testing.assert_close(kind(A, M=M, rtol=1e-12) @ b, exact)


@pytest.mark.parametrize("kind", KRYLOV.values())
def test_bad_options(kind):
    A = torch.eye(3)
    with pytest.raises(ValueError, match="rtol has to be at least 0"):
        kind(A, rtol=-1)
    with pytest.raises(ValueError, match="maxiter has to be an integer"):
        kind(A, maxiter=2.5)
    with pytest.raises(ValueError, match="'warn', 'raise' or 'ignore'"):
        kind(A, on_failure="print")
    with pytest.raises(ValueError, match="damping has to be a finite number"):
        kind(A, damping=float("nan"))
    with pytest.raises(TypeError, match="Expected a matrix"):
        kind(3)


@pytest.mark.parametrize("kind", KRYLOV.values())
def test_nan(kind):
    b = torch.ones(4, 2)
    b[1, 1] = torch.nan
    with pytest.raises(ValueError, match=r"right-hand side has NaN.*columns \[1\]"):
        kind(torch.eye(4)) @ b
    broken = torch.eye(4)
    broken[2, 2] = torch.nan
    for columns in (torch.ones(4), torch.ones(4, 2).cumsum(0)):
        with pytest.raises(np.linalg.LinAlgError, match="check_finite"):
            kind(broken) @ columns
    with pytest.raises(ValueError, match="check_finite"):
        EighInverseLinearOperator(broken) @ torch.ones(4)


def test_the_model_is_left_alone_after_an_error():
    problem = classification()
    H = HessianLinearOperator(*problem.arguments)
    before = copy.deepcopy(problem.model.state_dict())
    random = torch.random.get_rng_state()
    b = H @ torch.ones(27, dtype=torch.float64)
    with pytest.raises(NegativeCurvatureError):
        CGInverseLinearOperator(H) @ b
    assert torch.equal(torch.random.get_rng_state(), random)
    for name, value in problem.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.grad is None and p.requires_grad for p in problem.params)


def test_pickle():
    A = positive(10, 5.0)
    for inverse in (
        CGInverseLinearOperator(A, rtol=1e-10, M=JacobiPreconditioner(A)),
        EighInverseLinearOperator(A),
        LSMRInverseLinearOperator(A),
    ):
        again = pickle.loads(pickle.dumps(inverse))
        b = torch.ones(10, dtype=torch.float64)
        torch.testing.assert_close(again @ b, inverse @ b)


def test_a_singular_preconditioner_is_named():
    M = torch.diag(torch.tensor([0.0, 1.0]))
    inverse = MINRESInverseLinearOperator(torch.eye(2), M=M)
    with pytest.warns(ConvergenceWarning, match="M is singular"):
        inverse @ torch.tensor([1.0, 0.0])
    with pytest.warns(ConvergenceWarning, match="M is singular"):
        CGInverseLinearOperator(torch.eye(2), M=M) @ torch.tensor([1.0, 0.0])


def test_zero_columns_with_a_start_are_zero():
    A = positive(10, 5.0)
    B = vectors(10, 2, torch.float64)
    B[:, 0] = 0
    X = CGInverseLinearOperator(A, x0=torch.ones(10)) @ B
    assert not X[:, 0].any()


def test_errors_can_be_pickled():
    A = indefinite(10, 5.0)
    b = vectors(10, None, torch.float64)
    with pytest.raises(NegativeCurvatureError) as negative:
        CGInverseLinearOperator(A) @ b
    with pytest.raises(ConvergenceError) as slow:
        MINRESInverseLinearOperator(A, maxiter=1, rtol=1e-9, on_failure="raise") @ b
    again = pickle.loads(pickle.dumps(negative.value))
    assert again.curvature == negative.value.curvature
    again = pickle.loads(pickle.dumps(slow.value))
    assert str(again) == str(slow.value)
    assert again.report.iterations[0] == 1

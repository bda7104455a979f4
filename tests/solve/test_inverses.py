"""Inverses against dense solutions of matrices with a chosen spectrum."""

from __future__ import annotations

import copy
import pickle
import warnings

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
    GGNLinearOperator,
    HessianLinearOperator,
    IdentityLinearOperator,
    JacobianLinearOperator,
    JacobiPreconditioner,
    LSMRInverseLinearOperator,
    MINRESInverseLinearOperator,
    NegativeCurvatureError,
    NeumannInverseLinearOperator,
    NystromPreconditioner,
    aslinearoperator,
    multishift_cg,
    neumann_scale,
)

from tests.problems import classification, regression
from tests.solve.matrices import indefinite, positive, relative, vectors, with_spectrum

ALL = [torch.float32, torch.float64, torch.complex64, torch.complex128]
KRYLOV = {"CG": CGInverseLinearOperator, "MINRES": MINRESInverseLinearOperator}
COLUMNS = [None, 1, 3, 20, 45]


def eps(dtype):
    return torch.finfo(dtype).eps


def residuals(A, x, b):
    wide = torch.promote_types(A.dtype, torch.float64)
    return torch.linalg.vector_norm(A.to(wide) @ x.to(wide) - b.to(wide), dim=0).reshape(-1)


# --------------------------------------------------------- right, and known to be right


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
    assert report.num_matvecs <= (60 if solver == "CG" else 95) * len(norms)


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


def test_claimed_residuals_are_true_in_float32():
    """The recurrences go on to shrink where the true residual does not."""
    A = positive(200, 1e6, torch.float32)
    b = vectors(200, None, torch.float32)
    for kind in KRYLOV.values():
        inverse = kind(A, rtol=1e-7, on_failure="ignore", maxiter=3000)
        x = inverse @ b
        report = inverse.last_solve
        assert report.residual_norms[0] == pytest.approx(residuals(A, x, b).item(), rel=0.3)
        assert not report.converged[0]


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


def test_a_complex_vector_for_a_real_matrix():
    A = positive(20, 50.0)
    b = torch.complex(vectors(20, 2, torch.float64, 3), vectors(20, 2, torch.float64, 4))
    x = CGInverseLinearOperator(A, rtol=1e-12) @ b
    torch.testing.assert_close(x, torch.linalg.solve(A.to(b.dtype), b), rtol=0, atol=1e-9)


# ------------------------------------------------------------- convergence is visible


@pytest.mark.parametrize("solver", KRYLOV)
def test_not_converging(solver):
    A, B = positive(60, 1e5), vectors(60, 3, torch.float64)
    inverse = KRYLOV[solver](A, rtol=1e-10, maxiter=4)
    with pytest.warns(
        ConvergenceWarning, match=rf"{solver} did not .* Raise maxiter"
    ) as got:
        inverse @ B
    assert got[0].filename == __file__
    report = inverse.last_solve
    assert report.reason == "maxiter"
    assert not report.converged.any()
    assert (report.iterations == 4).all()
    assert "0 of 3 columns converged (stopped by maxiter)" in str(report)
    strict = KRYLOV[solver](A, rtol=1e-10, maxiter=4, on_failure="raise")
    with pytest.raises(ConvergenceError, match="Raise maxiter") as error:
        strict @ B
    assert error.value.report is strict.last_solve
    assert error.value.solution.shape == B.shape
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        KRYLOV[solver](A, rtol=1e-10, maxiter=4, on_failure="ignore") @ B


def test_the_true_residual_of_one_column_is_in_the_warning():
    A = positive(60, 1e5)
    b = vectors(60, None, torch.float64)
    inverse = CGInverseLinearOperator(A, rtol=1e-10, maxiter=4)
    with pytest.warns(ConvergenceWarning) as got:
        x = inverse @ b
    assert f"{residuals(A, x, b).item():.2e}" in str(got[0].message)


def test_report_prints():
    inverse = CGInverseLinearOperator(torch.eye(4))
    assert inverse.last_solve is None
    inverse @ torch.ones(4, 2)
    lines = str(inverse.last_solve).splitlines()
    assert lines[0] == "CG: 2 of 2 columns converged"
    assert lines[2].split() == ["products", "2"]  # the second column is the first
    inverse @ torch.ones(4, 0)
    assert str(inverse.last_solve) == "CG: no columns"


def test_singular_matrices():
    """In the range a solution, outside of it a word."""
    values = torch.cat([torch.zeros(5), torch.linspace(1, 3, 15)])
    A = with_spectrum(values, torch.float64)
    inside = A @ vectors(20, 2, torch.float64)
    outside = vectors(20, 2, torch.float64)
    for kind in KRYLOV.values():
        x = kind(A, rtol=1e-10) @ inside
        torch.testing.assert_close(A @ x, inside)
        for b in (outside, outside[:, 0]):
            inverse = kind(A, rtol=1e-10, maxiter=200)
            with pytest.warns(ConvergenceWarning, match="damping"):
                inverse @ b
            assert not inverse.last_solve.converged.any()
    best = LSMRInverseLinearOperator(A, atol=1e-12, btol=1e-12) @ outside
    torch.testing.assert_close(best, torch.linalg.pinv(A, rtol=1e-8) @ outside)


# ------------------------------------------------------------------------ bad input


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


def test_direct_inverses_refuse_what_they_cannot_do():
    with pytest.raises(ValueError, match=r"Hermitian matrix.*LSMR"):
        CholeskyInverseLinearOperator(torch.ones(3, 3).triu()) @ torch.ones(3)
    singular = EighInverseLinearOperator(torch.diag(torch.tensor([1.0, 0.0])))
    with pytest.raises(np.linalg.LinAlgError, match="singular"):
        singular @ torch.ones(2)
    torch.testing.assert_close(
        singular.with_damping(1.0) @ torch.ones(2), torch.tensor([0.5, 1.0])
    )
    huge = IdentityLinearOperator([(10_000_000,)], "cpu", torch.float32)
    with pytest.raises(MemoryError, match=r"GiB.*CGInverse"):
        CholeskyInverseLinearOperator(huge)


# ------------------------------------------------------------------------------- LSMR


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


# ---------------------------------------------------------------------------- Neumann


@pytest.mark.parametrize("num_terms", [0, 1, 7])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_neumann_sums_the_series(num_terms, preconditioned):
    A = positive(12, 20.0)
    P = torch.diag(torch.linspace(0.5, 1, 12)).double() if preconditioned else None
    dense_P = torch.eye(12, dtype=torch.float64) if P is None else P
    step = torch.eye(12, dtype=torch.float64) - 0.9 * dense_P @ A
    series = 0.9 * sum(torch.matrix_power(step, k) for k in range(num_terms + 1)) @ dense_P
    inverse = NeumannInverseLinearOperator(A, num_terms, scale=0.9, preconditioner=P)
    torch.testing.assert_close(inverse.to_dense(), series)
    assert inverse.last_solve.num_matvecs == 12 * num_terms
    torch.testing.assert_close(inverse.H.to_dense(), series.T)


@pytest.mark.parametrize("columns", [None, 3])
def test_a_diverging_series_is_found_out(columns):
    A = aslinearoperator(torch.diag(torch.linspace(0.1, 1, 10)).double())
    b = vectors(10, columns, torch.float64)
    self_adjoint = DiagonalLinearOperator(torch.linspace(0.1, 1, 10, dtype=torch.float64))
    for matrix in (A, self_adjoint):
        with pytest.raises(np.linalg.LinAlgError, match=r"diverges.*neumann_scale"):
            NeumannInverseLinearOperator(matrix, 60, scale=2.2) @ b
        with pytest.raises(np.linalg.LinAlgError, match="damping"):
            NeumannInverseLinearOperator(-1 * matrix, 60, scale=1.0) @ b
    with pytest.raises(np.linalg.LinAlgError, match="diverges"):
        NeumannInverseLinearOperator(A, 5000, scale=1e9) @ b


def test_neumann_scales():
    A = positive(80, 1e3)
    largest = torch.linalg.eigvalsh(A)[-1].item()
    assert 0.9 / largest <= neumann_scale(A) <= 1.0001 / largest
    P = JacobiPreconditioner(A)
    largest = torch.linalg.eigvals(P.to_dense() @ A).real.max().item()
    assert 0.85 / largest <= neumann_scale(A, preconditioner=P) <= 1.0001 / largest
    shifted = neumann_scale(A, damping=2.0)
    assert shifted == pytest.approx(1 / 3, rel=0.05)
    with pytest.raises(np.linalg.LinAlgError, match="not positive definite"):
        neumann_scale(indefinite(30, 10.0))
    with pytest.raises(ValueError, match="between 0 and 2 / lambda_max"):
        NeumannInverseLinearOperator(A, scale=0.0)
    assert NeumannInverseLinearOperator(A).scale == neumann_scale(A)


# ------------------------------------------------------------------ changes and copies


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


def test_direct_inverses_factorize_once():
    class Counted(DiagonalLinearOperator):
        def _apply(self, x):
            counts.append(x.shape[1])
            return super()._apply(x)

    counts: list[int] = []
    A = Counted(torch.linspace(1, 2, 8, dtype=torch.float64))
    for kind in (CholeskyInverseLinearOperator, EighInverseLinearOperator):
        counts.clear()
        inverse = kind(A)
        for _ in range(4):
            inverse @ torch.ones(8)
        assert sum(counts) == 8 + 4
    inverse.with_damping(1.0) @ torch.ones(8)
    assert sum(counts) == 8 + 4 + 1  # the eigenvalues are shared


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


# ------------------------------------------------------------------- SciPy's own solvers


def test_shift_invert_of_a_hessian():
    """Eigenvalues next to a shift, without a dense matrix."""
    H = HessianLinearOperator(*classification().arguments)
    dense = np.linalg.eigvalsh(H.to_dense().numpy())
    for sigma in (0.03, -0.02):
        inverse = MINRESInverseLinearOperator(H, damping=-sigma, rtol=1e-12)
        values = spla.eigsh(H, k=4, sigma=sigma, OPinv=inverse, return_eigenvectors=False)
        nearest = dense[np.argsort(abs(dense - sigma))[:4]]
        np.testing.assert_allclose(np.sort(values), np.sort(nearest), rtol=1e-8, atol=1e-12)


def test_smallest_eigenvalues():
    A = positive(80, 1e3)
    inverse = CGInverseLinearOperator(A, rtol=1e-12)
    values = spla.eigsh(aslinearoperator(A), k=5, sigma=0, OPinv=inverse)[0]
    expected = np.linalg.eigvalsh(A.numpy())[:5]
    np.testing.assert_allclose(np.sort(values), expected, rtol=1e-9)


def test_inverses_inside_scipys_solvers():
    A = positive(40, 1e3)
    b = vectors(40, None, torch.float64).numpy()
    inverse = CholeskyInverseLinearOperator(A, damping=0.01)
    for solver in (spla.cg, spla.minres, spla.gmres, spla.bicgstab):
        x, info = solver(A.numpy(), b, M=inverse, **relative(solver, 1e-9))
        assert info == 0
        np.testing.assert_allclose(A.numpy() @ x, b, atol=1e-4)
    values, _ = spla.lobpcg(
        aslinearoperator(A),
        np.eye(40)[:, :4],
        M=inverse,
        largest=False,
        tol=1e-8,
        maxiter=200,
    )
    np.testing.assert_allclose(
        np.sort(values), np.linalg.eigvalsh(A.numpy())[:4], rtol=1e-6
    )
    generalized = spla.eigsh(
        np.eye(40), k=3, M=aslinearoperator(A), Minv=CGInverseLinearOperator(A, rtol=1e-13),
        return_eigenvectors=False,
    )  # fmt: skip
    expected = 1 / np.linalg.eigvalsh(A.numpy())[:3]
    np.testing.assert_allclose(np.sort(generalized), np.sort(expected), rtol=1e-8)


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


# ------------------------------------------- what a second reader and a fuzzer have found


@pytest.mark.parametrize("solver", KRYLOV)
@pytest.mark.parametrize("case", ["preconditioned", "started", "alternating"])
def test_no_column_is_called_converged_that_is_not(solver, case):
    """In float32, where the recurrences go on to shrink."""
    for seed in range(8):
        b = vectors(60, None, torch.float32, seed)
        options = {"rtol": 1e-5, "on_failure": "ignore"}
        if case == "preconditioned":
            A, b = (
                1e3 * positive(200, 1e6, torch.float32),
                vectors(200, None, b.dtype, seed),
            )
            options |= {"M": NystromPreconditioner(A, 0.1), "damping": 0.1}
        elif case == "started":
            A = positive(60, 10.0, torch.float32)
            b, options["x0"] = 1e-6 * b, vectors(60, None, torch.float32, seed + 9)
        else:
            A = (positive if solver == "CG" else indefinite)(30, 1e3, torch.float32)
            b = vectors(30, None, torch.float32, seed)
        inverse = KRYLOV[solver](A, maxiter=600, **options)
        x = inverse @ b
        # the residual as the operator's own products have it, rounding errors included
        own = (b - torch.add(A @ x, x, alpha=options.get("damping", 0.0))).norm().item()
        report = inverse.last_solve
        tolerance = report.tolerances[0]
        assert report.residual_norms[0] == pytest.approx(own, rel=0.05, abs=0.5 * tolerance)
        assert own <= 1.5 * tolerance or not report.converged[0]


def test_a_right_hand_side_in_the_null_space_is_no_negative_curvature():
    for seed in range(5):
        A = with_spectrum(
            torch.cat([torch.zeros(20), torch.logspace(-3, 0, 20)]), torch.float64, seed
        )
        null = torch.linalg.eigh(A)[1][:, :3]
        for b in (null, null[:, 0]):
            CGInverseLinearOperator(A, on_failure="ignore") @ b
            multishift_cg(A, b, [0.0, 1e-20], on_failure="ignore")


def test_a_singular_preconditioner_is_named():
    M = torch.diag(torch.tensor([0.0, 1.0]))
    inverse = MINRESInverseLinearOperator(torch.eye(2), M=M)
    with pytest.warns(ConvergenceWarning, match="M is singular"):
        inverse @ torch.tensor([1.0, 0.0])
    with pytest.warns(ConvergenceWarning, match="M is singular"):
        CGInverseLinearOperator(torch.eye(2), M=M) @ torch.tensor([1.0, 0.0])


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


def test_zero_columns_with_a_start_are_zero():
    A = positive(10, 5.0)
    B = vectors(10, 2, torch.float64)
    B[:, 0] = 0
    X = CGInverseLinearOperator(A, x0=torch.ones(10)) @ B
    assert not X[:, 0].any()


def test_a_tolerance_of_zero_ends():
    for columns in (None, 3):
        b = vectors(20, columns, torch.float32)
        for kind in KRYLOV.values():
            inverse = kind(positive(20, 10.0, torch.float32), rtol=0, on_failure="ignore")
            x = inverse @ b
            assert (residuals(positive(20, 10.0, torch.float32), x, b) < 1e-5).all()


def test_a_change_of_small_entries_is_noticed():
    for kind in (CholeskyInverseLinearOperator, EighInverseLinearOperator):
        M = torch.diag(torch.tensor([1e4, 1.0]))
        inverse = kind(M)
        inverse @ torch.ones(2)
        M[1, 1] = 2.0
        torch.testing.assert_close(inverse @ torch.ones(2), torch.tensor([1e-4, 0.5]))


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


def test_with_a_damping_below_that_of_the_preconditioner():
    A = positive(20, 10.0)
    inverse = MINRESInverseLinearOperator(A, M=JacobiPreconditioner(A, damping=0.1))
    shifted = inverse.with_damping(-0.45)
    assert shifted.M is inverse.M
    b = vectors(20, None, torch.float64)
    torch.testing.assert_close(A @ (x := shifted @ b) - 0.45 * x, b, rtol=0, atol=1e-3)


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

"""Residuals of what solvers return."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse.linalg as spla
import torch
from torchlinop import (
    HessianLinearOperator,
    JacobianLinearOperator,
    aslinearoperator,
    verify,
)

from tests.problems import classification, regression
from tests.solve.matrices import relative


@pytest.fixture
def H():
    return HessianLinearOperator(*classification().arguments)


def test_eigenpairs(H):
    values, vectors = spla.eigsh(H, k=4)
    report = verify.eigenpairs(H, values, vectors)
    assert report
    assert report.ok
    dense = H.to_dense().numpy()
    residuals = np.linalg.norm(dense @ vectors - vectors * values, axis=0)
    np.testing.assert_allclose(report.residual_norms, residuals, atol=1e-15)
    assert report.orthogonality < 1e-12
    assert str(report).startswith("eigenpairs: 4 of 4 within")
    assert len(str(report).splitlines()) == 6


def test_a_wrong_eigenpair_is_pointed_at(H):
    values, vectors = spla.eigsh(H, k=4)
    off = values.copy()
    off[2] += 1e-3
    report = verify.eigenpairs(H, off, vectors)
    assert not report
    assert list(report.accepted) == [True, True, False, True]
    assert report.residual_norms[2] == pytest.approx(1e-3)
    assert "not converged" in str(report).splitlines()[3]
    # the length of the vectors does not matter
    report = verify.eigenpairs(H, values, 1e3 * vectors)
    assert report
    # the same vector twice is no second eigenpair
    twice = verify.eigenpairs(H, values[[0, 0]], vectors[:, [0, 0]])
    assert twice.accepted.all()
    assert not twice
    # nor does a vector of zeros or of NaN solve anything
    assert not verify.eigenpairs(H, values[:1], 0 * vectors[:, :1])
    assert not verify.eigenpairs(H, values[:1], np.nan * vectors[:, :1])


def test_a_solver_that_stopped_early(H):
    with pytest.warns(UserWarning, match="Exited"):
        early = spla.lobpcg(H, np.eye(27)[:, :3], maxiter=1, tol=1e-12)
    assert not verify.eigenpairs(H, *early)


def test_generalized_eigenpairs(H):
    rng = np.random.default_rng(0)
    factor = rng.standard_normal((27, 27))
    M = factor @ factor.T + np.eye(27)
    import scipy.linalg

    values, vectors = scipy.linalg.eigh(H.to_dense().numpy(), M)
    report = verify.eigenpairs(H, values, vectors, M=M)
    assert report, report
    assert not verify.eigenpairs(H, values, vectors)


def test_complex_eigenpairs():
    A = aslinearoperator(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
    values, vectors = np.linalg.eig(A.to_dense().numpy().astype(float))
    report = verify.eigenpairs(A, values, vectors)
    assert report
    assert "1j" in str(report)


def test_singular_triplets():
    p = regression()
    J = JacobianLinearOperator(p.model, p.params, p.data)
    U, s, Vh = spla.svds(J, k=3)
    report = verify.singular_triplets(J, U, s, Vh)
    assert report, report
    assert not verify.singular_triplets(J, -U, s, Vh)
    assert not verify.singular_triplets(J, U, s * 1.01, Vh)
    # A v = sigma u holds for any v, if u and sigma are made of it
    v = np.ones((1, 26)) / 26**0.5
    image = J @ v.T
    sigma = np.linalg.norm(image)
    assert not verify.singular_triplets(J, image / sigma, np.array([sigma]), v)
    with pytest.raises(ValueError, match="as many columns of U as rows of Vh"):
        verify.singular_triplets(J, U[:, :2], s, Vh)


def test_solutions(H):
    b = np.linspace(-1, 1, 27)
    x, _ = spla.minres(H + 0.3 * np.eye(27), b, **relative(spla.minres, 1e-12))
    assert verify.solution(H, x, b, damping=0.3, rtol=1e-8)
    report = verify.solution(H, np.stack([x, x + 0.1], 1), np.stack([b, b], 1), damping=0.3)
    assert list(report.accepted) == [True, False]
    torch_report = verify.solution(H, torch.from_numpy(x), torch.from_numpy(b), damping=0.3)
    assert torch_report.residual_norms[0] == pytest.approx(report.residual_norms[0])
    assert verify.solution(H, np.zeros(27), np.zeros(27))
    assert not verify.solution(H, np.full(27, np.nan), b)


def test_bad_shapes(H):
    with pytest.raises(ValueError, match="27 rows"):
        verify.eigenpairs(H, np.ones(2), np.ones((26, 2)))
    with pytest.raises(ValueError, match="one eigenvalue for each of 2"):
        verify.eigenpairs(H, np.ones(3), np.ones((27, 2)))
    with pytest.raises(ValueError, match="x has 1 columns, b 2"):
        verify.solution(H, np.ones(27), np.ones((27, 2)))
    with pytest.raises(ValueError, match="damping needs a square matrix, got 3 x 2"):
        verify.solution(np.ones((3, 2)), np.ones(2), np.ones(3), damping=1.0)

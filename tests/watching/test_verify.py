"""What verify says of operators, and of lists of eigenpairs with gaps."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import scipy.sparse.linalg as spla
import torch
from torchlinop import (
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    TorchLinearOperator,
    verify,
)

from tests.problems import classification, regression
from tests.watching.matrices import Symmetric, dense_operator, with_spectrum


class Noisy(Symmetric):
    """A matrix that is another one in each product."""

    def __init__(self, dense, size):
        super().__init__(dense)
        self.size = size
        self.generator = torch.Generator().manual_seed(0)

    def _apply(self, x):
        y = super()._apply(x)
        noise = torch.randn(y.shape, generator=self.generator, dtype=y.dtype)
        return y + self.size * y.norm() / len(y) ** 0.5 * noise


# --------------------------------------------------------------------------- properties


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(3))
def test_what_is_true_of_curvature_matrices(dtype, seed):
    p, q = classification(dtype=dtype), regression(dtype=dtype)
    H, G = HessianLinearOperator(*p.arguments), GGNLinearOperator(*p.arguments)
    J = JacobianLinearOperator(q.model, q.params, q.data)
    for A in (H, G, H + G):
        assert verify.symmetric(A, seed=seed)
        assert verify.deterministic(A, seed=seed)
    for A in (J, J.T, J @ J.T, J.T @ J, G):
        assert verify.adjoint(A, seed=seed)
    assert verify.positive_semidefinite(G, seed=seed)
    lowest = torch.linalg.eigvalsh(H.to_dense().double())[0].item()
    found = verify.positive_semidefinite(H, seed=seed)
    assert not found
    assert found.lowest == pytest.approx(lowest, rel=1e-3)
    assert abs(found.lowest - lowest) <= found.bound + 1e-7


def test_complex_matrices():
    rng = np.random.default_rng(0)
    Z = rng.standard_normal((20, 20)) + 1j * rng.standard_normal((20, 20))
    assert verify.adjoint(dense_operator(Z))
    assert not verify.symmetric(dense_operator(Z + Z.T))
    result = verify.symmetric(dense_operator(Z + Z.conj().T))
    assert result
    assert str(result).startswith("Hermitian: 3 of 3 within")
    assert verify.positive_semidefinite(dense_operator(Z @ Z.conj().T))


@pytest.mark.parametrize("off", [1e-2, 1e-6])
def test_a_matrix_that_is_not_symmetric(off):
    A, _ = with_spectrum(np.linspace(1, 2, 200))
    B = A.dense.clone()
    B[3, 5:50] += off * 10
    assert verify.symmetric(A)
    result = verify.symmetric(B)
    assert not result
    assert "not symmetric" in str(result)
    assert verify.adjoint(B)


def test_a_wrong_adjoint():
    A = np.random.default_rng(0).standard_normal((30, 40))
    B = A.copy()
    B[4, 7] += 1e-4
    wrong = spla.LinearOperator(A.shape, matvec=A.dot, rmatvec=B.T.dot, dtype=float)
    assert not verify.adjoint(wrong)
    with pytest.raises(verify.VerificationError, match="not the adjoint") as caught:
        verify.adjoint(wrong).raise_if_bad()
    assert not caught.value.result
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    right = spla.LinearOperator(A.shape, matvec=A.dot, rmatvec=A.T.dot, dtype=float)
    result = verify.adjoint(right)
    assert result.raise_if_bad() is result


def test_a_random_matrix():
    A, _ = with_spectrum(np.linspace(1, 2, 50))
    result = verify.deterministic(Noisy(A.dense, 1e-6))
    assert not result
    assert "another product" in str(result)
    assert result.relative_residuals.mean() == pytest.approx(2**0.5 * 1e-6, rel=0.2)
    assert verify.deterministic(Noisy(A.dense, 1e-13))
    assert verify.deterministic(Noisy(A.dense, 1e-6), rtol=1e-5)
    assert not verify.symmetric(Noisy(A.dense, 1e-6))


def test_a_matrix_that_changes_after_some_products():
    class Changing(Symmetric):
        count = 0

        def _apply(self, x):
            self.count += 1
            return super()._apply(x) * (1 if self.count < 4 else 1 + 1e-6)

    A, _ = with_spectrum(np.linspace(1, 2, 50))
    result = verify.deterministic(Changing(A.dense))
    assert list(result.accepted) == [True, True, False, False, False, False]


def test_negative_curvature_is_shown():
    A, V = with_spectrum(np.r_[-1e-3, np.linspace(0.1, 10, 299)])
    result = verify.positive_semidefinite(A)
    assert not result
    assert result.lowest == pytest.approx(-1e-3, rel=1e-6)
    v = result.direction
    assert torch.linalg.vector_norm(v).item() == pytest.approx(1)
    assert (v @ (A.dense @ v)).item() == pytest.approx(result.lowest)
    assert abs(v.numpy() @ V[:, 0]) == pytest.approx(1, abs=1e-3)
    assert "not positive semidefinite" in str(result)
    with pytest.raises(verify.VerificationError, match="not positive semidefinite"):
        result.raise_if_bad()
    assert verify.positive_semidefinite(A, rtol=1e-3)
    singular, _ = with_spectrum(np.r_[np.zeros(100), np.linspace(0.1, 10, 200)])
    assert verify.positive_semidefinite(singular)
    assert str(verify.positive_semidefinite(singular)).startswith("no negative curvature")
    assert verify.positive_semidefinite(torch.zeros(4, 4))
    assert not verify.positive_semidefinite(-torch.eye(1))


# -------------------------------------------------------------------------- completeness

#: a cluster (relative width 1e-7), a repeated eigenvalue, and a bulk
SPECTRUM = np.sort(
    np.r_[5, 5 - 5e-7, 5 - 1e-6, 4, 4, 3.5, np.linspace(-2, 2, 200) ** 3 / 8]
)


@pytest.fixture(scope="module")
def clustered():
    return with_spectrum(SPECTRUM)


@pytest.mark.parametrize("seed", range(10))
def test_a_complete_list(clustered, seed):
    A, V = clustered
    for k in (1, 4, 6, 7):  # 4 is one of two that are equal
        result = verify.complete(A, SPECTRUM[-k:], V[:, -k:], seed=seed)
        assert result, result
        assert result.num_found == k
        assert float(result.num_missed) == 0
    assert verify.complete(A, SPECTRUM[:3], V[:, :3], which="SA", seed=seed)
    assert verify.complete(A, SPECTRUM[-6:], V[:, -6:], which="LM", seed=seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_list_of_all_there_is(dtype):
    """What is left is zero but for rounding errors."""
    A, V = with_spectrum(SPECTRUM[-40:], dtype)
    for which in ("LA", "SA", "LM"):
        result = verify.complete(A, SPECTRUM[-40:], V, which=which)
        assert result, result
        assert result.num_found == 40


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("missing", range(6))
def test_a_missing_member(clustered, missing, seed):
    A, V = clustered
    kept = np.delete(np.arange(len(SPECTRUM))[-8:], 7 - missing)
    result = verify.complete(A, SPECTRUM[kept], V[:, kept], seed=seed)
    assert not result
    assert result.num_found == 7
    assert len(result.missed) >= 8  # of ten random vectors
    assert result.missed.max() == pytest.approx(SPECTRUM[-1 - missing], rel=1e-6)
    error = abs(float(result.num_missed) - 1)
    assert error < 4 * result.num_missed.stderr
    assert "incomplete: 7 eigenvalues above" in str(result)
    with pytest.raises(verify.VerificationError, match="others are there"):
        result.raise_if_bad()


def test_how_many_are_missing_is_unbiased(clustered):
    A, V = clustered
    estimates = [
        verify.complete(A, SPECTRUM[[-1]], V[:, [-1]], threshold=3.0, seed=seed).num_missed
        for seed in range(30)
    ]
    values = np.array([float(e) for e in estimates])
    # z-test: false alarms in 1 of 15,000
    assert abs(values.mean() - 5) < 4 * values.std() / 30**0.5
    errors = np.array([e.stderr for e in estimates])
    assert 0.6 < errors.mean() / values.std() < 1.6


def test_the_other_end_and_both(clustered):
    A, V = clustered
    assert not verify.complete(A, SPECTRUM[1:4], V[:, 1:4], which="SA")
    assert not verify.complete(A, SPECTRUM[-6:], V[:, -6:], which="LM", threshold=0.9)
    low = verify.complete(A, SPECTRUM[:1], V[:, :1], which="SA", threshold=-0.9)
    assert low.side == "below"
    assert low.threshold == -0.9
    assert low.missed[0] == pytest.approx(SPECTRUM[1], abs=1e-3)
    # a threshold below zero: what was projected off is no eigenvalue there
    above = int((SPECTRUM > -0.5).sum())
    full = verify.complete(A, SPECTRUM[-above:], V[:, -above:])
    assert full.num_found == above
    assert full
    assert verify.complete(A, SPECTRUM[:-6], V[:, :-6], which="SA")


def test_pairs_that_are_not_exact(clustered):
    A, V = clustered
    noise = np.random.default_rng(0).standard_normal((len(SPECTRUM), 6))
    rough = V[:, -6:] + 1e-5 * noise
    assert verify.complete(A, SPECTRUM[-6:], rough)
    rougher = V[:, -4:] + 1e-3 * noise[:, :4]  # what is left of 5 is above 4
    assert verify.complete(A, SPECTRUM[-4:], rougher)
    assert not verify.complete(A, SPECTRUM[[-6, -5, -3, -2]], rough[:, [0, 1, 3, 4]])


def test_operators_of_float32():
    p = classification(dtype=torch.float32)
    H = HessianLinearOperator(*p.arguments)
    values, vectors = torch.linalg.eigh(H.to_dense())
    assert verify.complete(H, values[-4:], vectors[:, -4:])
    assert not verify.complete(H, values[[-4, -3, -1]], vectors[:, [-4, -3, -1]])


def test_the_operator_may_be_anything(clustered):
    dense = clustered[0].dense
    assert not isinstance(dense, TorchLinearOperator)
    values, vectors = spla.eigsh(spla.aslinearoperator(dense.numpy()), k=6, which="LA")
    assert verify.complete(dense.numpy(), values, vectors)


# ------------------------------------------------------------------------------ bad input


def test_bad_input(clustered):
    A, V = clustered
    rectangular = dense_operator(np.ones((3, 4)))
    for check in (verify.symmetric, verify.positive_semidefinite):
        with pytest.raises(ValueError, match="is for square matrices, got 3 x 4"):
            check(rectangular)
    with pytest.raises(ValueError, match="is for square matrices"):
        verify.complete(rectangular, [1.0], np.ones((4, 1)))
    with pytest.raises(ValueError, match="num_probes has to be an integer"):
        verify.adjoint(A, num_probes=0)
    with pytest.raises(ValueError, match="num_products has to be an integer"):
        verify.deterministic(A, num_products=1.5)
    with pytest.raises(ValueError, match="rtol has to be at least 0"):
        verify.symmetric(A, rtol=-1.0)
    with pytest.raises(ValueError, match="not symmetric"):
        verify.positive_semidefinite(np.triu(np.ones((9, 9))))
    with pytest.raises(ValueError, match="which has to be one of LA, SA, LM"):
        verify.complete(A, SPECTRUM[-1:], V[:, -1:], which="BE")
    with pytest.raises(ValueError, match="one eigenvalue for each of 2"):
        verify.complete(A, SPECTRUM[-1:], V[:, -2:])
    with pytest.raises(ValueError, match="at least one"):
        verify.complete(A, [], V[:, :0])
    with pytest.raises(ValueError, match="have to be finite"):
        verify.complete(A, [np.nan], V[:, -1:])
    with pytest.raises(ValueError, match="with which='LM' a size"):
        verify.complete(A, SPECTRUM[-1:], V[:, -1:], which="LM", threshold=-1.0)
    nan = dense_operator(np.full((3, 3), np.nan))
    assert not verify.symmetric(nan)
    assert not verify.deterministic(nan)
    with pytest.raises(np.linalg.LinAlgError, match="NaN or infinite"):
        verify.positive_semidefinite(nan)


def test_raise_if_bad_on_residuals(clustered):
    A, V = clustered
    good = verify.eigenpairs(A, SPECTRUM[-2:], V[:, -2:])
    assert good.raise_if_bad() is good
    with pytest.raises(verify.VerificationError, match="not converged"):
        verify.eigenpairs(A, SPECTRUM[-2:] + 0.1, V[:, -2:]).raise_if_bad()
    with pytest.raises(verify.VerificationError, match="solution: 0 of 1"):
        verify.solution(A, V[:, 0], V[:, 1]).raise_if_bad()

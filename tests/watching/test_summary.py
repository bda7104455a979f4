"""The summary of a spectrum against the spectrum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchlinop
from torchlinop import GGNLinearOperator, HessianLinearOperator

from tests.problems import classification
from tests.watching.matrices import dense_operator, with_spectrum

#: nine outliers above a bulk with a negative part
SPECTRUM = np.sort(np.r_[np.linspace(10, 20, 9), np.linspace(-1, 1, 291) ** 3])


@pytest.fixture(scope="module")
def found():
    return torchlinop.summary(with_spectrum(SPECTRUM)[0], num_matvecs=290)


def test_ends(found):
    values = found.top.eigenvalues.numpy()
    assert len(values) == 20
    assert (np.abs(values - SPECTRUM[-20:]) <= found.top.residual_bounds).all()
    low = found.bottom.eigenvalues.numpy()
    assert (np.abs(low - SPECTRUM[:3]) <= found.bottom.residual_bounds).all()
    assert found.num_outliers == 9
    assert found.largest == pytest.approx(20)


def test_integrals_within_their_errors():
    A, _ = with_spectrum(SPECTRUM)
    sizes = np.abs(SPECTRUM)
    truth = {
        "trace": SPECTRUM.sum(),
        "effective_rank": sizes.sum() / 20,
        "negative_share": -SPECTRUM[SPECTRUM < 0].sum() / sizes.sum(),
    }
    runs = [torchlinop.summary(A, num_matvecs=290, seed=seed) for seed in range(12)]
    for name, value in truth.items():
        estimates = [getattr(run, name) for run in runs]
        values = np.array([float(e) for e in estimates])
        errors = np.array([e.stderr for e in estimates])
        # Student's t with 11 degrees of freedom: false alarms in 1 of 500
        assert abs(values.mean() - value) < 4.02 * values.std() / 12**0.5, name
        assert 0.5 < errors.mean() / values.std() < 2, name
        assert (np.abs(values - value) < 5 * errors).all(), name
    # the outliers are known, so only the bulk is random: Hutchinson's estimate has 25
    assert np.std([float(run.trace) for run in runs]) < 5


def test_products_and_weights(found):
    assert found.num_matvecs <= 290 + 60
    np.testing.assert_allclose(found.density.weights.sum(axis=1).mean(), 1, rtol=0.05)
    assert (np.diff(found.density.nodes, axis=1) >= 0).all()
    assert (found.density.weights >= 0).all()
    assert found.density.count_above(5.0).value == pytest.approx(9)


def test_paragraph(found):
    text = str(found)
    lines = text.splitlines()
    assert lines[0].startswith("<300x300 Symmetric of float64 on cpu>: ")
    assert len(lines) == 8
    assert "outliers            9: number 9 is 10 times the next" in text
    assert "indefinite with damping 0.02; needs 1" in text


def test_condition():
    A, _ = with_spectrum(np.linspace(1, 2, 100))
    run = torchlinop.summary(A, damping=0.5, num_matvecs=300)
    assert run.condition == pytest.approx(2.5 / 1.5, rel=1e-3)
    assert "1.67 with damping 0.5" in str(run)
    assert run.num_outliers == 0
    assert "no gap among the 20 largest" in str(run)
    assert float(run.negative_share) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [HessianLinearOperator, GGNLinearOperator])
def test_small_models(kind, dtype):
    A = kind(*classification(dtype=dtype).arguments)
    values = torch.linalg.eigvalsh(A.to_dense().double()).numpy()
    run = torchlinop.summary(A)
    rtol = 1e-4 if dtype == torch.float32 else 1e-6
    np.testing.assert_allclose(run.top.eigenvalues, values[-20:], atol=rtol * values[-1])
    rounding = 1e2 * torch.finfo(dtype).eps * values[-1]
    assert abs(float(run.trace) - values.sum()) < 5 * run.trace.stderr + rounding
    assert run.trace.stderr < 0.1 * np.abs(values).sum()


def test_hermitian_and_tiny_matrices():
    Z = np.random.default_rng(0).standard_normal((2, 210, 210))
    U, _ = np.linalg.qr(Z[0] + 1j * Z[1])
    values = np.arange(210.0) ** 3
    A = dense_operator(U * values @ U.conj().T)
    run = torchlinop.summary(A, k=5, num_matvecs=200)
    assert run.top.eigenvalues.numpy() == pytest.approx(values[-5:])
    assert abs(float(run.trace) - values.sum()) < 6 * run.trace.stderr
    exact = torchlinop.summary(A)
    assert exact.top.eigenvalues.numpy() == pytest.approx(values[-20:])
    assert (exact.trace.value, exact.trace.stderr) == (pytest.approx(values.sum()), 0)
    one = torchlinop.summary(torch.tensor([[2.0]]))
    assert float(one.trace) == pytest.approx(2)
    assert str(torchlinop.summary(torch.zeros(3, 3)))


def test_small_matrices_exactly():
    A, _ = with_spectrum(SPECTRUM)
    run = torchlinop.summary(A, k=300)
    assert run.num_matvecs == 300
    assert (run.trace.value, run.trace.stderr) == (pytest.approx(SPECTRUM.sum()), 0)
    sizes = np.abs(SPECTRUM)
    assert run.negative_share.value == pytest.approx(-SPECTRUM[:145].sum() / sizes.sum())
    assert run.effective_rank.value == pytest.approx(sizes.sum() / 20)
    V, values = run.top.eigenvectors, run.top.eigenvalues
    defect = torch.linalg.vector_norm(A.dense @ V - V * values, dim=0)
    assert (defect.numpy() <= run.top.residual_bounds).all()
    three = torchlinop.summary(torch.eye(3))
    assert (three.trace.value, three.trace.stderr) == (3, 0)
    assert three.effective_rank.value == 3


def test_singular_matrices():
    singular, _ = with_spectrum(np.arange(30.0))
    text = str(torchlinop.summary(singular, damping=0.0))
    assert "condition           singular with damping 0" in text
    assert "singular" in str(torchlinop.summary(torch.zeros(3, 3)))
    assert "singular" not in str(torchlinop.summary(singular))
    assert "singular" not in str(torchlinop.summary(torch.eye(3), damping=0.0))


def test_bad_input():
    A, _ = with_spectrum(np.linspace(1, 2, 10))
    with pytest.raises(ValueError, match="summary is for square matrices, got 3 x 4"):
        torchlinop.summary(np.ones((3, 4)))
    with pytest.raises(ValueError, match="num_matvecs has to be at least 200"):
        torchlinop.summary(A, num_matvecs=10)
    with pytest.raises(ValueError, match="max_seconds has to be positive"):
        torchlinop.summary(A, max_seconds=0)
    with pytest.raises(ValueError, match="damping has to be a finite number >= 0"):
        torchlinop.summary(A, damping=-1)
    with pytest.raises(ValueError, match="k has to be an integer"):
        torchlinop.summary(A, k=0)
    with pytest.raises(ValueError, match="not symmetric"):
        torchlinop.summary(np.triu(np.ones((30, 30))))
    with pytest.raises(np.linalg.LinAlgError, match="NaN or infinite"):
        torchlinop.summary(np.full((3, 3), np.nan))

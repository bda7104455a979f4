"""A trained classifier of digits (1,210 parameters): watched, verified, summed up."""

from __future__ import annotations

import numpy as np
import torchlinop
from scipy.sparse.linalg import eigsh
from torchlinop import monitor, verify

from tests.solve.test_digits import digits, spectrum

__all__ = ["digits", "spectrum"]

V0 = np.random.default_rng(0).standard_normal(1210)


def test_a_stopped_eigsh_is_within_its_bounds(digits, spectrum):
    H = digits.H
    with monitor(H, max_products=45) as log:
        eigsh(H, k=10, which="LA", v0=V0, tol=1e-14)
    assert (log.stopped, log.num_products) == ("max_products", 45)
    values, vectors = pairs = log.eigenpairs(10, which="LA")
    distance = np.abs(values.numpy()[:, None] - spectrum).min(axis=1)
    assert (distance <= pairs.residual_bounds + 1e-14).all()
    assert pairs.residual_bounds.max() > 1e-12  # it was stopped before the end
    np.testing.assert_allclose(values[-5:], spectrum[-5:], rtol=1e-4)
    residuals = verify.eigenpairs(H, values, vectors).residual_norms
    np.testing.assert_allclose(pairs.residual_bounds, residuals, rtol=1e-3, atol=1e-13)


def test_what_eigsh_finds_is_complete(digits):
    H, G = digits.H, digits.G
    values, vectors = eigsh(H, k=9, which="LA", v0=V0)
    assert verify.complete(H, values, vectors)
    found = verify.complete(H, np.delete(values, 4), np.delete(vectors, 4, axis=1))
    assert not found
    assert abs(float(found.num_missed) - 1) < 4 * found.num_missed.stderr
    assert abs(found.missed.max() - values[4]) < 1e-6 * values[-1]
    assert verify.symmetric(H)
    assert verify.positive_semidefinite(G)
    assert not verify.positive_semidefinite(H)


def test_summary(digits, spectrum):
    found = torchlinop.summary(digits.H, num_matvecs=800)
    np.testing.assert_allclose(found.top.eigenvalues[-10:], spectrum[-10:], rtol=1e-6)
    sizes = np.abs(spectrum)
    negative = -spectrum[spectrum < 0].sum() / sizes.sum()
    for estimate, value in (
        (found.trace, spectrum.sum()),
        (found.effective_rank, sizes.sum() / sizes.max()),
        (found.negative_share, negative),
    ):
        assert abs(float(estimate) - value) < 4 * estimate.stderr
        assert estimate.stderr < 0.1 * value

"""Estimates are unbiased, and their standard errors are what they say.

Seeds are fixed, so nothing here is random; but they were not chosen. Each z-test is against
4.5 standard errors, which a right program exceeds by chance once in 150,000; there are
about 65 of them, so that a false alarm had a chance of 1 in 2,300.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torchlinop import aslinearoperator, estimate
from torchlinop.estimate import traces
from torchlinop.estimate.probes import ProbeSource

from tests.estimate.matrices import decaying, with_spectrum

SEEDS = 120
Z = 4.5

SPECTRUM = torch.linspace(-0.4, 1, 24, dtype=torch.float64)
SYMMETRIC = with_spectrum(SPECTRUM)
GENERAL = torch.randn(24, 24, generator=torch.Generator().manual_seed(3)).double()
COMPLEX = with_spectrum(SPECTRUM, torch.complex128)
POSITIVE = decaying(24)
WIDE = GENERAL[:15]

#: matrix, method, products
TRACES = [
    ("general", "hutchinson", 6),
    ("complex", "hutchinson", 6),
    ("general", "hutch++", 10),
    ("complex", "hutch++", 4),
    ("general", "xtrace", 10),
    ("complex", "xtrace", 4),
    ("positive", "xnystrace", 2),
    ("positive", "xnystrace", 8),
]
MATRICES = {"general": GENERAL, "complex": COMPLEX, "positive": POSITIVE}
PROBES = ["rademacher", "gaussian", "sphere"]


def z_score(samples, truth):
    """Distance of the mean from the truth, in standard errors of the mean."""
    samples = np.asarray(samples)
    error = np.sqrt((np.abs(samples - samples.mean(0)) ** 2).sum(0) / (len(samples) - 1))
    return np.abs(samples.mean(0) - truth) / (error / math.sqrt(len(samples)))


@pytest.mark.parametrize("probes", PROBES)
@pytest.mark.parametrize(("name", "method", "products"), TRACES)
def test_trace(name, method, products, probes):
    A = MATRICES[name]
    options = {"method": method, "num_matvecs": products, "probes": probes}
    samples = [estimate.trace(A, seed=seed, **options).value for seed in range(SEEDS)]
    assert z_score(samples, A.diagonal().sum().item()) < Z
    assert np.std(samples) > 1e-3  # there is something to be wrong about


@pytest.mark.parametrize(
    ("method", "products", "probes"),
    [("hutchinson", 3, probes) for probes in PROBES]
    + [("xdiag", 8, "rademacher"), ("xdiag", 4, "gaussian")],
)
@pytest.mark.parametrize("name", ["general", "complex"])
def test_diagonal(name, method, products, probes):
    A = MATRICES[name]
    options = {"method": method, "num_matvecs": products, "probes": probes}
    samples = [
        estimate.diagonal(A, seed=seed, **options).value.numpy() for seed in range(SEEDS)
    ]
    scores = z_score(samples, A.diagonal().numpy())
    assert scores.shape == (24,)
    assert scores.max() < Z + 0.5  # of 24 entries


@pytest.mark.parametrize("probes", PROBES)
@pytest.mark.parametrize("A", [WIDE, WIDE.T], ids=["wide", "tall"])
def test_squared_frobenius_norm(A, probes):
    samples = [
        float(estimate.frobenius_norm(A, num_matvecs=3, probes=probes, seed=seed)) ** 2
        for seed in range(SEEDS)
    ]
    assert z_score(samples, A.square().sum().item()) < Z


@pytest.mark.parametrize("probes", PROBES)
def test_function_trace(probes):
    options = {"num_matvecs": 24, "num_steps": 8, "probes": probes}
    samples = [
        estimate.function_trace(SYMMETRIC, np.exp, seed=seed, **options).value
        for seed in range(SEEDS)
    ]
    assert z_score(samples, SPECTRUM.exp().sum().item()) < Z


TRACE = GENERAL.trace().item()
#: an estimate for a seed, and the truth
COVERED = {
    "hutchinson": (lambda s: estimate.trace(GENERAL, num_matvecs=20, seed=s), TRACE),
    "hutch++": (
        lambda s: estimate.trace(GENERAL, method="hutch++", num_matvecs=24, seed=s),
        TRACE,
    ),
    "xtrace": (
        lambda s: estimate.trace(GENERAL, method="xtrace", num_matvecs=24, seed=s),
        TRACE,
    ),
    "xtrace, decaying": (
        lambda s: estimate.trace(POSITIVE, method="xtrace", num_matvecs=20, seed=s),
        POSITIVE.trace().item(),
    ),
    "xnystrace": (
        lambda s: estimate.trace(POSITIVE, method="xnystrace", num_matvecs=12, seed=s),
        POSITIVE.trace().item(),
    ),
    "frobenius": (
        lambda s: estimate.frobenius_norm(GENERAL, num_matvecs=20, seed=s),
        GENERAL.square().sum().sqrt().item(),
    ),
    "function": (
        lambda s: estimate.function_trace(
            SYMMETRIC, np.exp, num_matvecs=200, num_steps=10, seed=s
        ),
        SPECTRUM.exp().sum().item(),
    ),
    "logdet": (
        lambda s: estimate.logdet(POSITIVE, damping=0.01, num_matvecs=200, seed=s),
        torch.linalg.slogdet(POSITIVE + 0.01 * torch.eye(24)).logabsdet.item(),
    ),
}


@pytest.mark.parametrize("case", COVERED)
def test_standard_errors_cover_the_truth(case):
    """Within two of them in 95 cases of 100, or a few less: they are estimates as well.

    Of 120 that is 114, with a standard deviation of 2.4. A program whose errors are half of
    what they should be covers 68 %, one whose errors are twice as large all.
    """
    estimator, truth = COVERED[case]
    found = [estimator(seed) for seed in range(SEEDS)]
    scores = np.array([abs(t.value - truth) / t.stderr for t in found])
    assert (scores < 2).mean() > 0.85
    assert scores.max() > 2


SLOW = with_spectrum(torch.arange(1, 61).double() ** -0.5)
FAST = with_spectrum(0.85 ** torch.arange(60).double())


@pytest.mark.parametrize("probes", PROBES)
@pytest.mark.parametrize("A", [SLOW, FAST], ids=["slow decay", "fast decay"])
@pytest.mark.parametrize("method", ["hutch++", "xtrace", "xnystrace", "xdiag"])
def test_variances_are_unbiased(method, A, probes):
    """Squared standard errors have the mean of the squared errors, by a z-test.

    Samples that are taken for independent give half of that, a jackknife twice as much.
    """
    if method == "xdiag":
        options = {"method": method, "num_matvecs": 24, "probes": probes}
        truth = A.diagonal()
        found = [estimate.diagonal(A, seed=seed, **options) for seed in range(240)]
        squares = [(t.value - truth).square().sum().item() for t in found]
        variances = [t.stderr.square().sum().item() for t in found]
    else:
        options = {"method": method, "num_matvecs": 24, "probes": probes}
        truth = A.trace().item()
        found = [estimate.trace(A, seed=seed, **options) for seed in range(400)]
        squares = [(t.value - truth) ** 2 for t in found]
        variances = [t.stderr**2 for t in found]
    assert z_score(np.subtract(variances, squares), 0) < Z


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("probes", PROBES)
@pytest.mark.parametrize("method", ["xtrace", "xnystrace"])
def test_samples_without_two_vectors(method, probes, dtype, monkeypatch):
    """The updates of small matrices against the definition, with a basis for each pair."""
    A = decaying(30).to(dtype)
    A = A + 1j * (A.roll(1, 0) - A.roll(1, 0).mH) / 99 if dtype.is_complex else A
    seen = []
    monkeypatch.setattr(traces, "dependent_mean", lambda *x: seen.append(x) or (0.0, 0.0))
    count = 5
    products = 2 * count if method == "xtrace" else count
    estimate.trace(A, method=method, probes=probes, num_matvecs=products, seed=3)
    samples, without = seen[0]
    omega = ProbeSource(aslinearoperator(A), probes, 3).rows(count).T

    def sample(i, j):
        others = omega[:, [k for k in range(count) if k not in (i, j)]]
        z, image = omega[:, i], A @ others
        if method == "xtrace":
            Q = torch.linalg.qr(image)[0]
            z = z - Q @ (Q.mH @ z)
            inside, rest = torch.trace(Q.mH @ A @ Q), A
        else:
            approximation = image @ torch.linalg.solve(others.mH @ image, image.mH)
            inside, rest = torch.trace(approximation), A - approximation
            Q = torch.linalg.qr(others)[0]
        size = torch.linalg.vector_norm(z - Q @ (Q.mH @ z)).square()
        scale = (30 - others.shape[1]) / size if probes == "sphere" else 1
        return inside + scale * torch.vdot(z, rest @ z)

    for i in range(count):
        assert abs(samples[i] - sample(i, i)) < 1e-12
        for j in set(range(count)) - {i}:
            assert abs(without[i, j] - sample(i, j)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("probes", PROBES)
def test_diagonals_without_two_vectors(probes, dtype):
    """The value and the variance of XDiag against the definition, basis by basis."""
    A = SLOW[:30, :30].to(dtype) + 0.3 * SYMMETRIC.roll(1, 0).repeat(2, 2)[:30, :30]
    A = A + 0.2j * A.roll(1, 0) if dtype.is_complex else A
    count, pairs = 6, list(itertools.permutations(range(6), 2))
    omega = ProbeSource(aslinearoperator(A), probes, 3).rows(count).T

    def sample(*without):
        z = omega[:, without[0]]
        Q = torch.linalg.qr(A @ omega[:, [k for k in range(count) if k not in without]])[0]
        image = A @ z
        return (Q @ (Q.mH @ A)).diagonal() + z.conj() * (image - Q @ (Q.mH @ image))

    samples = torch.stack([sample(i) for i in range(count)])
    mean = samples.mean(dim=0)
    variance = (samples - mean).abs().square().sum().item() / (count * (count - 1))
    change = {(i, j): samples[i] - sample(i, j) for i, j in pairs}
    products = [torch.vdot(change[i, j], change[j, i]).real.item() for i, j in pairs]
    found = estimate.diagonal(
        A, method="xdiag", probes=probes, num_matvecs=2 * count, seed=3
    )
    torch.testing.assert_close(found.value, mean, rtol=0, atol=1e-12)
    covariance = np.mean(products)
    assert abs(covariance) > 1e-3 * variance  # there is something to be wrong about
    squares = found.stderr.square().sum().item()
    assert squares == pytest.approx(variance + max(covariance, 0), rel=1e-10)

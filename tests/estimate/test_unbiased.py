"""Estimates are unbiased, and their standard errors are what they say.

Seeds are fixed, so nothing here is random; but the seeds were not chosen. Each z-test is
against 4.5 standard errors, which a right program exceeds by chance once in 150,000; there
are about 40 of them, so that a false alarm had a chance of 1 in 4,000.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchlinop import estimate

from tests.estimate.matrices import decaying, with_spectrum

SEEDS = 300
Z = 4.5

SPECTRUM = torch.linspace(-0.4, 1, 24, dtype=torch.float64)
SYMMETRIC = with_spectrum(SPECTRUM)
GENERAL = torch.randn(24, 24, generator=torch.Generator().manual_seed(3)).double()
COMPLEX = with_spectrum(SPECTRUM, torch.complex128)
POSITIVE = decaying(24)
WIDE = GENERAL[:15]

#: name, matrix, method, products
TRACES = [
    ("general", GENERAL, "hutchinson", 6),
    ("symmetric", SYMMETRIC, "hutchinson", 2),
    ("complex", COMPLEX, "hutchinson", 6),
    ("general", GENERAL, "hutch++", 10),
    ("symmetric", SYMMETRIC, "hutch++", 4),
    ("complex", COMPLEX, "hutch++", 12),
    ("general", GENERAL, "xtrace", 10),
    ("symmetric", SYMMETRIC, "xtrace", 4),
    ("complex", COMPLEX, "xtrace", 12),
    ("positive", POSITIVE, "xnystrace", 2),
    ("positive", POSITIVE, "xnystrace", 8),
]
PROBES = ["rademacher", "gaussian", "sphere"]


def z_score(samples, truth):
    """Distance of the mean from the truth, in standard errors of the mean."""
    samples = np.asarray(samples)
    error = np.sqrt((np.abs(samples - samples.mean(0)) ** 2).sum(0) / (len(samples) - 1))
    return np.abs(samples.mean(0) - truth) / (error / math.sqrt(len(samples)))


@pytest.mark.parametrize("probes", PROBES)
@pytest.mark.parametrize(("name", "A", "method", "products"), TRACES)
def test_trace(name, A, method, products, probes):
    samples = [
        estimate.trace(
            A, method=method, num_matvecs=products, probes=probes, seed=seed
        ).value
        for seed in range(SEEDS)
    ]
    assert z_score(samples, A.diagonal().sum().item()) < Z
    assert np.std(samples) > 1e-3  # there is something to be wrong about


@pytest.mark.parametrize("probes", PROBES)
@pytest.mark.parametrize(("method", "products"), [("hutchinson", 3), ("xdiag", 8)])
@pytest.mark.parametrize("A", [GENERAL, COMPLEX], ids=["general", "complex"])
def test_diagonal(A, method, products, probes):
    samples = [
        estimate.diagonal(
            A, method=method, num_matvecs=products, probes=probes, seed=seed
        ).value.numpy()
        for seed in range(SEEDS)
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
    truth = SPECTRUM.exp().sum().item()
    samples = [
        estimate.function_trace(
            SYMMETRIC, np.exp, num_matvecs=24, num_steps=8, probes=probes, seed=seed
        ).value
        for seed in range(SEEDS)
    ]
    assert z_score(samples, truth) < Z


COVERED = {
    "hutchinson": lambda seed: estimate.trace(GENERAL, num_matvecs=20, seed=seed),
    "hutch++": lambda seed: estimate.trace(
        GENERAL, method="hutch++", num_matvecs=24, seed=seed
    ),
    "xtrace": lambda seed: estimate.trace(
        GENERAL, method="xtrace", num_matvecs=24, probes="gaussian", seed=seed
    ),
    "frobenius": lambda seed: estimate.frobenius_norm(GENERAL, num_matvecs=20, seed=seed),
    "function": lambda seed: estimate.function_trace(
        SYMMETRIC, np.exp, num_matvecs=200, num_steps=10, seed=seed
    ),
}
TRUTHS = {
    "frobenius": GENERAL.square().sum().sqrt().item(),
    "function": SPECTRUM.exp().sum().item(),
}


@pytest.mark.parametrize("case", COVERED)
def test_standard_errors_cover_the_truth(case):
    """Within two of 95 %, a little less as the error is estimated from few samples."""
    truth = TRUTHS.get(case, GENERAL.trace().item())
    found = [COVERED[case](seed) for seed in range(SEEDS)]
    scores = np.array([abs(t.value - truth) / t.stderr for t in found])
    # 90 % of 300 is 4 standard deviations below the 95 % of a right program, and a program
    # whose error is half of what it should be covers 68 %
    assert (scores < 2).mean() > 0.88
    assert (scores < 2).mean() < 0.995

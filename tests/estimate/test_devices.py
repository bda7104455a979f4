"""Everything stays on the operator's device, whatever torch's default device is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchlinop import estimate

from tests.estimate.matrices import decaying

A = decaying(30)
CALLS = {
    **{
        method: lambda method=method: estimate.trace(A, method=method, num_matvecs=12)
        for method in ("hutchinson", "hutch++", "xtrace", "xnystrace")
    },
    "gaussian": lambda: estimate.trace(A, probes="gaussian", num_matvecs=4),
    "exact": lambda: estimate.trace(A, method="xtrace", rtol=1e-9),
    "diagonal": lambda: estimate.diagonal(A, num_matvecs=12),
    "xdiag": lambda: estimate.diagonal(A, method="xdiag", num_matvecs=12),
    "frobenius": lambda: estimate.frobenius_norm(A, num_matvecs=12),
    "function": lambda: estimate.function_trace(A, np.exp, num_matvecs=40),
}


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_estimates(call):
    found = call()
    for x in (found.value, found.stderr):
        assert not isinstance(x, torch.Tensor) or x.device.type == "cpu"


@pytest.mark.usefixtures("elsewhere")
def test_spectra():
    found = estimate.eigsh(A, 3, ncv=8, memory_budget=8 * 30 * 4)
    assert found.eigenvalues.device.type == found.eigenvectors.device.type == "cpu"
    assert estimate.spectral_density(A, num_steps=10).nodes.shape == (10, 10)
    tracker = estimate.Tracker(A, 2, num_probes=2)
    tracker.update()
    assert tracker.update().trace.num_matvecs == 2
    assert tracker.eigenvectors.device.type == "cpu"

"""Following eigenvalues of a matrix that changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torchlinop import HessianLinearOperator, estimate

from tests.estimate.matrices import Counted, decaying, with_spectrum


class Rotating(Counted):
    """A matrix whose eigenvectors turn and whose first two eigenvalues cross."""

    def __init__(self, dtype=torch.float64) -> None:
        generator = torch.Generator().manual_seed(0)
        turn = torch.randn(80, 80, generator=generator, dtype=dtype)
        self.turn = torch.linalg.matrix_exp(0.004 * (turn - turn.mH))
        self.values = torch.cat([torch.tensor([2.0, 1.6]), torch.linspace(0, 1, 78)])
        super().__init__(with_spectrum(self.values, dtype))
        self.step = 0

    def advance(self) -> None:
        self.step += 1
        self.values[0] -= 0.02
        self.values[1] += 0.02
        base = with_spectrum(self.values, self.torch_dtype)
        Q = torch.linalg.matrix_power(self.turn, self.step)
        self.matrix = Q @ base @ Q.mH


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("k", [1, 3])
def test_follows_through_a_crossing(k, dtype):
    A = Rotating(dtype)
    tracker = estimate.Tracker(A, k)
    for _ in range(30):
        before = A.columns
        seen = tracker.update()
        assert seen.num_matvecs == A.columns - before
        true = torch.linalg.eigvalsh(A.matrix).flip(0)[:k].numpy()
        assert np.abs(seen.eigenvalues - true).max() < 0.01 * true[0]
        assert (seen.eigenvalues <= true + 1e-9).all()
        A.advance()
    V = tracker.eigenvectors
    assert (V.mH @ V - torch.eye(k)).abs().max() < 1e-12
    assert len(tracker.history) == 30
    spent = np.array([step.num_matvecs for step in tracker.history[1:]])
    assert spent.mean() <= (4 if k == 1 else 8)


def test_sharpness_of_a_training_run_on_digits():
    """At most three products a step, on average, for one per cent."""
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    X, y = torch.tensor(images / 16)[:500], torch.tensor(labels)[:500]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).double()
    loss = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    H = HessianLinearOperator(model, loss, model.parameters(), [(X, y)])
    tracker = estimate.Tracker(H)
    for step in range(61):
        seen = tracker.update()
        if step % 15 == 0:
            (true,) = estimate.eigsh(H, 1, tol=1e-6).eigenvalues.tolist()
            assert abs(seen.eigenvalues[0] - true) < 0.01 * true
        optimizer.zero_grad()
        loss(model(X), y).backward()
        optimizer.step()
    spent = [step.num_matvecs for step in tracker.history[1:]]
    assert np.mean(spent) <= 3


def test_trace():
    A = Rotating()
    tracker = estimate.Tracker(A, 2, num_probes=20, seed=4)
    errors = []
    for _ in range(5):
        trace = tracker.update().trace
        errors.append(trace.value - A.matrix.trace().item())
        assert abs(errors[-1]) < 3 * trace.stderr
        A.advance()
    # the probes stay the same, so changes are seen better than values
    assert np.ptp(errors) < abs(np.mean(errors))


def test_small_matrices_and_bad_input():
    one = estimate.Tracker(torch.tensor([[3.0]]))
    for _ in range(2):
        assert one.update().eigenvalues == pytest.approx([3])
    three = estimate.Tracker(torch.diag(torch.tensor([1.0, 2.0, 5.0])), 3)
    for _ in range(2):
        np.testing.assert_allclose(three.update().eigenvalues, [5, 2, 1], rtol=1e-6)
    with pytest.raises(ValueError, match=r"no eigenvectors before the first update\(\)"):
        estimate.Tracker(decaying()).eigenvectors
    with pytest.raises(ValueError, match="k has to be at most N = 60, got 61"):
        estimate.Tracker(decaying(), 61)
    with pytest.raises(ValueError, match="max_matvecs has to be at least k = 3, got 2"):
        estimate.Tracker(decaying(), 3, max_matvecs=2)
    with pytest.raises(ValueError, match="max_matvecs has to be an integer of at least 1"):
        estimate.Tracker(decaying(), max_matvecs=9.5)
    with pytest.raises(ValueError, match="probes has to be one of rademacher"):
        estimate.Tracker(decaying(), probes="normal")
    with pytest.raises(ValueError, match="Tracker is for square matrices"):
        estimate.Tracker(torch.ones(2, 3))
    broken = decaying()
    broken[0, 0] = torch.nan
    with pytest.raises(np.linalg.LinAlgError, match="NaN"):
        estimate.Tracker(broken).update()

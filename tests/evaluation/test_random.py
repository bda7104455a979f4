"""Random models and losses are found; the user's random states stay."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn
from torchlinop import (
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
)

from tests.evaluation.dense import CLOSE, Body, reference
from tests.problems import mlp


class Branch(nn.Module):
    """Stochastic depth behind a layer scale, as in ConvNeXt."""

    def __init__(self, keep, scale, source):
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.keep, self.scale, self.source = keep, scale, source

    def forward(self, X):
        if self.training:
            kept = self.source(len(X)).to(X) < self.keep
            return self.head(X + self.scale * kept[:, None] * self.body(X))
        return self.head(X + self.scale * self.body(X))


SOURCES = {
    "torch": torch.rand,
    "numpy": lambda n: torch.from_numpy(np.random.rand(n)),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("keep", [0.5, 0.95])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_small_random_branch_is_found(source, keep, dtype):
    torch.manual_seed(0)
    model = Branch(keep, 1e-6, SOURCES[source]).to(dtype)
    batches = [(torch.randn(16, 4, dtype=dtype), torch.randint(3, (16,)))]
    arguments = nn.CrossEntropyLoss(), list(model.parameters()), batches
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    for operator in (HessianLinearOperator, GGNLinearOperator):
        with pytest.raises(ValueError, match="two different predictions"):
            operator(model, *arguments)
    with pytest.raises(ValueError, match="two different predictions"):
        JacobianLinearOperator(model, *arguments[1:])
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.array_equal(np.random.get_state()[1], state[1])
    HessianLinearOperator(model.eval(), *arguments)


def test_a_random_loss_is_found(data):
    model = mlp(4, 3, 3)

    def loss(prediction, target):
        kept = nn.functional.dropout(prediction, 0.1, training=True)
        return nn.functional.cross_entropy(kept, target)

    with pytest.raises(ValueError, match="two different losses"):
        HessianLinearOperator(model, loss, model.parameters(), data, reduction="mean")


def test_random_numbers_without_effect(data):
    class Noise(nn.Module):
        def forward(self, X):
            return X + 0 * torch.rand_like(X)

    model = nn.Sequential(mlp(4, 3, 3), Noise()).double()
    arguments = (nn.CrossEntropyLoss(), list(model.parameters()), data)
    with pytest.raises(ValueError, match="draws random numbers in training mode"):
        HessianLinearOperator(model, *arguments)
    model.eval()
    H = HessianLinearOperator(model, nn.CrossEntropyLoss(), model.parameters(), data)
    dense = reference(model, list(model.parameters()), data)[0]
    torch.testing.assert_close(H.to_dense(), dense, **CLOSE)


def test_random_states_stay(data):
    class Draws(Body):
        def forward(self, X):
            np.random.rand(), random.random(), torch.rand(1)
            return super().forward(X)

    def states():
        return random.getstate(), np.random.get_state()[2], torch.get_rng_state().tolist()

    model = Draws().double().eval()
    random.seed(0)
    before = states()
    H = HessianLinearOperator(model, nn.CrossEntropyLoss(), model.parameters(), data)
    H @ np.ones(H.shape[0])
    assert states() == before

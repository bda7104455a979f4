"""Flat vectors and named tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchlinop import HessianLinearOperator, ParameterSpace


@pytest.fixture
def space():
    return ParameterSpace(dict(nn.Linear(3, 2).named_parameters()))


def test_there_and_back(space):
    assert (space.dim, space.names) == (8, ("weight", "bias"))
    vector = torch.arange(8.0)
    named = space.to_named(vector)
    assert named["weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert named["bias"].tolist() == [6, 7]
    assert torch.equal(space.to_vector(named), vector)
    assert torch.equal(space.to_vector(list(named.values())), vector)
    assert torch.equal(space.to_vector(dict(reversed(named.items()))), vector)
    assert "dim=8" in repr(space)


def test_a_vector_does_not_share_memory_with_its_tensors(space):
    weight, bias = torch.zeros(2, 3), torch.zeros(2)
    vector = space.to_vector([weight, bias])
    vector += 1
    assert weight.sum() == bias.sum() == 0
    vector = ParameterSpace({"weight": weight}).to_vector([weight])
    vector += 1
    assert weight.sum() == 0


def test_space_of_an_operator_orders_its_vectors():
    model = nn.Linear(3, 2).double()
    data = [(torch.randn(4, 3).double(), torch.randn(4, 2).double())]
    H = HessianLinearOperator(model, nn.MSELoss(), model.parameters(), data)
    direction = {"weight": torch.randn(2, 3).double(), "bias": torch.randn(2).double()}
    product = H.space.to_named(H @ H.space.to_vector(direction))
    X = data[0][0]
    moved = X @ direction["weight"].T + direction["bias"]
    torch.testing.assert_close(product["weight"], moved.T @ X * 2 / 8)
    torch.testing.assert_close(product["bias"], moved.sum(0) * 2 / 8)


def test_wrong_tensors(space):
    with pytest.raises(ValueError, match=r"shape \(8,\), got \(7,\)"):
        space.to_named(torch.ones(7))
    with pytest.raises(KeyError, match=r"missing \['bias'\], unknown \['b'\]"):
        space.to_vector({"weight": torch.ones(2, 3), "b": torch.ones(2)})
    with pytest.raises(ValueError, match=r"shapes \[\(2, 3\), \(2,\)\], got \[\(6,\)\]"):
        space.to_vector([torch.ones(6)])


def test_parameters_without_a_shape():
    model = nn.LazyLinear(2)
    with pytest.raises(ValueError, match=r"'weight' has no shape yet. Call the model once"):
        ParameterSpace(dict(model.named_parameters()))
    model(torch.ones(1, 3))
    assert ParameterSpace(dict(model.named_parameters())).dim == 8

"""Small batches that are linearized as one, where that gives the same matrix."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchlinop import (
    EFLinearOperator,
    FisherMCLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
)
from torchlinop._joining import _LARGE, _SMALL, groups

SIZES = [3, 1, 5, 2, 7, 4]
N = sum(SIZES)


@pytest.fixture
def X():
    return torch.randn(N, 4, dtype=torch.float64)


@pytest.fixture
def y():
    return torch.arange(N) % 3


def network():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    return model.double()


def cut(X, y):
    return list(zip(X.split(SIZES), y.split(SIZES), strict=True))


def number_of_maps(operator):
    return len(operator._maps._kept.maps)


def hessian(loss, model, params, data):
    """The dense matrix of a sum over batches, by torch.func."""
    names = list(params)

    def value(flat):
        parts = flat.split([p.numel() for p in params.values()])
        given = {n: v.view_as(params[n]) for n, v in zip(names, parts, strict=True)}
        predict = torch.func.functional_call
        return sum(loss(predict(model, given, (X,)), y) for X, y in data)

    flat = torch.cat([p.detach().reshape(-1) for p in params.values()])
    return torch.func.hessian(value)(flat)


WEIGHT = torch.tensor([0.3, 1.0, 2.5], dtype=torch.float64)


@pytest.mark.parametrize(
    "options",
    [{}, {"weight": WEIGHT, "ignore_index": 1}, {"reduction": "sum"}],
    ids=["mean", "weighted", "sum"],
)
@pytest.mark.parametrize("loader", [False, True])
def test_the_matrix_is_the_same(X, y, options, loader):
    model = network()
    params = dict(model.named_parameters())
    loss = nn.CrossEntropyLoss(**options)
    data = cut(X, y)
    if loader:
        data = DataLoader(TensorDataset(X, y), batch_size=5, shuffle=True)
    H = HessianLinearOperator(model, loss, params, data)
    total = nn.CrossEntropyLoss(**options)
    expected = hessian(total, model, params, [(X, y)])
    for product in range(7):
        v = torch.randn(H.shape[1], dtype=torch.float64)
        torch.testing.assert_close(H @ v, expected @ v)
        assert number_of_maps(H) == (1 if product > 0 else len(data))
    torch.testing.assert_close(H.to_dense(), expected)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    expected = hessian(total, model, params, [(X, y)])
    for _ in range(4):
        torch.testing.assert_close(H @ v, expected @ v)
    assert number_of_maps(H) == 1
    X[N - 1] *= 2
    expected = hessian(total, model, params, [(X, y)])
    torch.testing.assert_close(H @ v, expected @ v)


@pytest.mark.parametrize("kind", [GGNLinearOperator, EFLinearOperator])
def test_other_sums(X, y, kind):
    model = network()
    arguments = model, nn.CrossEntropyLoss(), list(model.parameters())
    G, whole = kind(*arguments, cut(X, y)), kind(*arguments, [(X, y)])
    expected = whole.to_dense()
    for _ in range(5):
        torch.testing.assert_close(G.to_dense(), expected)
    assert number_of_maps(G) == 1


@pytest.mark.parametrize("loader", [False, True])
def test_a_first_block_is_multiplied_in_one_piece(X, y, loader):
    model = network()
    data = cut(X, y)
    if loader:
        data = DataLoader(TensorDataset(X, y), batch_size=5, shuffle=True)
    loss = nn.CrossEntropyLoss()
    H = HessianLinearOperator(model, loss, model.parameters(), data)
    expected = hessian(loss, model, dict(model.named_parameters()), [(X, y)])
    identity = torch.eye(H.shape[1], dtype=torch.float64)
    torch.testing.assert_close(H @ identity, expected)
    assert number_of_maps(H) == 1
    torch.testing.assert_close(H.to_dense(), expected)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_first_block_of_what_does_not_fit(X, y, share):
    model = network()
    arguments = model, nn.CrossEntropyLoss(), list(model.parameters()), cut(X, y)
    H = HessianLinearOperator(*arguments)
    identity = torch.eye(H.shape[1], dtype=torch.float64)
    expected = torch.stack([H @ e for e in identity], 1)
    budget = share * H._maps.nbytes
    H = HessianLinearOperator(*arguments, memory_budget=budget)
    torch.testing.assert_close(H @ identity, expected)
    assert H._maps.nbytes <= budget
    for _ in range(2):
        torch.testing.assert_close(H.to_dense(), expected)


class Coupled(nn.Module):
    """A network whose prediction for a sample depends on the others in the batch."""

    def __init__(self, kind):
        super().__init__()
        self.inner = network()
        self.kind = kind
        self.gate = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.calls = 0

    def forward(self, X):
        self.calls += 1
        if self.kind == "centred":
            return self.inner(X - 1e-6 * X.mean(0))
        if self.kind == "number":
            return self.inner(X) * (1 + 1e-6 * len(X))
        if self.kind == "limit" and len(X) > 7:
            raise RuntimeError("more than 7 samples")
        if self.kind == "gate":  # shows in derivatives only
            return self.inner(X) + self.gate * X.mean()
        return self.inner(X)


@pytest.mark.parametrize("kind", ["centred", "number", "limit", "gate"])
def test_what_depends_on_the_batch_is_not_joined(X, y, kind):
    model = Coupled(kind)
    params = {n: p for n, p in model.named_parameters() if kind == "gate" or n != "gate"}
    data = cut(X, y)
    H = HessianLinearOperator(model, nn.CrossEntropyLoss(reduction="sum"), params, data)
    expected = hessian(nn.CrossEntropyLoss(reduction="sum"), model, params, data)
    for _ in range(5):
        v = torch.randn(H.shape[1], dtype=torch.float64)
        torch.testing.assert_close(H @ v, expected @ v, rtol=1e-10, atol=1e-10)
    assert number_of_maps(H) == len(SIZES)
    H.refresh()
    H @ v
    calls = model.calls
    H @ v, H @ v
    assert model.calls == calls  # it is tried once


def test_what_has_an_order_is_not_joined(X, y):
    model = network()
    params = list(model.parameters())
    F = FisherMCLinearOperator(model, nn.CrossEntropyLoss(), params, cut(X, y))
    J = JacobianLinearOperator(model, params, cut(X, y))
    for A in (F, J):
        v = torch.randn(A.shape[1], dtype=torch.float64)
        first = A @ v
        for _ in range(5):
            torch.testing.assert_close(A @ v, first)
        assert number_of_maps(A) == len(SIZES)


def test_what_cannot_be_concatenated_is_not_joined(X, y):
    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, X):
            return self.inner(X["x"])

    model = First()
    data = [({"x": X}, y) for X, y in cut(X, y)]
    H = HessianLinearOperator(model, nn.CrossEntropyLoss(), model.parameters(), data)
    v = torch.randn(H.shape[1], dtype=torch.float64)
    first = H @ v
    for _ in range(5):
        torch.testing.assert_close(H @ v, first)
    assert number_of_maps(H) == len(SIZES)


@pytest.mark.parametrize("room", [1.2, 3.0])
def test_both_have_to_fit_for_a_moment(X, y, room):
    model = network()
    arguments = model, nn.CrossEntropyLoss(), list(model.parameters()), cut(X, y)
    H = HessianLinearOperator(*arguments)
    v = torch.randn(H.shape[1], dtype=torch.float64)
    first = H @ v
    H = HessianLinearOperator(*arguments, memory_budget=room * H._maps.nbytes)
    for _ in range(5):
        torch.testing.assert_close(H @ v, first)
    kept = H._maps._kept
    assert number_of_maps(H) == (1 if room > 2 else len(SIZES))
    assert kept.nbytes == sum(linear_map.nbytes for linear_map in kept.maps.values())
    assert kept.batches == {}


def test_groups():
    assert list(groups({0: 1, 1: _SMALL + 1, 2: 1, 3: 5})) == [[0, 2, 3]]
    assert list(groups({0: 1, 1: _SMALL + 1})) == []
    many = list(groups(dict.fromkeys(range(20), _SMALL)))
    assert [len(group) for group in many] == [8, 8, 4]
    assert len(many[0]) * _SMALL <= _LARGE
    assert list(groups({})) == []

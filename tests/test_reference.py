"""The dense references against loops and closed forms, for data of every kind."""

from __future__ import annotations

from collections import UserDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchlinop.reference import (
    dense_empirical_fisher,
    dense_ggn,
    dense_gradient,
    dense_gradient_and_loss,
    dense_hessian,
    dense_jacobian,
)

from tests.problems import regression

CLOSE = {"rtol": 1e-11, "atol": 1e-13}
ALL = [dense_hessian, dense_ggn, dense_gradient]


class Scaled(nn.Module):
    """Takes a mapping with a tensor and a number."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, X):
        return X["scale"] * self.net(X["inputs"])


@pytest.mark.parametrize("kind", [dict, UserDict])
@pytest.mark.parametrize("dense", ALL)
def test_mappings_with_other_things_than_tensors(dense, kind):
    """The factors differ from batch to batch."""
    problem = regression()
    scales = [0.5, 1.0, 2.0]
    data = [
        (kind(inputs=X, scale=s, name="a"), y)
        for (X, y), s in zip(problem.data, scales, strict=True)
    ]

    def by_hand(params, X):
        return X[:, :1] * torch.func.functional_call(
            problem.model, dict(zip(names, params, strict=True)), (X[:, 1:],)
        )

    names = [n for n, _ in problem.model.named_parameters()]
    flat = [
        (torch.cat([torch.full((len(X), 1), s).double(), X], 1), y)
        for (X, y), s in zip(problem.data, scales, strict=True)
    ]
    before = [X["inputs"] for X, _ in data]
    actual = dense(Scaled(problem.model), problem.loss, problem.params, data)
    expected = dense(by_hand, problem.loss, problem.params, flat)
    torch.testing.assert_close(actual, expected, **CLOSE)
    assert all(X["inputs"] is t for (X, _), t in zip(data, before, strict=True))


def test_jacobian_of_batches_of_several_shapes():
    """Sequences of several lengths cannot be concatenated; their predictions are."""
    W = torch.randn(3, 2, dtype=torch.float64)
    data = [(torch.randn(n, length, 3).double(), None) for n, length in ((2, 4), (1, 5))]
    J = dense_jacobian(lambda p, X: X @ p[0], [W], data)
    rows = torch.cat([X.reshape(-1, 3) for X, _ in data])
    torch.testing.assert_close(J, torch.kron(rows, torch.eye(2).double()), **CLOSE)


def test_part_of_the_parameters_of_a_tied_model():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode = nn.Linear(3, 3)
            self.decode = nn.Linear(3, 3, bias=False)
            self.decode.weight = self.encode.weight

        def forward(self, x):
            return self.decode(torch.tanh(self.encode(x)))

    model = Tied().double()
    X, y = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    bias, W = model.encode.bias, model.encode.weight

    def loss(w):
        return F.mse_loss(torch.tanh(X @ w.view(3, 3).T + bias) @ w.view(3, 3).T, y)

    for params in ([W], {"decode.weight": W}, iter([W])):
        H = dense_hessian(model, nn.MSELoss(), params, [(X[:2], y[:2]), (X[2:], y[2:])])
        expected = torch.func.hessian(loss)(W.detach().reshape(-1))
        torch.testing.assert_close(H, expected.detach(), **CLOSE)
        assert not H.requires_grad
    H = dense_hessian(model, nn.MSELoss(), [bias], [(X, y)])
    expected = torch.func.hessian(lambda b: F.mse_loss(torch.tanh(X @ W.T + b) @ W.T, y))(
        bias.detach()
    )
    torch.testing.assert_close(H, expected.detach(), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dense", ALL)
def test_half_precision_is_computed_in_float32(dense, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    model = model.to(dtype).eval()
    loss = nn.CrossEntropyLoss(torch.tensor([0.5, 2.0])).to(dtype)
    X, y = torch.randn(5, 3).to(dtype), torch.randint(2, (5,))
    actual = dense(model, loss, list(model.parameters()), [(X, y)])
    assert actual.dtype == torch.float32
    assert model[0].weight.dtype == loss.weight.dtype == dtype
    model.float(), loss.float()
    expected = dense(model, loss, list(model.parameters()), [(X.float(), y)])
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dense", ALL)
def test_statistics_of_a_model_stay_as_they_are(dense):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    model.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    X, y = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    dense(model, nn.MSELoss(), list(model.parameters()), [(X, y)])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("dense", ALL)
def test_samples_without_a_batch_dimension(dense):
    W = torch.randn(3, 4, dtype=torch.float64)
    X, y = torch.randn(5, 4).double(), torch.randint(3, (5,))
    single = list(zip(X, y, strict=True))
    arguments = lambda p, X: X @ p[0].T, nn.CrossEntropyLoss(), [W]
    torch.testing.assert_close(dense(*arguments, single), dense(*arguments, [(X, y)]))


def test_gradient_and_loss():
    problem = regression()
    gradient, loss = dense_gradient_and_loss(*problem.arguments)
    X, y = (torch.cat(parts) for parts in zip(*problem.data, strict=True))
    expected = problem.loss(problem.model(X), y)
    torch.testing.assert_close(loss, expected.detach(), **CLOSE)
    for g, e in zip(gradient, torch.autograd.grad(expected, problem.params), strict=True):
        torch.testing.assert_close(g, e, **CLOSE)


def test_targets_that_cannot_be_joined():
    data = [(torch.ones(1), {"y": 1}), (torch.ones(1), {"y": 2})]
    with pytest.raises(TypeError, match=r"got dict\. Pass the data as one batch"):
        dense_hessian(lambda p, X: p[0] * X, lambda f, y: f.sum(), [torch.ones(1)], data)


def test_empirical_fisher_sums_over_data_of_any_shape():
    W = torch.randn(2, 3, dtype=torch.float64)
    data = [(torch.randn(2, 4, 3).double(), torch.randn(2, 4).double())]
    (X, y) = data[0]
    model = lambda p, X: X @ p[0][0] + X @ p[0][1]  # noqa: E731
    E = dense_empirical_fisher(
        model, lambda f, y: (f - y).square(), [W], data, normalizer=3.0
    )
    residual = 2 * (model([W], X) - y).reshape(-1, 1)
    rows = residual * X.reshape(-1, 3).repeat(1, 2)
    torch.testing.assert_close(E, rows.T @ rows / 3, **CLOSE)

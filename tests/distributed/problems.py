"""A small classifier, its data, and shares of it for ranks."""

from __future__ import annotations

import torch
from torch import nn

from tests.evaluation.dense import jacobian, reference

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def close(actual, expected):
    torch.testing.assert_close(actual, expected, **CLOSE)


def compare(operator, dense):
    """Blocks, and so many single products that they are replayed."""
    close(operator.to_dense(), dense)
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        v = torch.randn(operator.shape[1], dtype=torch.float64, generator=generator)
        close(operator @ v, dense @ v)


def model():
    torch.manual_seed(0)
    layers = nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)
    return nn.Sequential(*layers).double()


def data():
    """Six uneven batches with ignored targets."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for size in (5, 1, 4, 3, 2, 6):
        X = torch.randn(size, 4, dtype=torch.float64, generator=generator)
        y = torch.randint(3, (size,), generator=generator)
        y[size // 2 + 1 :: 3] = -100
        batches.append((X, y))
    return batches


def loss():
    return nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 4.0]).double())


def regression():
    """The same inputs with two targets each."""
    return [(X, torch.stack([X.sum(1), X[:, 0]], dim=1)) for X, _ in data()]


def share(batches, rank, size):
    """Uneven shares in the order of the ranks; rank 1 of two or more has some, 2 none."""
    ends = {2: [0, 4, 6], 4: [0, 1, 4, 4, 6], 1: [0, 6]}[size]
    return batches[ends[rank] : ends[rank + 1]]


def dense_hessian(model, loss, params, data):
    return reference(model, list(params), data, loss)[0]


def dense_ggn(model, loss, params, data):
    return reference(model, list(params), data, loss)[1]


def dense_jacobian(model, params, data):
    X = torch.cat([X for X, _ in data])
    return jacobian(model(X).reshape(-1), list(params))


def dense_gradient_and_loss(model, loss, params, data):
    X, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    value = loss(model(X), y)
    return torch.autograd.grad(value, list(params)), value.detach()

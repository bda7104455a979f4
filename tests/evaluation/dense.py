"""What the matrices of a disguised model are compared with, and a plain model."""

from __future__ import annotations

import torch
from torch import nn
from torchlinop import (
    GGNLinearOperator,
    HessianLinearOperator,
)

CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def reference(model, params, data, loss=None):
    """Hessian and GGN by torch's own double backward on the user's model."""
    loss = nn.CrossEntropyLoss() if loss is None else loss
    X, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    prediction = model(X)
    gradient = torch.autograd.grad(loss(prediction, y), params, create_graph=True)
    hessian = jacobian([entry for g in gradient for entry in g.reshape(-1)], params)
    J = jacobian(model(X).reshape(-1), params)
    leaf = prediction.detach().requires_grad_()
    (slope,) = torch.autograd.grad(loss(leaf, y), leaf, create_graph=True)
    return hessian, J.T @ jacobian(slope.reshape(-1), [leaf]) @ J


def jacobian(outputs, inputs):
    rows = [
        torch.autograd.grad(o, inputs, retain_graph=True, allow_unused=True)
        for o in outputs
    ]
    return torch.stack(
        [
            torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).reshape(-1)
                    for g, p in zip(row, inputs, strict=True)
                ]
            )
            for row in rows
        ]
    )


def agrees(model, params, data, plain=None, **options):
    """Compare both matrices with those of ``plain``, the model without its disguise."""
    params = list(params)
    hessian, ggn = reference(model if plain is None else plain, params, data)
    for operator, dense in ((HessianLinearOperator, hessian), (GGNLinearOperator, ggn)):
        A = operator(model, nn.CrossEntropyLoss(), params, data, **options)
        torch.testing.assert_close(A.to_dense(), dense, **CLOSE)
        for v in torch.eye(len(dense), dtype=dense.dtype)[:6]:  # replayed at the end
            torch.testing.assert_close(A @ v, dense @ v, **CLOSE)
    assert hessian.abs().max() > 1e-3


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, X):
        return self.b(torch.tanh(self.a(X)))

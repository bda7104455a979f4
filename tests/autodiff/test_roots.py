"""Roots of loss Hessians multiply up to the Hessian."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchlinop.autodiff.losses import as_loss

X = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0)).double()
LABELS = torch.tensor([[0, 1], [2, -100], [1, 1], [0, 2]])
BINARY = (X > 0.3).double()
#: predictions whose probabilities are 0, 1, 1/2 and 1/3
SHARP = torch.stack([X[:, 0].round(), X[:, 0].round(), 0 * X[:, 0]], dim=1)
WEIGHT = torch.tensor([1.0, 2.0, 0.5]).double()

LOSSES = {
    "cross-entropy": (
        nn.CrossEntropyLoss(
            weight=torch.tensor([1.0, 2.0, 0.5]).double(), label_smoothing=0.1
        ),
        X,
        LABELS,
    ),
    "soft targets": (nn.CrossEntropyLoss(reduction="sum"), X, X.softmax(1)),
    "one datum": (nn.CrossEntropyLoss(), X[0, :, 0], torch.tensor(2)),
    "certain": (nn.CrossEntropyLoss(), 2000 * SHARP, LABELS),
    "one class": (nn.CrossEntropyLoss(), X[:, :1], LABELS.clamp(max=0)),
    "squared error": (nn.MSELoss(), X, BINARY),
    "binary": (nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.0, 0.5])), X, BINARY),
    "one number each": (nn.BCEWithLogitsLoss(), X[:, 0, 0], BINARY[:, 0, 0]),
    "poisson": (nn.PoissonNLLLoss(), X, BINARY),
}


@pytest.mark.parametrize("name", LOSSES)
def test_root(name):
    module, f, y = LOSSES[name]
    loss = as_loss(module, None)
    root = loss.hessian_root(f, y, 4)
    columns = torch.stack([root.column(c).reshape(-1) for c in range(root.columns)])
    module.reduction = "sum"
    expected = torch.func.hessian(lambda f: module(f, y))(f).reshape(f.numel(), f.numel())
    dim = loss.row_dimension(f)
    rows = torch.arange(f.numel()).reshape(f.shape)
    rows = rows.unsqueeze(-1) if dim is None else rows.movedim(dim, -1)
    total = torch.zeros_like(expected)
    for row in rows.reshape(-1, rows.shape[-1]):  # columns hold all rows at once
        total[row[:, None], row] = columns[:, row].T @ columns[:, row]
    torch.testing.assert_close(total, expected)


def test_general_losses():
    def mixed(f, y):
        return (f.exp().sum(-1) + (f.sum(-1) - y) ** 2).sum()

    f, y = X[:, :, 0], X[:, 0, 1]
    root = as_loss(mixed, "sum").hessian_root(f, y, 4)
    columns = torch.stack([root.column(c) for c in range(root.columns)])
    for n in range(4):
        expected = f[n].exp().diag() + 2 * torch.ones(3, 3)
        torch.testing.assert_close(columns[:, n].T @ columns[:, n], expected.double())


def test_what_has_no_root():
    concave = as_loss(lambda f, y: -(f**2).sum(), "sum")
    with pytest.raises(ValueError, match=r"not convex in the prediction.* -2.000e"):
        concave.hessian_root(X, BINARY, 4)
    coupled = as_loss(lambda f, y: f.sum() ** 2 + (f**2).sum(), "sum")
    with pytest.raises(ValueError, match="couples several data"):
        coupled.hessian_root(X, BINARY, 4)


def test_weights_of_the_data():
    module, f, y = LOSSES["cross-entropy"]
    w = as_loss(nn.CrossEntropyLoss(weight=module.weight), None).row_weights(f, y)
    assert w.shape == (4, 1, 2)
    assert w[:, 0, :].tolist() == [[1, 2], [0.5, 0], [2, 2], [1, 0.5]]
    w = as_loss(LOSSES["binary"][0], None).row_weights(f, BINARY)
    expected = torch.where(BINARY == 1, torch.tensor([2.0, 0.5]).double(), 1).mean(-1)
    torch.testing.assert_close(w.squeeze(-1), expected)
    for name in ("squared error", "poisson"):
        w = as_loss(LOSSES[name][0], None).row_weights(f, y)
        assert torch.equal(w, torch.ones(4, 3, 1).double())

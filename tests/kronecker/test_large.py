"""Large Gram matrices, of which parts are copied."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchlinop import KFACLinearOperator
from torchlinop.kronecker import moments


@pytest.mark.parametrize("d", [319, 320, 513, 1301])
def test_sums_of_gram_matrices(d):
    torch.manual_seed(0)
    rows = torch.randn(2, 2, 6, d, dtype=torch.float64)  # twice, two groups
    total = torch.zeros(2, d, d, dtype=torch.float64)
    for part in rows:
        moments._add_gram(total, part, 0.5)
    expected = torch.einsum("tgni,tgnj->gij", rows, rows) / 2
    torch.testing.assert_close(moments._mirror(total), expected)


@pytest.mark.parametrize("joint_bias", [True, False])
def test_wide_layer(joint_bias):
    torch.manual_seed(0)
    layer = nn.Linear(701, 2).double()
    X, y = torch.randn(5, 701).double(), torch.randn(5, 2).double()
    batches = [(X[:2], y[:2]), (X[2:], y[2:])]
    K = KFACLinearOperator(
        layer, nn.MSELoss(), layer.parameters(), batches, joint_bias=joint_bias
    )
    V, b = torch.randn(2, 701).double(), torch.randn(2).double()
    product = K @ torch.cat([V.flatten(), b])
    X1 = torch.cat([X, torch.ones(5, 1).double()], dim=1)
    gram = 2 / y.numel() * X1.T @ X1
    if not joint_bias:
        gram[-1, :-1] = gram[:-1, -1] = 0
    expected = torch.cat([V, b.unsqueeze(1)], dim=1) @ gram
    torch.testing.assert_close(product[:-2].view(2, -1), expected[:, :-1])
    torch.testing.assert_close(product[-2:], expected[:, -1])

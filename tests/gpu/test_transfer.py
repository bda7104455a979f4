"""Batches on their way from the host."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchlinop import GGNLinearOperator
from torchlinop.data import DataSource


@pytest.fixture(autouse=True)
def _device():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.mark.parametrize("kind", ["list", "loader", "workers"])
def test_batches_arrive(kind):
    X, y = torch.randn(64, 1000), torch.arange(64) % 10
    data = list(zip(X.split(8), y.split(8), strict=True))
    if kind != "list":
        workers = 1 if kind == "workers" else 0
        data = DataLoader(TensorDataset(X, y), batch_size=8, num_workers=workers)
    device = torch.device("cuda", torch.cuda.current_device())
    source = DataSource(data, device)
    source.accept(source.survey(lambda batch: None, check=True))
    for _ in range(3):
        seen = []
        for batch in source:
            torch.cuda._sleep(1_000_000)  # the copies are ahead of what uses them
            seen.append(batch.X * 2)
            assert batch.X.device == device
        assert torch.equal(torch.cat(seen).cpu(), 2 * X)

    model = nn.Linear(1000, 10)
    expected = GGNLinearOperator(model, nn.CrossEntropyLoss(), model.parameters(), [(X, y)])
    v = torch.randn(expected.shape[1])
    expected = expected @ v
    model.cuda()
    for cache in (False, True):
        G = GGNLinearOperator(
            model, nn.CrossEntropyLoss(), model.parameters(), data, cache=cache
        )
        for _ in range(4):
            torch.testing.assert_close((G @ v.cuda()).cpu(), expected)

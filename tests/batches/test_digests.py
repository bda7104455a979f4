"""Numbers that tell batches apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchlinop.data import Batch
from torchlinop.data.digests import _rows, content

from tests.batches.sources import (
    N,
    X,
    Y,
)


def _content(*tensors, **facts):
    return content(Batch(0, (*tensors, facts), None, 1, tensors))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.uint8, torch.bool]
)
@pytest.mark.parametrize("width", [1, 7, 1023, 1025, 5000])
def test_every_entry_counts(dtype, width):
    x = torch.zeros(3, width).to(dtype)
    before = _content(x)
    found = {before}
    for position in {0, width // 2, width - 1}:
        for row in range(3):
            x[row, position] = 1
            found.add(_content(x))
            x[row, position] = 0
    assert _content(x) == before
    places = len({0, width // 2, width - 1})
    assert len({c.digests for c in found}) == 1 + 3 * places
    assert len({c.total for c in found}) == 1 + places  # whichever row it is


def test_the_total_is_that_of_samples_in_any_order():
    order = torch.randperm(N)
    here, there = _content(X, Y), _content(X[order], Y[order])
    assert here.total == there.total
    assert here.digests != there.digests
    assert here.samples == N
    assert here.total != _content(X, Y[order]).total
    columns = torch.stack([X[order, 0], X[:, 1], X[:, 2]], dim=1)
    assert here.total != _content(columns, Y).total
    assert here.total != _content(X, Y, weight=2.0).total
    assert here.total != _content(X.view(torch.int32), Y).total


def test_few_bits_do_not_collide():
    """Ones and zeros have nothing but zeros in their low bits."""
    rows = torch.tensor(np.unpackbits(np.arange(4096, dtype=">u2").view(np.uint8)))
    for dtype in (torch.float64, torch.float32, torch.int64):
        matrix = rows.reshape(4096, 16)[:, 4:].to(dtype)
        assert len(_rows(matrix).unique()) == 4096


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_of_all_kinds_are_read():
    base = torch.randn(6, 8)
    nested = torch.nested.nested_tensor([base[:2].clone(), base[2:].clone()])
    for tensor in (base.T, base[1:, 1:], base[1:, :3].bfloat16(), base.to_sparse(), nested):
        assert _content(tensor) == _content(tensor.clone())
        assert _content(tensor).digests != _content(2 * tensor).digests
    complex_ = base.to(torch.complex64) * 1j
    assert _content(complex_.conj()) == _content(complex_.conj().resolve_conj())
    assert _content(torch.empty(0, 3)) != _content(torch.empty(0, 4))

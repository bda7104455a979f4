"""Data that the tests of this folder share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def data():
    torch.manual_seed(3)
    return [(torch.randn(n, 4).double(), torch.randint(3, (n,))) for n in (4, 2)]

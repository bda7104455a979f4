"""What goes wrong on one rank is an error on all of them."""

from __future__ import annotations

import pytest
import torch
from torchlinop import HessianLinearOperator
from torchlinop.distributed import broadcast, driver

from tests.distributed.launching import findings
from tests.distributed.problems import data, loss, model


def test_mishaps(tmp_path):
    failed = findings("tests.distributed.mishaps", 2, tmp_path)
    assert not failed, failed


def test_no_group():
    m = model()
    full = m, loss(), list(m.parameters()), data()
    H = HessianLinearOperator(*full)
    world = torch.distributed.group.WORLD  # None: what one passes who has forgotten
    for attempt in (
        lambda: HessianLinearOperator(*full, process_group=world),
        lambda: driver(H).__enter__(),
        lambda: broadcast(1),
    ):
        with pytest.raises(RuntimeError, match="init_process_group"):
            attempt()
    with pytest.raises(RuntimeError, match="init_process_group"):
        HessianLinearOperator(*full, process_group=7)

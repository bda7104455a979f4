"""Solvers on rank 0, with the other ranks at its service."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.distributed.launching import findings, torchrun


def test_serving(tmp_path):
    failed = findings("tests.distributed.serving", 2, tmp_path)
    assert not failed, failed


def test_example(tmp_path):
    pytest.importorskip("sklearn")
    status, output = torchrun("docs/examples/distributed.py", 2, tmp_path)
    assert status == 0, output
    assert output.count("eigenvalues") == 2
    assert "difference from one process" in output


PROGRAM = """
import gc, weakref
import numpy as np, torch, torch.distributed as dist
from torchlinop import HessianLinearOperator
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
group = weakref.ref(dist.group.WORLD)
model, X, y = torch.nn.Linear(2, 1), torch.ones(3, 2), torch.ones(3, 1)
data, loss = [(X, y)], torch.nn.MSELoss()
H = HessianLinearOperator(model, loss, model.parameters(), data, process_group=group())
H @ np.ones(3)
import torch.distributed.nn  # as torch.func does
dist.destroy_process_group()
gc.collect()
print(group())
"""


def test_a_group_does_not_outlive_its_end():
    """Its threads would, and abort Python sometimes."""
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "None\n"), done.stderr

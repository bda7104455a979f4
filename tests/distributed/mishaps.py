"""Checks on every rank: what goes wrong on one of them is an error on all, and no end."""

from __future__ import annotations

import copy
import os
import signal
import sys
import threading
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchlinop import (
    EmpiricalRisk,
    FisherMCLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
)
from torchlinop.distributed import driver

from tests.distributed import checking
from tests.distributed.problems import CLOSE, data, dense_hessian, loss, model, share


class Mishap(nn.Module):
    """A model to which something happens on the last rank, on demand."""

    def __init__(self):
        super().__init__()
        self.inner = model()
        self.happening = None

    def forward(self, X):
        if self.happening is not None:
            self.happening()
        return self.inner(X)


def built(kind, m, rank, size, **options):
    own = share(data(), rank, size)
    return kind(m, loss(), m.parameters(), own, process_group=dist.group.WORLD, **options)


def works(H, m):
    ones = torch.ones(H.shape[0], dtype=torch.float64)
    dense = dense_hessian(m, loss(), list(m.parameters()), data())
    torch.testing.assert_close(H @ ones, dense.sum(1), **CLOSE)


def refused(error, message, function, *arguments, **options):
    """Expect the same error on every rank, and say which."""
    with pytest.raises(error, match=message) as caught:
        function(*arguments, **options)
    return caught.value


def check_other_parameters(rank, size):
    m = model()
    if rank == size - 1:
        with torch.no_grad():
            m[2].weight[0, 0] += 1e-15
            m[2].bias += 1
    message = f"parameter '2.weight'.* has other values on rank {size - 1} than on rank 0"
    refused(ValueError, message, built, HessianLinearOperator, m, rank, size)


def check_other_buffers_and_settings(rank, size):
    m = nn.Sequential(*model(), nn.BatchNorm1d(3).double()).eval()
    m[3].running_mean += float(rank == 0)
    message = "tensor '3.running_mean'.* has other values"
    refused(ValueError, message, built, GGNLinearOperator, m, rank, size)
    m, own = model(), share(data(), rank, size)
    smooth = nn.CrossEntropyLoss(label_smoothing=0.1 * rank)
    refused(
        ValueError,
        "settings of the loss",
        EmpiricalRisk,
        m,
        smooth,
        m.parameters(),
        own,
        process_group=dist.group.WORLD,
    )
    chosen = list(m.parameters())[rank == 1 :]
    refused(
        ValueError,
        "names of the parameters",
        EmpiricalRisk,
        m,
        loss(),
        chosen,
        own,
        process_group=dist.group.WORLD,
    )


def check_changed_apart(rank, size):
    m = model()
    H = built(HessianLinearOperator, m, rank, size)
    if rank == 0:
        with torch.no_grad():
            m[0].bias += 1
    refused(ValueError, "parameter '0.bias'", H.matvec, np.ones(H.shape[0]))
    if rank != 0:
        with torch.no_grad():
            m[0].bias += 1
    works(H, m)


def check_other_vectors_and_operators(rank, size):
    m = model()
    H = built(HessianLinearOperator, m, rank, size)
    unit = np.eye(H.shape[0])
    message = "another vector than rank 0"
    refused(ValueError, message, H.matvec, unit[:, 3 if rank == size - 1 else 4])
    refused(ValueError, "do not do the same", H.matmat, unit[:, : 2 if rank else 3])
    G = built(GGNLinearOperator, m, rank, size)
    last = G if rank == size - 1 else H
    refused(ValueError, "rank 0 was multiplying with Hess.*with GGN", last.matvec, unit[0])
    F = built(FisherMCLinearOperator, m, rank, size, seed=rank)
    refused(ValueError, "do not do the same", F.matvec, unit[0])
    works(H, m)


def check_error_in_the_model(rank, size):
    m = Mishap()
    H = built(HessianLinearOperator, m, rank, size, cache=False)

    def fail():
        raise OSError("disk full")

    if rank == size - 1:
        m.happening = fail
    for attempt in (
        lambda: H @ np.ones(H.shape[0]),
        lambda: built(HessianLinearOperator, m, rank, size),
        lambda: (
            built(GGNLinearOperator, m, rank, size, check_deterministic=False)
            @ np.ones(H.shape[0])
        ),
    ):
        error = refused(OSError, "disk full", attempt)
        if rank != size - 1:
            (note,) = error.__notes__
            assert note.startswith(f"Raised on rank {size - 1} of {size}")
            assert "in fail" in note
    with pytest.raises(OSError, match="disk full"), driver(H) as A:
        A @ np.ones(H.shape[0])
    m.happening = None
    works(H, m)


def check_bad_data_on_one_rank(rank, size):
    m, own = model(), share(data(), rank, size)
    bad = iter(own) if rank == size - 1 else own
    group = dist.group.WORLD
    for build in (
        lambda data: HessianLinearOperator(
            m, loss(), m.parameters(), data, process_group=group
        ),
        lambda data: JacobianLinearOperator(m, m.parameters(), data, process_group=group),
    ):
        refused(TypeError, "list_iterator, which can be read only once", build, bad)
        refused(ValueError, "data is empty", build, [])


def check_slow_rank(rank, size):
    m = Mishap()
    H = built(HessianLinearOperator, m, rank, size, cache=False)
    if rank == size - 1:
        m.happening = lambda: time.sleep(0.3)
    works(H, m)


def check_interrupt_in_the_model(rank, size):
    m = Mishap()
    H = built(HessianLinearOperator, m, rank, size, cache=False)
    if rank == size - 1:
        m.happening = lambda: signal.raise_signal(signal.SIGINT)
    refused(KeyboardInterrupt, None, H.matvec, np.ones(H.shape[0]))
    with pytest.raises(KeyboardInterrupt), driver(H) as A:
        A @ np.ones(H.shape[0])
    m.happening = None
    works(H, m)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def check_interrupt_while_waiting(rank, size):
    m = model()
    H = built(HessianLinearOperator, m, rank, size)
    told = []

    def interrupted(solve):
        if rank == size - 1:
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        with driver(H) as A:
            if A is not None:
                time.sleep(0.3)
                solve(A)
                told.append("nothing")

    refused(KeyboardInterrupt, None, interrupted, lambda A: A @ np.ones(A.shape[0]))
    assert not told
    refused(KeyboardInterrupt, None, interrupted, lambda A: None)
    works(H, m)


def check_interrupt_of_the_solver(rank, size):
    H = built(HessianLinearOperator, model(), rank, size)
    with pytest.raises(KeyboardInterrupt), driver(H):
        signal.raise_signal(signal.SIGINT)


def check_error_of_the_solver(rank, size):
    H = built(HessianLinearOperator, model(), rank, size)
    with pytest.raises(ZeroDivisionError), driver(H):
        1 / 0


def check_no_copies(rank, size):
    H = built(HessianLinearOperator, model(), rank, size)
    refused(TypeError, "build it on every rank", copy.deepcopy, H)


def check_wrong_groups(rank, size):
    m = model()
    full = m, loss(), list(m.parameters()), data()
    whole = dist.new_group(list(range(size)))
    H = HessianLinearOperator(*full[:3], share(data(), rank, size), process_group=whole)
    works(H, m)
    dist.destroy_process_group(whole)
    del whole
    refused(RuntimeError, "has been destroyed", H.matvec, np.ones(H.shape[0]))
    other = dist.new_group([0])
    if rank == 0:
        HessianLinearOperator(*full, process_group=other)
    else:
        with pytest.raises(RuntimeError, match=f"Process {rank} does not belong"):
            HessianLinearOperator(*full, process_group=other)
    with pytest.raises(TypeError, match="got int"):
        HessianLinearOperator(*full, process_group=0)


if __name__ == "__main__":
    checks = vars(sys.modules[__name__]).items()
    checking.run({name: check for name, check in checks if name[:6] == "check_"})

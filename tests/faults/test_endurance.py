"""Many products, many threads, many interrupts."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torchlinop import (
    CGInverseLinearOperator,
    DiagonalLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    monitor,
)

from tests.cases import CASES
from tests.problems import classification
from tests.solve.matrices import positive


def _resident() -> int:
    """Bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _grows(run: Callable[[], object], times: int) -> tuple[int, int]:
    """Blocks of Python's memory, and bytes of the process, that ``run`` leaves behind."""
    for _ in range(times // 10):
        run()
    gc.collect()
    blocks, resident = sys.getallocatedblocks(), _resident()
    for _ in range(times):
        run()
    gc.collect()
    return sys.getallocatedblocks() - blocks, _resident() - resident


def _rosenbrock(n: int) -> HessianLinearOperator:
    def f(x):
        return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()

    return HessianLinearOperator.from_function(f, torch.zeros(n, dtype=torch.float64))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ten_thousand_products_leave_nothing_behind():
    """A vector that stayed would be half a KiB each time, 5 MiB in all."""
    H, D = _rosenbrock(64), DiagonalLinearOperator(torch.ones(64, dtype=torch.float64))
    expression = (2 * D + H.T) @ D
    x = np.ones(64)
    v = torch.ones(64)
    blocks, resident = _grows(lambda: (expression @ x, expression @ v), 5_000)
    assert blocks < 1000
    assert resident < 2 * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("what", ["building", "recording", "solving", "watching"])
def test_other_work_leaves_nothing_behind(what):
    problem, x, A = classification(), np.ones(27), positive(27, 10.0)
    H = GGNLinearOperator(*problem.arguments)
    solver = CGInverseLinearOperator(A, rtol=1e-3)

    def step():
        problem.params[0].data.mul_(1.0)  # as an optimizer's step does
        return H @ x

    def watched():
        with monitor(H):
            return H @ x

    run = {
        "building": lambda: HessianLinearOperator(*problem.arguments) @ x,
        "recording": step,
        "solving": lambda: solver @ x,
        "watching": watched,
    }[what]
    blocks, resident = _grows(run, 200)
    assert blocks < 1000
    assert resident < 4 * 2**20


def test_every_operator_in_four_threads():
    """All threads multiply with all operators, which they share, in different orders."""
    interval = sys.getswitchinterval()
    operators = [make(torch.float64).operator for make in CASES.values()]
    inputs = [np.cos(np.arange(A.shape[1])) for A in operators]
    expected = [A @ x for A, x in zip(operators, inputs, strict=True)]
    operators = [make(torch.float64).operator for make in CASES.values()]  # new ones
    failed: list[BaseException] = []
    start = threading.Barrier(4)

    def work(k: int) -> None:
        start.wait()
        order = np.random.default_rng(k).permutation(len(operators))
        try:
            for i in [*order, *order, *order]:
                y = operators[i] @ (
                    torch.from_numpy(inputs[i].copy()) if k % 2 else inputs[i]
                )
                np.testing.assert_allclose(y, expected[i], rtol=1e-9, atol=1e-11)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failed, failed


PROGRAM = """
import sys, threading
import numpy as np
import torch
from scipy.sparse.linalg import eigsh
from torch import nn
from torchlinop import (
    CGInverseLinearOperator, FisherMCLinearOperator, GGNLinearOperator,
    HessianLinearOperator, JacobianLinearOperator, KFACLinearOperator, estimate, monitor,
)
torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.Tanh(), nn.Linear(3, 3))
model = model.double().eval()
data = [(torch.randn(n, 4).double(), torch.randint(3, (n,))) for n in (5, 3)]
loader = torch.utils.data.DataLoader(
    torch.utils.data.TensorDataset(data[0][0], data[0][1]), batch_size=2, shuffle=True,
    generator=torch.Generator(),
)
model[0].weight.grad = torch.ones(3, 4).double()
arguments = model, nn.CrossEntropyLoss(), list(model.parameters()), data
H, G = HessianLinearOperator(*arguments), GGNLinearOperator(*arguments, cache=False)
v = np.ones(H.shape[0])
expected = {"H": H @ v, "G": G @ v}

def everything():
    HessianLinearOperator(*arguments) @ v
    H.refresh()
    G @ v
    FisherMCLinearOperator(*arguments, seed=1) @ v
    JacobianLinearOperator(model, arguments[2], data).T @ np.ones(24)
    KFACLinearOperator(*arguments) @ v
    GGNLinearOperator(model, arguments[1], arguments[2], loader) @ v
    CGInverseLinearOperator(G, damping=1.0) @ v
    with monitor(H) as log:
        eigsh(H, k=2)
    if log.stopped:  # by Ctrl-C, which ends the run and not the program
        raise KeyboardInterrupt
    estimate.eigsh(H, k=2)

def state():
    return (
        [(p.data_ptr(), p._version, p.requires_grad) for p in model.parameters()],
        [type(m._parameters) for m in model.modules()],
        [sorted(vars(m)) for m in model.modules()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        model[0].weight.grad.sum().item(), model[3].weight.grad,
        torch.get_rng_state().sum().item(), np.random.get_state()[1].sum(),
        loader.generator.get_state().sum().item(),
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
        torch._C._len_torch_function_stack(), torch.get_default_dtype(),
        [m.training for m in model.modules()],
        torch.backends.cudnn.enabled, torch.backends.cuda.flash_sdp_enabled(),
    )

everything()
before, hits = state(), 0
print("ready", flush=True)
for line in sys.stdin:  # one for each signal to come, until there are no more
    try:
        while True:
            everything()
    except KeyboardInterrupt:
        hits += 1
    assert state() == before, (state(), before)
    print("again", flush=True)
np.testing.assert_allclose(H @ v, expected["H"], rtol=1e-9, atol=1e-12)
np.testing.assert_allclose(G @ v, expected["G"], rtol=1e-9, atol=1e-12)
everything()
others = []
thread = threading.Thread(target=lambda: others.append(H @ v), daemon=True)
thread.start()
thread.join(30)
assert len(others) == 1, "a lock is held"
print("hits", hits, flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
def test_ctrl_c_at_random_moments(rng):
    """A program that uses everything is interrupted from outside, fifteen times."""
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # also where the tests were started to ignore it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert program.stdout.readline() == "ready\n", program.stderr.read()
    timer = threading.Event()
    for _ in range(15):
        program.stdin.write("\n")
        program.stdin.flush()
        timer.wait(rng.uniform(0.01, 0.2))
        program.send_signal(signal.SIGINT)
        answer = program.stdout.readline()
        assert answer == "again\n", program.communicate()[1]
    out, err = program.communicate(timeout=60)
    assert out == "hits 15\n", err

"""The user's module is the user's own at every moment; its hooks are noticed."""

from __future__ import annotations

import gc
import signal
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torchlinop import (
    HessianLinearOperator,
)
from torchlinop.autodiff import recording

from tests.evaluation.dense import Body, agrees
from tests.problems import classification, mlp


def test_what_a_forward_pass_registers_is_not_the_users(data):
    seen = []

    class Registers(Body):
        def forward(self, X):
            self.extra = nn.Parameter(torch.ones(3).double())
            self.register_buffer("kept", torch.ones(3).double(), persistent=False)
            self.a.register_forward_hook(lambda _, __, output: output.square())
            result = super().forward(X) * self.extra * self.kept
            seen.append((len(model.a._forward_hooks), [*vars(model)], [*model._buffers]))
            return result

    class Plain(Body):
        def forward(self, X):
            return self.b(torch.tanh(self.a(X).square()))

    model, plain = Registers().double(), Plain()
    plain.a, plain.b = model.a, model.b
    before = 0, [*vars(model)], []
    agrees(model, model.parameters(), data, plain)
    assert all(now == before for now in seen)
    assert not model._non_persistent_buffers_set


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_that_come_and_go_are_noticed(data, register):
    model = mlp(4, 3, 3)
    H = HessianLinearOperator(model, nn.CrossEntropyLoss(), model.parameters(), data)
    v = np.ones(H.shape[0])
    before = H @ v
    after = register == "register_forward_hook"
    handle = getattr(model[0], register)(
        (lambda _, X, out: 2 * out) if after else (lambda _, X: (3 * X[0],))
    )
    fresh = HessianLinearOperator(model, nn.CrossEntropyLoss(), model.parameters(), data)
    np.testing.assert_allclose(H @ v, fresh @ v, rtol=1e-10, atol=1e-13)
    assert np.abs(H @ v - before).max() > 1e-3
    handle.remove()
    np.testing.assert_allclose(H @ v, before, rtol=1e-10, atol=1e-13)


class InterruptError(BaseException):
    """Not caught by anything on the way."""


def _interrupted(run, seconds):
    """Run until a signal falls somewhere; whether it did."""

    def handler(*_):
        raise InterruptError

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        run()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except InterruptError:
        return True
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return False


def test_interrupts_at_any_moment(rng):
    """A thousand of them: the module's tensors are its own, and products are right."""
    problem = classification()
    slots = [
        (m._parameters, n, p)
        for m in problem.model.modules()
        for n, p in m._parameters.items()
    ]
    H = HessianLinearOperator(*problem.arguments, cache=False)
    v = np.ones(27)
    expected = H @ v
    hits = 0
    torch.compile(torch.nn.Identity(), backend="eager")  # so that there is a compiler
    stance = torch._dynamo.eval_frame._stance
    gc.disable()  # its callbacks are not ours to guard
    try:
        for _ in range(1000):
            run = H._maps.refresh if hits % 3 == 0 else lambda: H @ v
            hits += _interrupted(run, rng.uniform(1e-5, 2e-3))
            assert all(slots[name] is p for slots, name, p in slots)
    finally:
        gc.enable()
    assert hits > 300
    assert torch._dynamo.eval_frame._stance is stance
    assert not recording._recorders
    assert torch.utils.checkpoint.CheckpointFunction is recording._reentrant
    np.testing.assert_allclose(H @ v, expected, rtol=1e-10, atol=1e-13)
    free = []
    thread = threading.Thread(target=lambda: free.append(H @ v))
    thread.start()
    thread.join(timeout=30)
    assert len(free) == 1  # no lock is held


def test_training_while_an_operator_records():
    """Gradients of another thread reach the parameters that it trains."""
    problem = classification()
    X, y = problem.data[0]
    stop, lost = threading.Event(), []

    def train():
        while not stop.is_set():
            problem.model.zero_grad(set_to_none=True)
            problem.loss(problem.model(X), y).backward()
            lost.append(any(p.grad is None for p in problem.params))

    thread = threading.Thread(target=train)
    thread.start()
    try:
        H = HessianLinearOperator(*problem.arguments, cache=False)
        while len(lost) < 1500:
            H @ np.ones(27)
    finally:
        stop.set()
        thread.join()
    assert not any(lost)

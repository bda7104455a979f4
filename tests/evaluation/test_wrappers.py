"""Wrapped, compiled, scripted and checkpointed models, branches and loops."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
import torchlinop.autodiff.recording
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchlinop import (
    HessianLinearOperator,
)

from tests.evaluation.dense import CLOSE, Body, agrees, reference
from tests.problems import mlp


class Block(nn.Module):
    def __init__(self, reentrant=None, compiled=False):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.GELU())
        self.head = nn.Linear(3, 3)
        self.reentrant = reentrant
        if compiled:
            self.inner = torch.compile(self.inner, backend="eager")

    def forward(self, X):
        if self.reentrant is None:
            return self.head(self.inner(X))
        return self.head(checkpoint(self.inner, X, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(data, reentrant):
    model = Block(reentrant).double()
    plain = Block().double()
    plain.load_state_dict(model.state_dict())
    plain.inner, plain.head = model.inner, model.head
    agrees(model, model.parameters(), data, plain)
    agrees(model, model.parameters(), data, plain, cache=False)


def test_checkpoints_work_as_before_elsewhere(data):
    """In another thread that trains, and afterwards."""
    model, calls = Block(False).double(), []
    model.inner.register_forward_pre_hook(lambda *_: calls.append(1))

    def train():
        calls.clear()
        model(data[0][0]).sum().backward()
        return len(calls)

    assert train() == 2
    with torchlinop.autodiff.recording.recording(torch.device("cpu")):
        thread = threading.Thread(target=lambda: counts.append(train()))
        counts = []
        thread.start()
        thread.join()
    assert counts == [2]
    assert train() == 2


def _whole(model):
    return torch.compile(model, backend="eager")


def _in_place(model):
    model.compile(backend="eager")
    return model


def _method(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


@pytest.mark.parametrize("wrap", [_whole, _in_place, _method, nn.DataParallel])
def test_wrapped_models(data, wrap):
    model = Block().double()
    plain = Block().double()
    plain.inner, plain.head = model.inner, model.head
    wrapped = wrap(model)
    agrees(wrapped, wrapped.parameters(), data, plain)
    named = dict(wrapped.named_parameters())
    H = HessianLinearOperator(wrapped, nn.CrossEntropyLoss(), named, data)
    assert H.space.names == tuple(named)
    dense = reference(plain, list(plain.parameters()), data)[0]
    torch.testing.assert_close(H.to_dense(), dense, **CLOSE)


@pytest.mark.parametrize("wrap", [_whole, nn.DataParallel])
def test_hooks_and_attributes_of_wrappers(data, wrap):
    class Outer(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, X):
            body = getattr(self.inner, "module", self.inner)
            return self.inner(X) + body.b(torch.sin(body.a(X)))

    def double(_, __, output):
        return 2 * output

    for nest in (Outer, lambda inner: inner):
        model, plain = nest(wrap(Body())).double(), nest(Body())
        for body in (getattr(model, "inner", model), getattr(plain, "inner", plain)):
            body.register_forward_hook(double)
        own, twin = list(model.parameters()), list(plain.parameters())
        plain.double().load_state_dict(dict(zip(plain.state_dict(), own, strict=True)))
        H = HessianLinearOperator(model, nn.CrossEntropyLoss(), own, data)
        dense = reference(plain, twin, data)[0]
        torch.testing.assert_close(H.to_dense(), dense, **CLOSE)


def test_a_compiled_part(data):
    model = Block(compiled=True).double()
    plain = Block().double()
    plain.inner, plain.head = model.inner._orig_mod, model.head
    agrees(model, model.parameters(), data, plain)


@pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")  # of 3.13.0
def test_a_compiled_part_is_compiled_still(data):
    model = Block(compiled=True).double()
    H = HessianLinearOperator(model, nn.CrossEntropyLoss(), model.parameters(), data)
    H @ np.ones(H.shape[0])
    counter = torch._dynamo.testing.CompileCounter()
    torch.compile(model.head, backend=counter)(torch.ones(2, 3).double())
    assert counter.frame_count == 1


def test_a_scripted_model_is_refused(data):
    with pytest.warns((DeprecationWarning, FutureWarning), match="deprecated"):
        model = torch.jit.trace(mlp(4, 3, 3), data[0][0])
    with pytest.raises(TypeError, match=r"The model is a TorchScript module.*traced"):
        HessianLinearOperator(model, nn.CrossEntropyLoss(), model.parameters(), data)


def test_a_scripted_part_without_parameters_of_the_operator(data):
    with pytest.warns((DeprecationWarning, FutureWarning), match="deprecated"):
        body = torch.jit.trace(mlp(4, 3), data[0][0])
    model = nn.Sequential(body, nn.Tanh(), nn.Linear(3, 3).double())
    agrees(model, model[2].parameters(), data)


def test_a_dict_for_a_model_that_takes_keywords(data):
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3).double()

        def forward(self, values, mask=None):
            return self.linear(values.clone())

    model = Keywords()
    batches = [({"values": X, "mask": None}, y) for X, y in data]
    with pytest.raises(TypeError, match=r"entries values, mask.*Wrap it.*model\(\*\*X\)"):
        HessianLinearOperator(model, nn.CrossEntropyLoss(), model.parameters(), batches)


class Branches(Body):
    """Control flow on tensors, which torch itself differentiates once."""

    def forward(self, X):
        hidden = self.a(X)
        hidden = torch.cond(
            hidden.sum() > -99, lambda x: torch.tanh(x) * self.b.bias, torch.sin, (hidden,)
        )
        steps = (torch.tensor(0), hidden)
        loop = torch.ops.higher_order.while_loop
        _, hidden = loop(lambda i, _: i < 2, lambda i, x: (i + 1, x.sin()), steps, ())
        return self.b(hidden)


class Unbranched(Branches):
    def forward(self, X):
        return self.b(torch.sin(torch.sin(torch.tanh(self.a(X)) * self.b.bias)))


@pytest.mark.parametrize("check", [False, True])
def test_branches_and_loops(data, check):
    model, plain = Branches().double(), Unbranched().double()
    plain.a, plain.b = model.a, model.b
    agrees(model, model.parameters(), data, plain, check_deterministic=check)

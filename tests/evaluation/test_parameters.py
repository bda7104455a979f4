"""Where parameters may be: tied, shared, hidden, reached from elsewhere."""

from __future__ import annotations

import functools
import types
import weakref

import pytest
import torch
from torch import nn
from torchlinop import (
    HessianLinearOperator,
    JacobianLinearOperator,
)

from tests.evaluation.dense import CLOSE, Body, agrees, jacobian


class Tied(nn.Module):
    """A decoder that is the encoder's transpose, and a head."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(4, 3, bias=False)
        self.decoder = nn.Linear(4, 3, bias=False)
        self.decoder.weight = self.encoder.weight
        self.head = nn.Linear(3, 3)

    def forward(self, X):
        hidden = torch.tanh(self.encoder(X)) @ self.decoder.weight
        return self.head(torch.tanh(self.decoder(torch.tanh(hidden))))


@pytest.mark.parametrize("chosen", ["head", "all", "tied"])
def test_tied_weights(data, chosen):
    model = Tied().double()
    params = {
        "head": list(model.head.parameters()),
        "all": list(model.parameters()),
        "tied": [model.encoder.weight],
    }[chosen]
    agrees(model, params, data)


class Shared(nn.Module):
    """A module that is registered under two names."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 3)
        self.outer = nn.Sequential(self.inner, nn.Tanh())
        self.head = nn.Linear(3, 3)
        self.normal = nn.BatchNorm1d(3)
        self.outer.append(self.normal)

    def forward(self, X):
        return self.head(self.normal(self.outer(X) + self.inner(X)))


def test_a_module_under_two_names(data):
    model = Shared().double().eval()
    model.normal.running_mean += 0.3
    own = [(m, dict(m._parameters), dict(m._buffers)) for m in model.modules()]
    agrees(model, model.parameters(), data)
    agrees(model, model.inner.parameters(), data)
    for module, parameters, buffers in own:
        assert all(module._parameters[name] is p for name, p in parameters.items())
        assert all(module._buffers[name] is b for name, b in buffers.items())


class Hidden(nn.Module):
    """Layers that the module reaches on unusual ways."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 3), nn.Linear(3, 3)])
        self.pairs = [("first", self.layers[0])]  # in a plain list
        self.by_name = {"second": self.layers[1].forward}  # a bound method
        self.squash = lambda x: torch.tanh(x * self.scale)  # closes over the module
        self.finish = functools.partial(self._finish, self.layers[1].bias)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.layers[0].parent = [self]  # a cycle

    def _finish(self, bias, x):
        return x + bias.square()

    def forward(self, X):
        x = self.squash(self.pairs[0][1](X)) * self.layers[0].parent[0].scale
        return self.finish(self.by_name["second"](x))


def test_modules_in_containers_methods_and_closures(data):
    model = Hidden().double()
    agrees(model, model.parameters(), data)


OUTSIDE: dict[str, nn.Module] = {}


class Elsewhere(nn.Module):
    """Uses a layer of its own through a global variable."""

    def __init__(self):
        super().__init__()
        OUTSIDE["layer"] = self.layer = nn.Linear(4, 3)

    def forward(self, X):
        layer = OUTSIDE["layer"]
        return torch.stack([torch.tanh(layer(X)), X @ layer.weight.T]).sum(0)


def test_parameters_reached_through_a_global_variable(data):
    model = Elsewhere().double()
    agrees(model, model.parameters(), data)


class Slots(Body):
    __slots__ = ("__scale", "empty")

    def __init__(self):
        super().__init__()
        object.__setattr__(self, "_Slots__scale", [self.b.bias])

    def forward(self, X):
        return super().forward(X) * self.__scale[0]


class Proxy(Body):
    """A child that knows its parent, and another one that is gone."""

    def __init__(self):
        super().__init__()
        vars(self.b)["parent"] = weakref.proxy(self)
        self.gone = [weakref.proxy(nn.Linear(1, 1)), weakref.ref(nn.Linear(1, 1))]
        self.lives = [weakref.proxy(Body.forward), self.b]
        self.b.forward = types.MethodType(Proxy._head, self.b)

    @staticmethod
    def _head(b, X):
        return nn.Linear.forward(b, X) * b.parent.a.bias


class Attributed(Body):
    def __init__(self):
        super().__init__()
        self.b.weight.factor = 2.0

    def forward(self, X):
        return super().forward(X) * self.b.weight.factor


@pytest.mark.parametrize("kind", [Slots, Proxy, Attributed])
def test_unusual_attributes(data, kind):
    model = kind().double()
    agrees(model, model.parameters(), data)


def test_a_parent_outside_of_the_model(data):
    parent = nn.ModuleList([Body(), nn.Linear(3, 3)]).double()
    model = parent[0]
    vars(model)["parent"] = weakref.ref(parent)
    model.forward = lambda X: model.parent()[1](Body.forward(model, X))
    agrees(model, model.parameters(), data)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


def _kept(model):
    model.kept = model.b.bias.square()
    model.forward = lambda X: Body.forward(model, X) + model.kept
    return model


def _by_object(model):
    model.object = types.SimpleNamespace(bias=model.b.bias)
    model.forward = lambda X: Body.forward(model, X) + Square.apply(model.object.bias)
    return model


def _as_function(model):
    return lambda params, X: model(X)


@pytest.mark.parametrize("change", [_kept, _by_object, _as_function])
@pytest.mark.parametrize("check", [False, True])
def test_parameters_that_cannot_be_replaced(data, change, check):
    model = Body().double()
    params = dict(model.named_parameters())
    options = {"check_deterministic": check}
    changed = change(model)
    with pytest.raises(ValueError, match=r"depends on '.*' on a way on which no other"):
        HessianLinearOperator(
            changed, nn.CrossEntropyLoss(), params, data, **options
        ).to_dense()
    with pytest.raises(ValueError, match=r"depends on '.*' on a way on which no other"):
        JacobianLinearOperator(changed, params, data, **options).to_dense()


class Complex(nn.Module):
    """A spectral layer: complex weights behind a parameter of odd size."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.weight = nn.Parameter(torch.randn(3, 3, 2))
        self.linear = nn.Linear(4, 3)

    def forward(self, X):
        spectrum = torch.fft.rfft(torch.tanh(self.linear(X)) * self.scale, n=4)
        mixed = spectrum @ torch.view_as_complex(self.weight)
        return torch.fft.irfft(mixed, n=3)


def test_complex_weights_at_an_odd_place(data):
    model = Complex().double()
    agrees(model, model.parameters(), data)
    J = JacobianLinearOperator(model, list(model.parameters()), data)
    X = torch.cat([X for X, _ in data])
    dense = jacobian(model(X).reshape(-1), list(model.parameters()))
    torch.testing.assert_close(J.to_dense(), dense, **CLOSE)
    torch.testing.assert_close(J.T.to_dense(), dense.T, **CLOSE)

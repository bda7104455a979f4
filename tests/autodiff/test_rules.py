"""The differentiation rules: exact to third order, and really used."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchlinop import GGNLinearOperator, HessianLinearOperator
from torchlinop.autodiff.recording import recording
from torchlinop.autodiff.rules import SecondOrderRules, functions
from torchlinop.sources import protocol

from .differences import check


@pytest.fixture(autouse=True)
def _also_on_small_tensors(monkeypatch):
    monkeypatch.setattr(functions, "_SMALL", 0)


def _tensor(*shape):
    return torch.randn(*shape, dtype=torch.float64)


FUNCTIONS = {
    "gelu": (F.gelu, lambda: [_tensor(3, 4)]),
    "gelu, tanh": (lambda x: F.gelu(x, approximate="tanh"), lambda: [_tensor(3, 4)]),
    "silu": (F.silu, lambda: [_tensor(3, 4)]),
    "tanh": (torch.tanh, lambda: [_tensor(3, 4)]),
    "tanh, method": (lambda x: x.tanh(), lambda: [_tensor(3, 4)]),
    "sigmoid": (torch.sigmoid, lambda: [_tensor(3, 4)]),
    "layer norm": (
        lambda x, w, b: F.layer_norm(x, (5,), w, b),
        lambda: [_tensor(2, 3, 5), _tensor(5), _tensor(5)],
    ),
    "layer norm over two": (
        lambda x, w: F.layer_norm(x, (3, 5), w, eps=0.1),
        lambda: [_tensor(2, 3, 5), _tensor(3, 5)],
    ),
    "batch norm": (
        lambda x, w, b: F.batch_norm(
            x, torch.ones(3).double(), 2 * torch.ones(3).double(), w, b
        ),
        lambda: [_tensor(2, 3, 2, 2), _tensor(3), _tensor(3)],
    ),
    "conv1d": (
        lambda x, w: F.conv1d(x, w, stride=2, padding=1),
        lambda: [_tensor(2, 2, 5), _tensor(3, 2, 3)],
    ),
    "conv2d": (
        lambda x, w, b: F.conv2d(x, w, b, padding=(1, 0), dilation=(1, 2)),
        lambda: [_tensor(2, 2, 3, 5), _tensor(3, 2, 2, 2), _tensor(3)],
    ),
    "conv2d, groups": (
        lambda x, w, b: F.conv2d(x, w, b, groups=2),
        lambda: [_tensor(1, 4, 3, 3), _tensor(4, 2, 2, 2), _tensor(4)],
    ),
    "conv3d": (
        lambda x, w: F.conv3d(x, w),
        lambda: [_tensor(1, 1, 2, 3, 2), _tensor(2, 1, 2, 2, 1)],
    ),
}


@pytest.fixture(params=list(FUNCTIONS))
def function(request):
    return FUNCTIONS[request.param]


def _ruled(f):
    def call(*args):
        with SecondOrderRules():
            return f(*args)

    return call


def test_values_are_those_of_torch(function):
    f, make = function
    inputs = [x.requires_grad_() for x in make()]
    torch.testing.assert_close(_ruled(f)(*inputs), f(*inputs), rtol=1e-14, atol=1e-14)


def _graph(output):
    """Names of the nodes behind ``output``."""
    seen, stack = set(), [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack.extend(n for n, _ in node.next_functions)
    return {type(node).__name__ for node in seen}


def test_rule_is_used(function):
    f, make = function
    names = _graph(_ruled(f)(*[x.requires_grad_() for x in make()]))
    native = {"GeluBackward0", "SiluBackward0", "TanhBackward0", "SigmoidBackward0"}
    native |= {"NativeLayerNormBackward0", "NativeBatchNormBackward0"}
    assert not any(name in native or name.startswith("Convolution") for name in names)


def test_derivatives(function):
    f, make = function
    with SecondOrderRules():
        check(f, make())


NETWORKS = {
    "convolutions": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.GELU(),
        nn.Conv2d(4, 2, 2, stride=2, bias=False),
        nn.SiLU(),
        nn.Flatten(),
        nn.LayerNorm(8),
        nn.Linear(8, 3),
    ),
    "sequences": lambda: nn.Sequential(
        nn.Flatten(1, 2),
        nn.Conv1d(8, 3, 2),
        nn.Tanh(),
        nn.LayerNorm((3, 3)),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(9, 3),
    ),
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("operator", [HessianLinearOperator, GGNLinearOperator])
def test_operators_with_rules_equal_those_without(network, operator, monkeypatch):
    model = NETWORKS[network]().double()
    model(_tensor(20, 2, 4, 4))
    model.eval()
    data = [(_tensor(5, 2, 4, 4), torch.randint(3, (5,)))]
    arguments = (model, nn.CrossEntropyLoss(), list(model.parameters()), data)
    products, used = {}, []
    X = _tensor(sum(p.numel() for p in model.parameters()), 6)

    def spying(device, *, rules=True, **options):
        used.append(rules)
        return recording(device, rules=rules and with_rules, **options)

    monkeypatch.setattr(protocol, "recording", spying)
    for with_rules in (True, False):
        A = operator(*arguments)
        one_by_one = torch.stack([A @ x for x in X.T], dim=1)  # replayed at the end
        products[with_rules] = torch.cat([A @ X, one_by_one])
    torch.testing.assert_close(products[True], products[False], rtol=1e-10, atol=1e-12)
    assert used == [True, True]  # and not silently given up


@pytest.mark.parametrize("recurrent", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_networks(recurrent):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = recurrent(2, 3, batch_first=True), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.body(x)[0][:, -1])

    model = Model().double()
    X, y = _tensor(4, 3, 2), torch.randint(2, (4,))
    params = list(model.parameters())
    H = HessianLinearOperator(model, nn.CrossEntropyLoss(), params, [(X, y)])
    loss = nn.CrossEntropyLoss()(model(X), y)
    gradient = torch.autograd.grad(loss, params, create_graph=True)
    v = _tensor(H.shape[0])
    parts = torch.autograd.grad(gradient, params, H.space.split(v))
    expected = H.space.join(parts)
    for _ in range(5):
        torch.testing.assert_close(H @ v, expected, rtol=1e-10, atol=1e-12)


def test_recurrent_networks_are_unrolled():
    x = torch.randn(4, 1, 2)
    for recurrent in (nn.LSTM, nn.GRU, nn.RNN):
        names = _graph(_ruled(recurrent(2, 3))(x)[0])
        assert not any("mkldnn" in name.lower() or "rnn" in name.lower() for name in names)


def test_fused_attention_falls_back():
    model = nn.TransformerEncoderLayer(
        8, 2, 16, dropout=0.0, batch_first=True, activation="gelu"
    ).double()
    data = [(_tensor(2, 3, 8), _tensor(2, 3, 8))]
    params = list(model.parameters())
    arguments = (model, nn.MSELoss(), params, data)
    for mode in (model.train, model.eval):
        mode()
        H, G = HessianLinearOperator(*arguments), GGNLinearOperator(*arguments)
        X = _tensor(H.shape[0], 3)
        for A in (H, G):
            assert abs(X[:, 0] @ (A @ X[:, 1]) - X[:, 1] @ (A @ X[:, 0])) < 1e-12
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            loss = nn.MSELoss()(model(data[0][0]), data[0][1])
            gradient = torch.autograd.grad(loss, params, create_graph=True)
            v = X[:, 0].contiguous()
            parts = torch.autograd.grad(gradient, params, H.space.split(v))
        torch.testing.assert_close(H @ v, H.space.join(parts), rtol=1e-10, atol=1e-12)

"""Products of which nothing is kept: what kept linearizations give, and less memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torchlinop import (
    EFLinearOperator,
    FisherMCLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
)
from torchlinop.autodiff import experience
from torchlinop.curvature import single_use

from tests.problems import binary, classification, regression

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
MATRICES = [
    HessianLinearOperator,
    GGNLinearOperator,
    FisherMCLinearOperator,
    EFLinearOperator,
    JacobianLinearOperator,
    lambda *args, **options: JacobianLinearOperator(*args, **options).T,
]


def both(kind, model, loss, params, data, **options):
    """The same matrix, kept and not."""
    losses = () if kind in MATRICES[4:] else (loss,)
    return (
        kind(model, *losses, params, data, cache=cache, **options)
        for cache in (True, False)
    )


@pytest.mark.parametrize("problem", [classification, regression, binary])
@pytest.mark.parametrize("kind", MATRICES)
def test_equals_what_is_kept(kind, problem):
    kept, passing = both(kind, *problem().arguments)
    for _ in range(3):  # the first one is another way than the later ones
        v = torch.randn(kept.shape[1], dtype=torch.float64)
        torch.testing.assert_close(passing @ v, kept @ v, **CLOSE)
    V = torch.randn(kept.shape[1], 5, dtype=torch.float64)
    torch.testing.assert_close(passing @ V, kept @ V, **CLOSE)
    assert getattr(passing, "_jacobian", passing)._maps.nbytes == 0


def test_when_the_rest_does_not_fit():
    problem = classification()
    for kind in (HessianLinearOperator, GGNLinearOperator):
        whole = kind(*problem.arguments)
        expected = whole.to_dense()
        A = kind(*problem.arguments, memory_budget=0.7 * whole._maps.nbytes)
        for _ in range(3):
            v = torch.randn(A.shape[1], dtype=torch.float64)
            torch.testing.assert_close(A @ v, expected @ v, **CLOSE)
        assert 0 < A._maps.nbytes < whole._maps.nbytes


class _Silent(torch.autograd.Function):
    """Without forward mode."""

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


class _WrongJvp(_Silent):
    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx, t):
        return 2 * t


class _Hooked(nn.Module):
    """With a gradient that is another one than the derivative."""

    def forward(self, x):
        x = x * 1
        if x.requires_grad:
            x.register_hook(lambda g: 3 * g)
        return x


class _Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function.apply(x)


@pytest.mark.parametrize(
    "layer", [_Calls(_Silent), _Calls(_WrongJvp), _Hooked()], ids=["none", "wrong", "hook"]
)
@pytest.mark.parametrize("check", [True, False])
def test_forward_mode_only_where_it_agrees(layer, check):
    model, loss, params, data = classification()
    model = nn.Sequential(model, layer, nn.Linear(3, 3).double())
    kept, passing = both(
        GGNLinearOperator, model, loss, params, data, check_derivatives=check
    )
    for _ in range(3):
        v = torch.randn(kept.shape[1], dtype=torch.float64)
        torch.testing.assert_close(passing @ v, kept @ v, **CLOSE)


@pytest.mark.parametrize("options", [{"padding_idx": 1}, {"scale_grad_by_freq": True}])
def test_embeddings_whose_gradient_is_no_derivative(options):
    """Padding comes up in the second batch only: the first comparison does not see it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3, **options), nn.Flatten(), nn.Linear(6, 3))
    model = model.double()
    X = torch.tensor([[0, 2], [3, 3], [1, 4], [1, 1]])
    data = [(X[:2], torch.tensor([0, 1])), (X[2:], torch.tensor([2, 0]))]
    arguments = model, nn.CrossEntropyLoss(), list(model.parameters()), data
    kept, passing = both(GGNLinearOperator, *arguments)
    for _ in range(3):
        v = torch.randn(kept.shape[1], dtype=torch.float64)
        torch.testing.assert_close(passing @ v, kept @ v, **CLOSE)


def test_forward_mode_is_used(monkeypatch):
    used = []
    derivative = single_use.forward_derivative

    def counted(*args, **options):
        used.append(1)
        return derivative(*args, **options)

    monkeypatch.setattr(single_use, "forward_derivative", counted)
    model, loss, params, data = classification()
    G = GGNLinearOperator(model, loss, params, data, cache=False)
    for _ in range(3):
        G @ torch.ones(G.shape[1], dtype=torch.float64)
    # once for the comparison; then in each product, three batches each
    assert len(used) == 1 + 2 + 3 + 3


# --------------------------------------------------------------------------- memory

CLASSES, ROWS, WIDTH = 4096, 128, 8
#: one tensor of the logits' shape
LOGITS = CLASSES * ROWS * 4


def language_model():
    torch.manual_seed(0)
    body = nn.Embedding(CLASSES, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh()
    model = nn.Sequential(*body, nn.Linear(WIDTH, CLASSES, bias=False))
    tokens = torch.randint(CLASSES, (2, ROWS))
    params = list(model.parameters())
    return model, nn.CrossEntropyLoss(), params, [(tokens[0], tokens[1])]


def peak(function):
    """Most bytes of tensors that live at one time, beside those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    events = [
        e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"
    ]
    current = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()
        most = max(most, current)
    del result
    return most


@pytest.mark.parametrize("options", [{}, {"cache": False}], ids=["kept", "passing"])
@pytest.mark.parametrize("kind", [HessianLinearOperator, GGNLinearOperator])
def test_few_tensors_of_the_size_of_the_logits(kind, options, monkeypatch):
    monkeypatch.setattr(experience, "_EXPECTED", 10**9)  # a recording is among them
    A = kind(*language_model(), check_deterministic=False, **options)
    v = torch.randn(A.shape[1])
    peaks = []
    for _ in range(6):
        kept = A._maps.nbytes
        peaks.append((kept + peak(lambda: A @ v)) / LOGITS)
    assert A._maps.nbytes <= 2.5 * LOGITS
    assert max(peaks) <= 4.5

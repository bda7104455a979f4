"""Products of which nothing is kept: what kept linearizations give, and less memory."""

from __future__ import annotations

import gc
import random
import weakref

import numpy as np
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
    WrongDerivativeError,
)
from torchlinop.autodiff import columns, experience, sums, transposing
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


@pytest.mark.parametrize("kind", MATRICES)
@pytest.mark.parametrize("long", [1, transposing._LONG])
def test_no_columns(kind, long, monkeypatch):
    """From some length on columns are copied one by one, and there is none."""
    monkeypatch.setattr(transposing, "_LONG", long)
    for A in both(kind, *classification().arguments):
        assert (A @ np.ones((A.shape[1], 0))).shape == (A.shape[0], 0)


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


def test_one_evaluation_for_both_halves():
    model, loss, params, data = classification()
    evaluations = []
    model.register_forward_hook(lambda *_: evaluations.append(1))
    G = GGNLinearOperator(model, loss, params, data, cache=False)
    v = torch.ones(G.shape[1], dtype=torch.float64)
    G @ v
    before = len(evaluations)
    G @ v
    assert len(evaluations) - before == len(data)


@pytest.mark.parametrize("options", [{}, {"cache": False}], ids=["kept", "passing"])
@pytest.mark.parametrize("copied", [1, 400])
def test_long_columns_are_copied_one_by_one(options, copied, monkeypatch):
    kind = GGNLinearOperator
    expected = kind(*classification().arguments).to_dense()
    monkeypatch.setattr(transposing, "_LONG", 1)
    for module in (columns, sums):
        monkeypatch.setattr(module, "COPIED", copied * 8)
    A = kind(*classification().arguments, **options)
    for _ in range(3):
        torch.testing.assert_close(A.to_dense(), expected, **CLOSE)


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
    monkeypatch.setattr(experience, "_EXPECTED", 0)  # a recording takes one more of them
    A = kind(*language_model(), check_deterministic=False, **options)
    v = torch.randn(A.shape[1])
    peaks = []
    for _ in range(6):
        kept = A._maps.nbytes
        peaks.append((kept + peak(lambda: A @ v)) / LOGITS)
    assert A._maps.nbytes <= 2.5 * LOGITS
    assert max(peaks) <= 4.5


# ------------------------------------------------------- what a second reader has found


class _StopsGradients(nn.Module):
    """On short batches only: the first comparison does not see it."""

    def __init__(self, inner, times=1.0):
        super().__init__()
        self.inner, self.times = inner, times

    def forward(self, x):
        with torch.set_grad_enabled(len(x) >= 4):
            constant = self.times * self.inner(x)
        return x[:, :3] + constant


@pytest.mark.parametrize("kind", [GGNLinearOperator, JacobianLinearOperator])
def test_models_that_turn_gradients_off(kind):
    """Forward mode alone would differentiate what reverse mode takes for a constant."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), _StopsGradients(nn.Linear(4, 3))).double()
    _, loss, _, data = classification()
    losses = () if kind is JacobianLinearOperator else (loss,)
    params = list(model.parameters())
    kept = kind(model, *losses, params, data)
    passing = kind(model, *losses, params, data, cache=False)
    n = kept.shape[1]
    for v in (torch.zeros(n), torch.eye(n)[-1], torch.randn(n), torch.randn(n)):
        torch.testing.assert_close(passing @ v.double(), kept @ v.double(), **CLOSE)
    assert torch._C._is_fwd_grad_enabled()


class _Late(nn.Module):
    """Calls a function without forward mode on short batches only."""

    def forward(self, x):
        return _Silent.apply(x) if len(x) < 4 else x.sin()


def test_a_later_batch_without_forward_mode():
    model, loss, params, data = classification()
    model = nn.Sequential(model, _Late())
    kept, passing = both(GGNLinearOperator, model, loss, params, data)
    for _ in range(3):
        v = torch.randn(kept.shape[1], dtype=torch.float64)
        torch.testing.assert_close(passing @ v, kept @ v, **CLOSE)


class _LateAndWrong(nn.Module):
    """Calls a function with another derivative in forward mode on short batches only."""

    def forward(self, x):
        return _WrongJvp.apply(x) if len(x) < 4 else x.sin()


def test_a_later_batch_with_another_forward_mode():
    model, loss, params, data = classification()
    model = nn.Sequential(model, _LateAndWrong())
    kept, passing = both(GGNLinearOperator, model, loss, params, data)
    for _ in range(3):
        v = torch.randn(kept.shape[1], dtype=torch.float64)
        torch.testing.assert_close(passing @ v, kept @ v, **CLOSE)


class _WrongBackward(_Silent):
    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0].cos()


@pytest.mark.parametrize("cache", ["auto", False])
def test_a_wrong_backward_is_noticed(cache):
    model, _, params, data = classification()
    model = nn.Sequential(model, _Calls(_WrongBackward))
    J = JacobianLinearOperator(model, params, data, cache=cache)
    with pytest.raises(WrongDerivativeError, match="_WrongBackward"):
        J.T @ torch.ones(J.shape[0], dtype=torch.float64)


class _Targets(torch.utils.data.Dataset):
    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.X = torch.randn(600, 4, generator=generator, dtype=torch.float64)
        self.y = torch.randint(3, (600,), generator=generator)

    def __len__(self):
        return 600

    def __getitem__(self, i):
        return self.X[i], self.y[i]


@pytest.mark.parametrize("kind", [HessianLinearOperator, GGNLinearOperator])
def test_another_normaliser_is_noticed(kind):
    data = _Targets()
    model, loss, params, _ = classification()
    loader = torch.utils.data.DataLoader(data, batch_size=600)
    A = kind(model, loss, params, loader, cache=False)
    v = torch.randn(A.shape[1], dtype=torch.float64)
    A @ v
    data.y[300:] = -100  # beyond the entries that are compared in each pass
    expected = kind(model, loss, params, [(data.X, data.y)]) @ v
    torch.testing.assert_close(A @ v, expected, **CLOSE)


def test_the_softmax_counts():
    for kind in (HessianLinearOperator, GGNLinearOperator):
        A = kind(*language_model(), check_deterministic=False)
        A @ torch.ones(A.shape[1])
        assert A._maps.nbytes >= LOGITS


def test_no_reference_cycle_keeps_a_replay():
    gc.collect()
    gc.disable()
    try:
        alive = []
        H = HessianLinearOperator(*classification().arguments)
        for _ in range(8):
            H @ torch.ones(H.shape[1], dtype=torch.float64)
        (rows,) = H._maps._kept.maps.values()
        assert rows._run is not rows._function
        alive = [weakref.ref(rows), weakref.ref(rows._run)]
        del rows
        H.refresh()
        assert [r() for r in alive] == [None, None]
    finally:
        gc.enable()


class _Draws(nn.Module):
    """Takes random numbers that change nothing, on short batches."""

    def forward(self, x):
        if len(x) < 4:
            np.random.rand()
            random.random()
        return x


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("kind", [HessianLinearOperator, GGNLinearOperator])
def test_random_states_are_those_from_before(kind, cache):
    model, loss, params, data = classification()
    A = kind(nn.Sequential(model, _Draws()).eval(), loss, params, data, cache=cache)
    before = random.getstate(), np.random.get_state()[1].tobytes(), np.random.get_state()[2]
    A @ np.ones(A.shape[1])
    after = random.getstate(), np.random.get_state()[1].tobytes(), np.random.get_state()[2]
    assert before == after


def test_what_was_learned_outlasts_a_step():
    problem = classification()
    H = HessianLinearOperator(*problem.arguments)
    for _ in range(5):
        H @ np.ones((H.shape[1], 3))
    H._maps.experience.limit = 1
    with torch.no_grad():
        problem.params[0].mul_(1.1)
    H @ np.ones(H.shape[1])
    assert H._maps.experience.limit == 1

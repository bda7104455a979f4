"""What a correction keeps of the function that it replaces, and where it applies."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import nn
from torch.autograd.functional import hessian
from torch.nn.attention import SDPBackend, bias, sdpa_kernel
from torchlinop import HessianLinearOperator
from torchlinop.autodiff.rules import Corrections, SecondOrderRules

from .corrected import CORRECTED
from .differences import made


def _tensor(*shape):
    return torch.randn(*shape, dtype=torch.float64)


# --------------------------------------------------------------------- transforms


@pytest.mark.parametrize("name", CORRECTED)
def test_vectorized_hessians(name):
    f, *inputs = CORRECTED[name]
    x, *rest = made(inputs)
    X = torch.stack([x, 0.9 * x + 0.02])

    def scalar(x):
        return f(x, *rest).sin().sum()

    with SecondOrderRules():
        H = torch.func.vmap(torch.func.hessian(scalar))(X)
        expected = torch.stack([hessian(scalar, x) for x in X])
    torch.testing.assert_close(H, expected, rtol=1e-10, atol=1e-10)


def _standardized(x, dims):
    x = x - x.mean(dims, keepdim=True)
    return x / (x.square().mean(dims, keepdim=True) + 1e-5).sqrt()


NORMS = {
    "layer": (lambda x: F.layer_norm(x, x.shape[1:]), (1, 2)),
    "instance": (F.instance_norm, (2,)),
    "batch": (lambda x: F.batch_norm(x, None, None, training=True), (0, 2)),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("by", ["autograd", "torch.func"])
def test_gradient_penalty_through_a_norm(norm, by):
    """The Hessian of a penalty is made of third derivatives."""
    norm, dims = NORMS[norm]
    x, mixed = _tensor(2, 2, 4), _tensor(3, 2)

    def penalty(W, norm):
        def critic(x):
            return norm(torch.einsum("oi,nil->nol", W, x)).sin().square().sum()

        if by == "torch.func":
            return torch.func.grad(critic)(x).square().sum()
        inputs = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(critic(inputs), inputs, create_graph=True)
        return gradient.square().sum()

    H = HessianLinearOperator.from_function(lambda W: penalty(W, norm), mixed)
    expected = hessian(lambda W: penalty(W, lambda y: _standardized(y, dims)), mixed)
    expected = expected.reshape(H.shape)
    torch.testing.assert_close(H @ torch.eye(6).double(), expected, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------ normalizations


@pytest.mark.parametrize("mode", [Corrections, SecondOrderRules])
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (nn.BatchNorm1d, (4, 3)),
        (nn.BatchNorm2d, (2, 3, 2, 2)),
        (nn.InstanceNorm1d, (2, 3, 4)),
    ],
)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics(mode, kind, shape, momentum):
    norms = [
        kind(3, momentum=momentum, track_running_stats=True).double() for _ in range(2)
    ]
    for _ in range(2):
        x = _tensor(*shape).requires_grad_()
        expected = norms[0](x)
        with mode():
            torch.testing.assert_close(norms[1](x), expected)
    for ours, torchs in zip(norms[1].buffers(), norms[0].buffers(), strict=True):
        torch.testing.assert_close(ours, torchs)


def test_what_torch_refuses_is_refused():
    x = _tensor(1, 3).requires_grad_()
    with Corrections():
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            F.batch_norm(x, None, None, training=True)
        with pytest.raises(ValueError, match="more than 1 spatial element"):
            F.instance_norm(x.unsqueeze(-1))
        with pytest.raises(RuntimeError, match="same number of columns"):
            torch.cdist(x, _tensor(2, 1), 3)
        with pytest.raises(ValueError, match="only p == 1 and p == 2"):
            F.multi_margin_loss(x, torch.tensor([0]), p=3)
        with pytest.raises(ValueError, match="mode has to be one of"):
            F.embedding_bag(torch.tensor([0]), x, torch.tensor([0]), mode="median")


# ----------------------------------------------------------------------- pointwise


def test_slopes_at_kinks_are_those_of_torch():
    x = torch.tensor([-4.0, -3, 0, 3, 4], requires_grad=True)
    slopes = [torch.autograd.grad(F.hardsigmoid(x).sum(), x)[0]]
    scores = torch.tensor([[0.5, 1.0, 0.0]], requires_grad=True)  # 1 - 1 + 0 is a kink
    for loss in (F.multi_margin_loss, F.multilabel_margin_loss):
        target = torch.tensor([1] if loss is F.multi_margin_loss else [[1, -1, 0]])
        for mode in (None, Corrections()):
            with mode or torch.enable_grad():
                slopes.append(torch.autograd.grad(loss(scores, target), scores)[0])
        torch.testing.assert_close(slopes.pop(), slopes.pop())
    with Corrections():
        assert torch.equal(torch.autograd.grad(F.hardsigmoid(x).sum(), x)[0], slopes[0])


def test_in_place_stays_in_place():
    leaf = _tensor(4, 5).requires_grad_()
    with Corrections():
        x = 3 * leaf
        y = nn.Hardsigmoid(inplace=True)(x)
        assert y is x
        torch.testing.assert_close(y, F.hardsigmoid(3 * leaf))
        columns = 3 * leaf
        F.hardsigmoid(columns[:, :2], inplace=True)
        torch.testing.assert_close(columns[:, 2:], 3 * leaf[:, 2:])
        torch.testing.assert_close(columns[:, :2], y[:, :2])
        with pytest.raises(RuntimeError, match="leaf Variable"):
            F.hardsigmoid(leaf, inplace=True)


# ----------------------------------------------------------------------- reductions


def test_distances_of_equal_points():
    """Where the distance has no derivative, torch takes zero; so do higher orders."""
    x = _tensor(3, 2).requires_grad_()
    with Corrections():
        distances = torch.cdist(x, x.detach()).square().sum()
        (gradient,) = torch.autograd.grad(distances, x, create_graph=True)
        (product,) = torch.autograd.grad(gradient.sum(), x)
    torch.testing.assert_close(product, torch.full_like(x, 4.0))


def test_scan_of_large_numbers():
    x = torch.tensor([-1e4, 0.0, 1e4, -float("inf"), 1e4], dtype=torch.float64)
    x.requires_grad_()
    expected = torch.logcumsumexp(x, 0)
    with Corrections():
        value = torch.logcumsumexp(x, 0)
    torch.testing.assert_close(value, expected)
    for y in (value, expected):
        (slopes,) = torch.autograd.grad(y[-1], x)
        torch.testing.assert_close(slopes, torch.tensor([0, 0, 0.5, 0, 0.5]).double())


# ------------------------------------------------------------------------ attention


VISIBLE = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 1]]).bool()  # a row sees nothing


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attn_mask": VISIBLE},
        {"attn_mask": VISIBLE.log()},
        {"is_causal": True, "scale": 0.2},
        {"dropout_p": 0.4},
        {"attn_mask": bias.causal_lower_right(3, 3)},
    ],
    ids=lambda options: ", ".join(options),
)
def test_attention_is_that_of_the_explicit_kernel(options):
    q, k, v = (torch.randn(2, 2, 3, 4, requires_grad=True) for _ in range(3))
    torch.manual_seed(0)
    with sdpa_kernel(SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(q, k, v, **options)
    torch.manual_seed(0)
    with Corrections():
        value = F.scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(value, expected)


# ------------------------------------------------------------------------ recurrent


@pytest.mark.parametrize("recurrent", [nn.LSTM, nn.GRU, nn.RNN])
def test_flags_are_restored_also_after_an_error(recurrent):
    flags = torch._C._get_cudnn_enabled(), torch._C._get_mkldnn_enabled()
    model = recurrent(2, 3)
    func = {nn.LSTM: torch.lstm, nn.GRU: torch.gru, nn.RNN: torch.rnn_tanh}[recurrent]
    with Corrections():
        model(torch.randn(4, 1, 2))
        assert (torch._C._get_cudnn_enabled(), torch._C._get_mkldnn_enabled()) == flags
        with pytest.raises(TypeError, match="received an invalid combination"):
            func(torch.randn(4, 1, 2), "state")
    assert (torch._C._get_cudnn_enabled(), torch._C._get_mkldnn_enabled()) == flags


def test_forward_mode_of_a_model_where_gradients_are_off():
    class Tangent(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 1, bias=False).double()

        def forward(self, x):
            with torch.no_grad(), forward_ad.dual_level():
                dual = forward_ad.make_dual(x, torch.ones_like(x))
                slope = forward_ad.unpack_dual(dual.sin()).tangent
            return self.linear(slope)

    x = _tensor(3, 2)
    model = Tangent()
    data = [(x, _tensor(3, 1))]
    H = HessianLinearOperator(model, nn.MSELoss(), model.parameters(), data)
    torch.testing.assert_close(H.to_dense(), 2 / 3 * x.cos().T @ x.cos())

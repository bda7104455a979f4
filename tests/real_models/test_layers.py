"""Architectures made of torch's own layers."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from tests.real_models.reference import Case, check, each, prepared

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supp")


def classifier(model, dtype, *shape, loss=None, **options):
    """Two uneven batches of numbers, and three classes."""
    data = [(torch.randn(n, *shape).to(dtype), torch.randint(3, (n,))) for n in (4, 3)]
    loss = nn.CrossEntropyLoss() if loss is None else loss
    return Case(prepared(model, dtype), loss, data, **options)


def regressor(model, dtype, *shape, target, **options):
    data = [
        (torch.randn(n, *shape).to(dtype), torch.randn(n, *target).to(dtype))
        for n in (3, 2)
    ]
    return Case(prepared(model, dtype), nn.MSELoss(), data, **options)


class Recurrent(nn.Module):
    """The last output of a recurrent network, and what is left in its state."""

    def __init__(self, kind, **options):
        super().__init__()
        self.core = kind(
            4, 3, num_layers=2, bidirectional=True, batch_first=True, **options
        )
        self.head = nn.LazyLinear(3)

    def forward(self, X):
        outputs, state = self.core(X)
        states = state if isinstance(state, tuple) else (state,)
        left = [s.transpose(0, 1).flatten(1) for s in states]
        return self.head(torch.cat([outputs[:, -1], *left], dim=1))


def recurrent(kind, dtype, **options):
    model = Recurrent(kind, **options)
    model(torch.zeros(2, 3, 4))
    return classifier(model, dtype, 3, 4)


def lstm(dtype):
    return recurrent(nn.LSTM, dtype)


def lstm_projected(dtype):
    return recurrent(nn.LSTM, dtype, proj_size=1)


def gru(dtype):
    return recurrent(nn.GRU, dtype)


class Padded(nn.Module):
    """Sequences of several lengths, packed."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 4, padding_idx=0)
        self.core = nn.GRU(4, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, X):
        lengths = (X != 0).sum(1)
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embedding(X), lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        return self.head(self.core(packed)[1][0])


def gru_packed(dtype):
    data = []
    for n in (4, 3):
        X = torch.randint(1, 20, (n, 6))
        for row in range(n):
            X[row, 2 + row :] = 0
        data.append((X, torch.randint(3, (n,))))
    return Case(prepared(Padded(), dtype), nn.CrossEntropyLoss(), data)


class Encoder(nn.Module):
    """Sequences of tokens, some padded."""

    def __init__(self, **options):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, X):
        padding = X == 0
        hidden = self.encoder(self.embedding(X), src_key_padding_mask=padding)
        return self.head(hidden.masked_fill(padding[..., None], 0).sum(1))


def encoder(dtype, **options):
    data = []
    for n in (3, 2):
        X = torch.randint(1, 20, (n, 5))
        X[0, -2:] = 0
        data.append((X, torch.randint(3, (n,))))
    return Case(prepared(Encoder(**options), dtype), nn.CrossEntropyLoss(), data)


def transformer_encoder(dtype):
    return encoder(dtype)


def transformer_encoder_gelu(dtype):
    return encoder(dtype, activation="gelu", norm_first=True)


class Attention(nn.Module):
    """Both what it attends to and what it finds there."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, kdim=4, vdim=4)
        self.query = nn.Parameter(torch.randn(3, 8))
        self.head = nn.Linear(13, 1)

    def forward(self, X):
        query = self.query.expand(len(X), -1, -1)
        found, weights = self.attention(query, X, X)
        return self.head(torch.cat([found, weights], dim=-1))[..., 0]


def attention(dtype):
    return classifier(Attention(), dtype, 5, 4)


def _convolutions(wrap):
    return nn.Sequential(
        wrap(nn.Conv1d(2, 4, 3)), nn.Tanh(), nn.Flatten(), wrap(nn.Linear(16, 3))
    )


def weight_norm(dtype):
    """Its second derivatives are wrong in torch 2.13."""
    model = _convolutions(parametrizations.weight_norm)
    return classifier(model, dtype, 2, 6, by_differences=True)


def weight_norm_by_hooks(dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is a newer one
        model = _convolutions(nn.utils.weight_norm)
    return classifier(model, dtype, 2, 6, by_differences=True)


def spectral_norm(dtype):
    return classifier(_convolutions(parametrizations.spectral_norm), dtype, 2, 6)


def spectral_norm_by_hooks(dtype):
    return classifier(_convolutions(nn.utils.spectral_norm), dtype, 2, 6)


def orthogonal(dtype):
    model = nn.Sequential(
        parametrizations.orthogonal(nn.Linear(4, 4)),
        nn.Tanh(),
        parametrizations.orthogonal(nn.Linear(4, 3), orthogonal_map="householder"),
    )
    return classifier(model, dtype, 4)


class FourierOperator(nn.Module):
    """A Fourier neural operator; complex weights are stored as pairs of real numbers.

    The scalar before them puts them at an odd place of a flat vector.
    """

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.lift = nn.Conv1d(1, 3, 1, bias=False)
        self.weight = nn.ParameterList([torch.randn(3, 3, 4, 2) / 3 for _ in range(2)])
        self.skip = nn.ModuleList(nn.Conv1d(3, 3, 1) for _ in range(2))
        self.drop = nn.Conv1d(3, 1, 1)

    def forward(self, X):
        hidden = self.lift(X) * self.scale
        for weight, skip in zip(self.weight, self.skip, strict=True):
            modes = torch.fft.rfft(hidden)[..., :4]
            mixed = torch.einsum("bix,iox->box", modes, torch.view_as_complex(weight))
            hidden = F.gelu(torch.fft.irfft(mixed, n=X.shape[-1]) + skip(hidden))
        return self.drop(hidden)


def fourier_operator(dtype):
    return regressor(FourierOperator(), dtype, 1, 12, target=(1, 12))


def embedding_with_a_largest_norm(dtype):
    """The forward pass writes into the weights; the second time it changes nothing."""
    model = nn.Sequential(nn.Embedding(10, 4, max_norm=0.5), nn.Flatten(), nn.Linear(12, 3))
    data = [(torch.randint(10, (n, 3)), torch.randint(3, (n,))) for n in (4, 3)]
    case = Case(prepared(model, dtype), nn.CrossEntropyLoss(), data)
    with torch.no_grad():
        for X, _ in data:
            model(X)
    return case


def embedding_bag(dtype):
    model = nn.Sequential(nn.EmbeddingBag(10, 4, mode="mean"), nn.Tanh(), nn.Linear(4, 3))
    data = [(torch.randint(10, (n, 3)), torch.randint(3, (n,))) for n in (4, 3)]
    return Case(prepared(model, dtype), nn.CrossEntropyLoss(), data, by_differences=True)


def normalizations(dtype):
    """The statistics of a sample, of groups, of its past, or of a whole layer."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding="same", padding_mode="circular"),
        nn.InstanceNorm2d(4, affine=True),
        nn.SiLU(),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.GroupNorm(2, 4),
        nn.PReLU(4),
        nn.InstanceNorm2d(4, track_running_stats=True),
        nn.LocalResponseNorm(2),
        nn.LayerNorm([4, 4, 4]),
        nn.Flatten(2),
        nn.RMSNorm(16),
        nn.Flatten(),
        nn.Linear(64, 3),
    )
    return classifier(model, dtype, 2, 6, 6)


class UNet(nn.Module):
    """Down, up, and across; one class per pixel."""

    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ELU()
        )
        self.deeper = nn.Sequential(
            nn.MaxPool2d(2), nn.Conv2d(3, 4, 3, padding=1), nn.Softplus()
        )
        self.deepest = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(4, 4, 1), nn.Tanh())
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.across = nn.Conv2d(8, 3, 3, padding=1, dilation=1)
        self.top = nn.Conv2d(6, 3, 1)

    def forward(self, X):
        first = self.down(X)
        second = self.deeper(first)
        third = self.up(self.deepest(second))
        joined = F.mish(self.across(torch.cat([second, third], dim=1)))
        large = F.interpolate(joined, scale_factor=2, mode="bilinear", align_corners=False)
        return self.top(torch.cat([first, large], dim=1))


def u_net(dtype):
    """Uneven numbers of pixels that count."""
    data = []
    for n in (2, 1):
        y = torch.randint(3, (n, 8, 8))
        y[0, :3] = 255
        data.append((torch.randn(n, 1, 8, 8).to(dtype), y))
    loss = nn.CrossEntropyLoss(ignore_index=255)
    return Case(prepared(UNet(), dtype), loss, data)


class QuadraticForm(torch.autograd.Function):
    """``b^T A^-1 b`` with its derivatives written by hand, as Gaussian processes do."""

    @staticmethod
    def forward(ctx, A, b):
        solution = torch.linalg.solve(A, b)
        ctx.save_for_backward(A, b)
        return (b * solution).sum()

    @staticmethod
    def backward(ctx, g):
        A, b = ctx.saved_tensors
        solution = torch.linalg.solve(A, b)
        return -g * torch.outer(solution, solution), 2 * g * solution


class MarginalLikelihood(nn.Module):
    """Of a Gaussian process on the features that a small network finds."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2))
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.log_noise = nn.Parameter(torch.zeros(()))

    def forward(self, X):
        inputs, values = X[..., :2], X[..., 2]
        features = self.features(inputs) * self.log_scale.exp()
        squared = (features[:, None] - features[None]).square().sum(-1)
        kernel = torch.exp(-0.5 * squared)
        kernel = kernel + self.log_noise.exp() * torch.eye(len(X), dtype=X.dtype)
        fit = QuadraticForm.apply(kernel, values)
        return (fit + torch.logdet(kernel) + len(X) * math.log(2 * math.pi))[None]


def marginal_likelihood(dtype):
    data = [(torch.randn(n, 3).to(dtype), torch.randn(1).to(dtype)) for n in (6, 4)]
    return Case(prepared(MarginalLikelihood(), dtype), nn.MSELoss(), data)


class Residual(nn.Module):
    """``u'' + u`` of a network ``u``: a Hessian takes fourth derivatives of its layers."""

    def __init__(self, *layers):
        super().__init__()
        self.u = nn.Sequential(nn.Linear(1, 6), *layers, nn.Linear(6, 1))

    def forward(self, X):
        X = X.detach().requires_grad_()
        u = self.u(X)
        (slope,) = torch.autograd.grad(u.sum(), X, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), X, create_graph=True)
        return curvature + u


def physics_informed(dtype):
    model = Residual(nn.Tanh(), nn.Linear(6, 6), nn.Tanh())
    return regressor(model, dtype, 1, target=(1,))


def physics_informed_gelu(dtype):
    model = Residual(nn.GELU(), nn.Linear(6, 6), nn.SiLU(), nn.Linear(6, 6), nn.Sigmoid())
    return regressor(model, dtype, 1, target=(1,))


class ExplicitLayerNorm(nn.LayerNorm):
    """Third derivatives of torch's own are wrong in torch 2.13."""

    def forward(self, X):
        centred = X - X.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        return centred / (variance + self.eps).sqrt() * self.weight + self.bias


def physics_informed_layer_norm(dtype):
    model = Residual(nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 6), nn.Tanh())
    case = regressor(model, dtype, 1, target=(1,))
    plain = copy.deepcopy(model)
    plain.u[2] = ExplicitLayerNorm(6)
    for mine, theirs in zip(plain.u, model.u, strict=True):
        mine._parameters = theirs._parameters
    return replace(case, plain=plain)


def smooth_activations(dtype):
    kinds = [nn.Softsign, nn.LogSigmoid, nn.SELU, nn.CELU, nn.Mish, nn.Tanhshrink]
    layers = [layer for kind in kinds for layer in (nn.Linear(4, 4), kind())]
    layers += [nn.GLU(), nn.Linear(2, 4), nn.Softmax(1), nn.Linear(4, 3)]
    return classifier(nn.Sequential(*layers), dtype, 4)


def piecewise_activations(dtype):
    """Some of which PyTorch differentiates only once."""
    kinds = [
        nn.Hardswish,
        nn.Hardsigmoid,
        nn.LeakyReLU,
        nn.Hardtanh,
        nn.Softshrink,
        nn.ReLU6,
    ]
    layers = [layer for kind in kinds for layer in (nn.Linear(6, 6), kind())]
    model = nn.Sequential(*layers, nn.Linear(6, 3))
    return classifier(model, dtype, 6, by_differences=True)


class Ode(nn.Module):
    """Four Runge-Kutta steps with one network."""

    def __init__(self):
        super().__init__()
        self.f = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, X):
        h = 0.25
        for _ in range(4):
            k1 = self.f(X)
            k2 = self.f(X + h / 2 * k1)
            k3 = self.f(X + h / 2 * k2)
            k4 = self.f(X + h * k3)
            X = X + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return X


def neural_ode(dtype):
    return classifier(Ode(), dtype, 3)


class OneModuleTwice(nn.Module):
    """Registered under two names, and used under both."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.outer = nn.Sequential(nn.Tanh(), self.inner)

    def forward(self, X):
        return self.inner(self.outer(X))


def one_module_twice(dtype):
    return classifier(OneModuleTwice(), dtype, 3)


CASES = [
    lstm,
    lstm_projected,
    gru,
    gru_packed,
    transformer_encoder,
    transformer_encoder_gelu,
    attention,
    weight_norm,
    weight_norm_by_hooks,
    spectral_norm,
    spectral_norm_by_hooks,
    orthogonal,
    fourier_operator,
    embedding_with_a_largest_norm,
    embedding_bag,
    normalizations,
    u_net,
    marginal_likelihood,
    physics_informed,
    physics_informed_gelu,
    physics_informed_layer_norm,
    smooth_activations,
    piecewise_activations,
    neural_ode,
    one_module_twice,
]


@each(CASES)
def test_hessian(build):
    check("Hessian", build)


@each(CASES)
def test_ggn(build):
    check("GGN", build)


@each([lstm, attention, fourier_operator, u_net, one_module_twice])
def test_jacobian(build):
    check("Jacobian", build)


@each([transformer_encoder, normalizations, u_net])
def test_float32(build):
    check("Hessian", build, torch.float32)
    check("GGN", build, torch.float32)

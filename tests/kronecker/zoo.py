"""Small models that use parameters in every way for which there is a rule."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

D = torch.float64


class Model(NamedTuple):
    model: Any
    loss: Any
    params: Any
    data: list

    @property
    def arguments(self) -> tuple:
        params = self.params
        return (
            self.model,
            self.loss,
            params if isinstance(params, dict) else [*params],
            self.data,
        )


def _of(model: nn.Module, loss: nn.Module, data: list) -> Model:
    model = model.to(D).eval()
    return Model(model, loss.to(D), list(model.parameters()), data)


def _labels(shape: tuple, classes: int = 3, *, sizes: tuple = (3, 2)) -> list:
    """Batches of inputs and labels."""
    return [(torch.randn(n, *shape, dtype=D), torch.randint(classes, (n,))) for n in sizes]


def mlp() -> Model:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3, bias=False))
    return _of(model, nn.CrossEntropyLoss(), _labels((3,)))


def weighted() -> Model:
    data = _labels((3,), sizes=(4, 1, 3))
    data[0][1][1] = -100
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0, 0.5]), label_smoothing=0.1)
    return _of(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), loss, data)


def binary() -> Model:
    data = [(torch.randn(n, 3, dtype=D), torch.randint(2, (n, 2)).to(D)) for n in (3, 2)]
    loss = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.0, 0.3]), reduction="sum")
    return _of(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), loss, data)


def convolutions() -> Model:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=(1, 2), groups=2),
        nn.Tanh(),
        nn.Conv2d(4, 3, 2, dilation=(1, 2), bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return _of(model, nn.CrossEntropyLoss(), _labels((2, 6, 5)))


def convolutions_in_place() -> Model:
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3, padding="same", padding_mode="circular"),
        nn.BatchNorm1d(4),
        nn.ReLU(inplace=True),
        nn.Conv1d(4, 4, 2, padding="same", dilation=3),
        nn.GroupNorm(2, 4),
        nn.Tanh(),
        nn.Unflatten(2, (5, 1, 1)),
        nn.Conv3d(4, 3, (2, 1, 1)),
        nn.Flatten(2),
    )
    model[1].running_mean.uniform_(-1, 1)
    model[1].running_var.uniform_(0.5, 2)
    for norm in (model[1], model[4]):
        nn.init.uniform_(norm.weight)
        nn.init.uniform_(norm.bias)
    data = [(torch.randn(n, 2, 5, dtype=D), torch.randint(3, (n, 4))) for n in (2, 1)]
    return _of(model, nn.CrossEntropyLoss(), data)


class _Tokens(nn.Module):
    """Embeddings that all samples share, attention, predictions for all tokens."""

    def __init__(self, *, first: bool) -> None:
        super().__init__()
        self.first = first
        self.token = nn.Embedding(5, 4, padding_idx=1)
        self.position = nn.Embedding(3, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=first)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position(torch.arange(3))
        if not self.first:
            x = x.transpose(0, 1)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        x = self.head(x)
        return (x if self.first else x.transpose(0, 1)).flatten(0, 1)


def _tokens(*, first: bool) -> Model:
    data = []
    for n in (3, 2):
        y = torch.randint(2, (3 * n,))
        y[0] = -100
        data.append((torch.randint(5, (n, 3)), y))
    return _of(_Tokens(first=first), nn.CrossEntropyLoss(), data)


def tokens() -> Model:
    return _tokens(first=True)


def tokens_second() -> Model:
    return _tokens(first=False)


class _Cross(nn.Module):
    """Attention to another sequence (rows of one weight), and a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x[:, :1], x, x)[0][:, 0])


def cross_attention() -> Model:
    return _of(_Cross(), nn.CrossEntropyLoss(), _labels((3, 4)))


class _OtherKeys(nn.Module):
    """Attention to keys and values of other sizes: a weight each, rows of one bias."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, kdim=3, vdim=2)
        nn.init.uniform_(self.attention.in_proj_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x[..., :3], x[..., :2])[0].mean(1)


def other_keys() -> Model:
    return _of(_OtherKeys(), nn.CrossEntropyLoss(), _labels((3, 4)))


class _Recurrent(nn.Module):
    """One cell used for every step, sequences first; a weight tied to the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(6, 3)
        self.out = nn.Linear(3, 3)
        self.again = nn.Linear(3, 3)
        self.again.weight = self.out.weight

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 3)
        for step in x.transpose(0, 1):
            h = self.cell(torch.cat([step, h], dim=-1)).tanh()
        return self.again(self.out(h).sin())


def recurrent() -> Model:
    return _of(_Recurrent(), nn.CrossEntropyLoss(), _labels((2, 3)))


class _TiedHead(nn.Module):
    """A language model whose head is its embedding, or again its transpose."""

    def __init__(self, *, transposed: bool) -> None:
        super().__init__()
        self.token = nn.Embedding(5, 4)
        self.inner = nn.Linear(4, 4)
        self.transposed = transposed

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.inner(self.token(tokens)).tanh()
        x = F.linear(x, self.token.weight)
        return (x if not self.transposed else x.sin() @ self.token.weight).flatten(0, 1)


def _tied(*, transposed: bool) -> Model:
    sizes, classes = (3, 2), 4 if transposed else 5
    data = [(torch.randint(5, (n, 3)), torch.randint(classes, (3 * n,))) for n in sizes]
    return _of(_TiedHead(transposed=transposed), nn.CrossEntropyLoss(), data)


def tied_head() -> Model:
    return _tied(transposed=False)


def tied_transposed() -> Model:
    return _tied(transposed=True)


def function() -> Model:
    """Products written in several ways."""
    shapes = {
        "A": (3, 4),
        "B": (4, 4),
        "C": (4, 4),
        "E": (3, 4),
        "b": (4,),
        "s": (4,),
        "c": (4,),
    }
    params = {n: torch.randn(s, dtype=D).requires_grad_() for n, s in shapes.items()}

    def predict(p: dict, x: Tensor) -> Tensor:
        h = (x @ p["A"] + p["b"]).tanh()
        h = torch.addmm(p["c"], h, p["B"].t()) * p["s"]
        h = (p["C"] @ h.unsqueeze(-1)).squeeze(-1).tanh()
        return (p["E"].matmul(h.T)).T

    return Model(predict, nn.CrossEntropyLoss(), params, _labels((3,)))


def general_loss() -> Model:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    data = [(torch.randn(n, 3, dtype=D), torch.rand(n, 2).to(D)) for n in (3, 2)]
    return _of(model, nn.PoissonNLLLoss(), data)


def one_number() -> Model:
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1), nn.Flatten(0))
    data = [(torch.randn(n, 3, dtype=D), torch.randn(n, dtype=D)) for n in (3, 2)]
    return _of(model, nn.MSELoss(), data)


class _Root(nn.Module):
    """Root-mean-square norm, as a function and written out."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.RMSNorm(4)
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(self.first(x)).tanh()
        h = self.scale * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-3))
        return self.last(F.gelu(h)).mean(1)


def root_mean_square() -> Model:
    return _of(_Root(), nn.CrossEntropyLoss(), _labels((2, 3)))


ZOO = {
    make.__name__: make
    for make in (
        mlp, weighted, binary, convolutions, convolutions_in_place, tokens, tokens_second,
        cross_attention, other_keys, recurrent, function, general_loss, one_number,
        root_mean_square, tied_head, tied_transposed,
    )
}  # fmt: skip

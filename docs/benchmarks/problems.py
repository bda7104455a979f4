"""The four problems of the benchmarks: a model, its data and its loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Problem = tuple[nn.Module, Tensor, Tensor]


def tiny_mlp() -> Problem:
    """64-32-10 with tanh, 128 samples: 2,410 parameters."""
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    return model, torch.rand(128, 64), torch.randint(10, (128,))


def mlp() -> Problem:
    """784-512-256-10 with ReLU, 256 samples: 535,818 parameters."""
    layers = [nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(256, 10))
    return model, torch.rand(256, 784), torch.randint(10, (256,))


class _ResidualBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False),
                nn.BatchNorm2d(channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def resnet20() -> Problem:
    """ResNet-20 for 32 x 32 images in evaluation mode, 32 samples: 272,474 parameters."""
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    blocks, width = [], 16
    for channels, stride in ((16, 1), (32, 2), (64, 2)):
        for i in range(3):
            blocks.append(_ResidualBlock(width, channels, stride if i == 0 else 1))
            width = channels
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    model = nn.Sequential(*stem, *blocks, *head)
    model(torch.rand(64, 3, 32, 32))  # running statistics other than the initial ones
    return model.eval(), torch.rand(32, 3, 32, 32), torch.randint(10, (32,))


def resnet18() -> Problem:
    """ResNet-18 for 32 x 32 images in evaluation mode, 128 samples, 11 million entries."""
    stem = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    blocks, width = [], 64
    for channels, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        for i in range(2):
            blocks.append(_ResidualBlock(width, channels, stride if i == 0 else 1))
            width = channels
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)]
    model = nn.Sequential(*stem, *blocks, *head)
    with torch.no_grad():
        model(torch.rand(16, 3, 32, 32))  # running statistics other than the initial ones
    return model.eval(), torch.rand(128, 3, 32, 32), torch.randint(10, (128,))


class _Attention(nn.Module):
    """Causal self-attention, written out: the peer cannot differentiate the fused one."""

    def __init__(self, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.register_buffer("mask", torch.ones(length, length).triu(1).bool())

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        shape = (batch, length, self.heads, width // self.heads)
        q, k, v = (t.view(shape).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        scores = (q @ k.transpose(-2, -1)) * shape[-1] ** -0.5
        weights = scores.masked_fill(self.mask, -torch.inf).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, length, width))


class _TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = _Attention(width, heads, length)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _GPT(nn.Module):
    def __init__(
        self, vocabulary: int, length: int, width: int, depth: int, heads: int = 4
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.Sequential(
            *(_TransformerBlock(width, heads, length) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        position = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token(tokens) + self.position(position)
        return self.head(self.norm(self.blocks(x))).flatten(0, 1)


def gpt() -> Problem:
    """4-layer, 128-wide GPT on 8 x 64 tokens, 65 letters: 818,176 parameters."""
    model = _GPT(vocabulary=65, length=64, width=128, depth=4).eval()
    return model, torch.randint(65, (8, 64)), torch.randint(65, (8 * 64,))


def gpt2() -> Problem:
    """GPT-2's size (12 layers, 768 wide) on 4 x 256 tokens: 162,447,360 parameters."""
    model = _GPT(vocabulary=50257, length=256, width=768, depth=12, heads=12).eval()
    return model, torch.randint(50257, (4, 256)), torch.randint(50257, (4 * 256,))


class _LSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(16, 32, num_layers=2, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0][:, -1])


def lstm() -> Problem:
    """2-layer, 32-wide LSTM on 16 sequences of 50 steps: 15,178 parameters."""
    return _LSTM(), torch.rand(16, 50, 16), torch.randint(10, (16,))


PROBLEMS = {"tiny MLP": tiny_mlp, "MLP": mlp, "ResNet-20": resnet20, "GPT": gpt}

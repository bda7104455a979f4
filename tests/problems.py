"""Small problems on which a dense matrix can be computed by other means."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Problem(NamedTuple):
    model: nn.Module
    loss: nn.Module
    params: list[Tensor]
    data: list[tuple[Tensor, Tensor]]

    @property
    def arguments(self) -> tuple:
        """What an operator's constructor takes."""
        return self.model, self.loss, self.params, self.data


def mlp(*sizes: int, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A tanh network."""
    layers: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(sizes):
        layers += [nn.Linear(n_in, n_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def classification(
    loss: nn.Module | None = None, dtype: torch.dtype = torch.float64, classes: int = 3
) -> Problem:
    """Three uneven batches for a 4-3-3 network (27 parameters)."""
    torch.manual_seed(1)
    model = mlp(4, 3, classes, dtype=dtype)
    data = [
        (torch.randn(n, 4, dtype=dtype), torch.randint(classes, (n,))) for n in (5, 3, 1)
    ]
    loss = nn.CrossEntropyLoss() if loss is None else loss
    return Problem(model, loss.to(dtype), list(model.parameters()), data)


def regression(
    loss: nn.Module | None = None, dtype: torch.dtype = torch.float64
) -> Problem:
    """Three uneven batches for a 3-4-2 network (26 parameters)."""
    torch.manual_seed(2)
    model = mlp(3, 4, 2, dtype=dtype)
    data = [
        (torch.randn(n, 3, dtype=dtype), torch.randn(n, 2, dtype=dtype)) for n in (4, 1, 3)
    ]
    loss = nn.MSELoss() if loss is None else loss
    return Problem(model, loss.to(dtype), list(model.parameters()), data)


def binary(loss: nn.Module | None = None, dtype: torch.dtype = torch.float64) -> Problem:
    """Three uneven batches of two binary labels."""
    torch.manual_seed(3)
    model = mlp(3, 4, 2, dtype=dtype)
    data = [
        (torch.randn(n, 3, dtype=dtype), torch.randint(2, (n, 2)).to(dtype))
        for n in (4, 2, 3)
    ]
    loss = nn.BCEWithLogitsLoss() if loss is None else loss
    return Problem(model, loss.to(dtype), list(model.parameters()), data)

"""Gradients of single samples by torch.func, one sample at a time."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torchlinop.reference import dense_gradient, dense_gradient_and_loss


def single_samples(data: list) -> list:
    """Cut batches into samples; a sample may have several targets."""
    cut = []
    for X, y in data:
        each = len(y) // len(X)
        cut += [
            (X[n : n + 1], y[each * n : each * (n + 1)] if each > 1 else y[n : n + 1])
            for n in range(len(X))
        ]
    return cut


def dense_gradients(model, loss, params, data) -> Tensor:
    """Rows are gradients of the summands of the risk, ``(N, P)``."""
    total = copy.copy(loss)
    total.reduction = "sum"
    normalizer = 1.0
    if loss.reduction == "mean":  # whatever torch divides by
        whole, mean = (
            dense_gradient_and_loss(model, f, params, data)[1] for f in (total, loss)
        )
        normalizer = (whole / mean).item()
    rows = [
        dense_gradient(model, total, params, [sample]) for sample in single_samples(data)
    ]
    return torch.stack(rows) / normalizer


def dense_moment(rows: Tensor, *, centred: bool) -> Tensor:
    """Moment of gradients ``N`` times the rows, straight from the definition."""
    g = len(rows) * rows
    if centred:
        g = g - g.mean(0)
    return sum(torch.outer(v, v) for v in g) / len(g)

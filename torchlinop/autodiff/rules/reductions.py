"""Distances and scans."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchlinop.autodiff.rules.functions import EXACT, Rules, is_differentiated

#: number of points from which on torch takes Euclidean distances from a matrix product
_MANY = 25


def _norm(x: Tensor, p: float) -> Tensor:
    """Norm along the last dimension; all its derivatives at the origin are zero."""
    is_zero = (x == 0).all(-1, keepdim=True)
    norm = torch.linalg.vector_norm(x.masked_fill(is_zero, 1.0), p, -1)
    return norm.masked_fill(is_zero.squeeze(-1), 0.0)


def _cdist(
    x1: Tensor,
    x2: Tensor,
    p: float = 2.0,
    compute_mode: str = "use_mm_for_euclid_dist_if_necessary",
) -> Any:
    if x1.dtype not in EXACT or not is_differentiated(x1, x2) or p == 0:
        return NotImplemented
    if x1.dtype != x2.dtype or min(x1.ndim, x2.ndim) < 2 or x1.shape[-1] != x2.shape[-1]:
        return NotImplemented
    if p == 2 and (
        compute_mode == "use_mm_for_euclid_dist"
        or (
            compute_mode == "use_mm_for_euclid_dist_if_necessary"
            and max(x1.shape[-2], x2.shape[-2]) > _MANY
        )
    ):
        return NotImplemented  # has all derivatives, and needs less memory
    return _norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p)


def _pdist(input: Tensor, p: float = 2.0) -> Any:
    if input.dtype not in EXACT or not is_differentiated(input) or p == 0:
        return NotImplemented
    if input.ndim != 2:
        return NotImplemented
    n = input.shape[0]
    first, second = torch.triu_indices(n, n, 1, device=input.device)
    return _norm(input[first] - input[second], p)


def _logcumsumexp(input: Tensor, dim: int, *, out: Tensor | None = None) -> Any:
    """Parallel scan: ``step`` entries are in a sum, then twice as many."""
    if input.dtype not in EXACT or not is_differentiated(input) or out is not None:
        return NotImplemented
    if input.ndim == 0:
        return NotImplemented
    y, step = input.movedim(dim, 0), 1
    while step < len(y):
        y = torch.cat([y[:step], torch.logaddexp(y[step:], y[:-step])])
        step *= 2
    return y.movedim(0, dim)


CORRECTIONS: Rules = {
    torch.cdist: _cdist,
    torch.pdist: _pdist,
    torch.logcumsumexp: _logcumsumexp,
    Tensor.logcumsumexp: _logcumsumexp,
}

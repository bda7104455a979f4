"""Weights as functions of other tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from torchlinop.autodiff.rules.functions import Rules


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``g v / |v|``; the norm over all dimensions but ``dim``, or all for -1."""
    if dim == -1:
        return v * (g / v.square().sum().sqrt())
    others = [d for d in range(v.ndim) if d != dim]
    return v * (g / v.square().sum(others, keepdim=True).sqrt())


CORRECTIONS: Rules = {torch._weight_norm: _weight_norm}

"""Embeddings with dense gradients, and bags of them that can be differentiated twice."""

from __future__ import annotations

from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

from torchlinop.autodiff.rules.functions import EXACT, Rules, is_differentiated


def _dense_embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,  # noqa: ARG001
) -> Tensor:
    """Never with sparse gradients, which cannot be differentiated.

    Forward mode passes over what makes the gradient another one than the derivative.
    """
    options = (padding_idx, max_norm, norm_type, scale_grad_by_freq, False)
    rows = F.embedding(input, weight, *options)
    if forward_ad._current_level < 0:
        return rows
    if scale_grad_by_freq:
        raise NotImplementedError("forward AD of embedding with scale_grad_by_freq")
    if padding_idx is not None:
        padding = input == padding_idx % weight.shape[0]
        rows = torch.where(padding.unsqueeze(-1), rows.detach(), rows)
    return rows


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,  # noqa: ARG001
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    """Look the rows up, then add or compare those of a bag."""
    if weight.dtype not in EXACT or not is_differentiated(weight, per_sample_weights):
        return NotImplemented
    if input.is_nested or (input.ndim == 1) == (offsets is None):
        return NotImplemented
    if mode not in ("sum", "mean", "max"):
        return NotImplemented
    if per_sample_weights is not None and (
        mode != "sum" or per_sample_weights.shape != input.shape
    ):
        return NotImplemented
    bags, num_bags = _bags(input, offsets, include_last_offset)
    index = input.reshape(-1)
    rows = F.embedding(
        index,
        weight,
        max_norm=max_norm,
        norm_type=norm_type,
        scale_grad_by_freq=scale_grad_by_freq,
    )
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.reshape(-1, 1)
    if padding_idx is not None:
        kept = index != padding_idx % weight.shape[0]
        rows, bags = rows[kept], bags[kept]
    out = rows.new_zeros(num_bags, rows.shape[1])
    if mode == "max":  # of an empty bag, zero
        index = bags.unsqueeze(1).expand_as(rows)
        return out.scatter_reduce(0, index, rows, "amax", include_self=False)
    out = out.index_add(0, bags, rows)
    if mode == "mean":
        out = out / torch.bincount(bags, minlength=num_bags).clamp(min=1).unsqueeze(1)
    return out


def _bags(
    input: Tensor, offsets: Tensor | None, include_last_offset: bool
) -> tuple[Tensor, int]:
    """The bag of each index, and how many bags there are."""
    positions = torch.arange(input.numel(), device=input.device)
    if offsets is None:
        return positions // max(input.shape[1], 1), input.shape[0]
    starts = offsets[:-1] if include_last_offset else offsets
    return torch.searchsorted(starts, positions, right=True) - 1, len(starts)


CORRECTIONS: Rules = {F.embedding: _dense_embedding, F.embedding_bag: _embedding_bag}

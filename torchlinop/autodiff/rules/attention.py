"""Attention by the explicit formula: the fused kernels have no second derivative."""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchlinop.autodiff.rules.functions import Rules, is_differentiated


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if query.is_nested or not is_differentiated(query, key, value, attn_mask):
        return NotImplemented
    if type(attn_mask).__name__ == "CausalBias":  # whose module is slow to import
        attn_mask = attn_mask._materialize(query.device)  # type: ignore[union-attr]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        hidden = attn_mask.logical_not()
        attn_mask = query.new_zeros(hidden.shape).masked_fill(hidden, float("-inf"))
    return torch.ops.aten._scaled_dot_product_attention_math(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )[0]


def _attention_or_fused(*args: Any, **kwargs: Any) -> Tensor:
    result = _attention(*args, **kwargs)
    if result is NotImplemented:
        return F.scaled_dot_product_attention(*args, **kwargs)
    return result


def _multi_head_attention_forward(*args: Any, **kwargs: Any) -> Any:
    """Run torch's own code with another attention.

    A mode does not see what a function that it has let pass calls in turn.
    """
    torchs = F.multi_head_attention_forward
    names = {**vars(F), "scaled_dot_product_attention": _attention_or_fused}
    return FunctionType(torchs.__code__, names, argdefs=torchs.__defaults__)(
        *args, **kwargs
    )


CORRECTIONS: Rules = {
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head_attention_forward,
}

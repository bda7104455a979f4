"""Layer, batch and instance norm: the statistics are those of the input or kept ones.

Third derivatives through statistics of the input are wrong in torch 2.13.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from torchlinop.autodiff.rules.functions import (
    EXACT,
    Rules,
    call,
    in_transform,
    is_differentiated,
    note_tensors,
    wanted,
)


class _Normalize(Function):
    r"""Rows to zero mean and unit variance: :math:`\hat x = (x - \mu) r`, and ``r``."""

    @staticmethod
    def forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y, _, rstd = torch.native_layer_norm(x, [x.shape[-1]], None, None, eps)
        return y, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output)

    @staticmethod
    def backward(ctx: Any, gy: Tensor | None, gr: Tensor | None) -> tuple:
        xhat, rstd = ctx.saved_tensors
        gx = None if gy is None else call(_NormalizeBackward, gy, xhat, rstd)
        if gr is not None:  # dr = -r^2 mean(xhat dx)
            term = (rstd * rstd * gr / -xhat.shape[-1]) * xhat
            gx = term if gx is None else gx + term
        return gx, None


class _NormalizeBackward(Function):
    r""":math:`P g = r (g - \bar g - \hat x\,\overline{\hat x g})`."""

    @staticmethod
    def forward(g: Tensor, xhat: Tensor, rstd: Tensor) -> Tensor:
        centred = g - g.mean(-1, keepdim=True)
        along = (xhat * g).mean(-1, keepdim=True)
        return torch.addcmul(centred, xhat, along, value=-1) * rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        note_tensors(ctx, inputs)
        g, xhat, rstd = inputs
        ctx.save_for_backward(g, xhat, rstd, output)

    @staticmethod
    def backward(ctx: Any, gg: Tensor) -> tuple:
        g, xhat, rstd, output = ctx.saved_tensors
        want_g, want_xhat, want_rstd = wanted(ctx)
        bar_g = bar_xhat = bar_rstd = None
        if want_g:
            bar_g = call(_NormalizeBackward, gg, xhat, rstd)
        if want_xhat:
            a = (xhat * gg).mean(-1, keepdim=True) * rstd
            b = (xhat * g).mean(-1, keepdim=True) * rstd
            bar_xhat = torch.addcmul(-(a * g), b, gg, value=-1)
        if want_rstd:
            bar_rstd = (gg * output).sum(-1, keepdim=True) / rstd
        return bar_g, bar_xhat, bar_rstd


class _LayerNorm(Function):
    """Torch's own kernels for the value and the first derivative; exact further ones."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        shape: tuple[int, ...],
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.native_layer_norm(x, shape, weight, bias, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        note_tensors(ctx, inputs)
        *tensors, ctx.shape, ctx.eps = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output[1:])

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: None) -> tuple:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        wants = wanted(ctx)[:3]
        if g is None or not any(wants):
            return (None,) * 5
        if not torch.is_grad_enabled():
            parts = torch.ops.aten.native_layer_norm_backward(
                g, x, ctx.shape, mean, rstd, weight, bias, wants
            )
            return *parts, None, None
        y = _layer_norm(x, list(ctx.shape), weight, bias, ctx.eps)
        pairs = zip((x, weight, bias), wants, strict=True)
        chosen = [tensor for tensor, wants_it in pairs if wants_it]
        found = iter(torch.autograd.grad(y, chosen, g, create_graph=True))
        return *(next(found) if wants_it else None for wants_it in wants), None, None


def _standardized(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    x = x - x.mean(dims, keepdim=True)
    return x * torch.rsqrt(x.square().mean(dims, keepdim=True) + eps)


def _scaled(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _scaled_channels(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    shape = [1, -1] + [1] * (y.ndim - 2)
    return _scaled(y, *(None if t is None else t.view(shape) for t in (weight, bias)))


def _is_covered(input: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether layer norm over dimensions of this shape is all right, and exact."""
    return input.dtype in EXACT and input.shape[-len(shape) :] == shape


def _layer_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    shape = tuple(normalized_shape)
    if not (is_differentiated(input) and _is_covered(input, shape)):
        return NotImplemented
    return _scaled(_standardized(input, tuple(range(-len(shape), 0)), eps), weight, bias)


def _layer_norm_by_rows(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    shape = tuple(normalized_shape)
    if not (input.requires_grad and _is_covered(input, shape)):
        return NotImplemented
    rows = input if len(shape) == 1 else input.flatten(-len(shape))
    return _scaled(_Normalize.apply(rows, eps)[0].view(input.shape), weight, bias)


def _layer_norm_once(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    shape = tuple(normalized_shape)
    if in_transform() or forward_ad._current_level >= 0 or not _is_covered(input, shape):
        return NotImplemented
    if not any(t is not None and t.requires_grad for t in (input, weight, bias)):
        return NotImplemented
    return _LayerNorm.apply(input, weight, bias, shape, eps)[0]


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if not is_differentiated(input) or input.dtype not in EXACT:
        return NotImplemented
    if not use_input_stats or input.ndim < 3:
        return NotImplemented
    with torch.no_grad():  # checks the arguments, updates the running statistics
        F.instance_norm(input, running_mean, running_var, weight, bias, True, momentum, eps)
    y = _standardized(input, tuple(range(2, input.ndim)), eps)
    return _scaled_channels(y, weight, bias)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if not is_differentiated(input) or input.dtype not in EXACT:
        return NotImplemented
    if not training or input.ndim < 2:
        return NotImplemented
    with torch.no_grad():  # checks the arguments, updates the running statistics
        F.batch_norm(input, running_mean, running_var, weight, bias, True, momentum, eps)
    y = _standardized(input, (0, *range(2, input.ndim)), eps)
    return _scaled_channels(y, weight, bias)


def _batch_norm_or_affine(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if training:
        return _batch_norm(
            input, running_mean, running_var, weight, bias, training, momentum, eps
        )
    if running_mean is None or running_var is None or input.ndim < 2:
        return NotImplemented
    if input.dtype != running_mean.dtype:
        return NotImplemented
    scale = torch.rsqrt(running_var + eps)
    scale = scale if weight is None else scale * weight
    shift = -running_mean * scale
    shift = shift if bias is None else shift + bias
    per_channel = [1, -1] + [1] * (input.ndim - 2)
    # rounded once: ReLUs that follow depend on which side of zero it falls
    return torch.addcmul(shift.view(per_channel), input, scale.view(per_channel))


CORRECTIONS: Rules = {
    F.layer_norm: _layer_norm,
    F.instance_norm: _instance_norm,
    F.batch_norm: _batch_norm,
}
RULES: Rules = {F.layer_norm: _layer_norm_by_rows, F.batch_norm: _batch_norm_or_affine}
#: where the first derivative is wanted, and further ones only by the model itself
FIRST: Rules = {F.layer_norm: _layer_norm_once, F.batch_norm: _batch_norm_or_affine}

"""Convolutions: derivatives of their gradients by the library's own backward kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from torchlinop.autodiff.rules.functions import Rules, call, note_tensors, wanted

#: stride, padding, dilation, transposed, output padding, groups
_ConvolutionConfig = tuple[list[int], list[int], list[int], bool, list[int], int]


def _convolution_backward(
    g: Tensor, x: Tensor, w: Tensor, config: _ConvolutionConfig, mask: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return torch.ops.aten.convolution_backward(g, x, w, None, *config, mask)


class _Convolution(Function):
    @staticmethod
    def forward(
        x: Tensor, w: Tensor, b: Tensor | None, config: _ConvolutionConfig
    ) -> Tensor:
        return torch.convolution(x, w, b, *config)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        note_tensors(ctx, inputs)
        x, w, _, ctx.config = inputs
        ctx.save_for_backward(x, w)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        x, w = ctx.saved_tensors
        want_x, want_w, want_b, _ = wanted(ctx)
        gx = gw = None
        if want_x or want_w:
            gx, gw = call(_ConvolutionBackward, g, x, w, ctx.config, want_x, want_w)
        gb = g.sum((0, *range(2, g.ndim))) if want_b else None
        return gx, gw, gb, None


class _ConvolutionBackward(Function):
    """Both gradients of a convolution, each bilinear in two of ``g, x, w``."""

    @staticmethod
    def forward(
        g: Tensor,
        x: Tensor,
        w: Tensor,
        config: _ConvolutionConfig,
        want_x: bool,
        want_w: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        mask = [want_x, want_w, False]
        gx, gw, _ = _convolution_backward(g, x, w, config, mask)
        return gx if want_x else None, gw if want_w else None

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        note_tensors(ctx, inputs)
        g, x, w, ctx.config, *_ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, x, w)

    @staticmethod
    def backward(ctx: Any, ggx: Tensor | None, ggw: Tensor | None) -> tuple:
        g, x, w = ctx.saved_tensors
        config = ctx.config
        want_g, want_x, want_w, *_ = wanted(ctx)
        bar_g = bar_x = bar_w = None
        if want_g and ggx is not None:
            bar_g = call(_Convolution, ggx, w, None, config)
        if want_g and ggw is not None:
            term = call(_Convolution, x, ggw, None, config)
            bar_g = term if bar_g is None else bar_g + term
        if want_x and ggw is not None:
            bar_x = call(_ConvolutionBackward, g, x, ggw, config, True, False)[0]
        if want_w and ggx is not None:
            bar_w = call(_ConvolutionBackward, g, ggx, w, config, False, True)[1]
        return bar_g, bar_x, bar_w, None, None, None


def _convolution_rule(dim: int) -> Callable:
    def per_axis(value: int | tuple[int, ...]) -> list[int]:
        values = [value] if isinstance(value, int) else list(value)
        return values * dim if len(values) == 1 else values

    def rule(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
    ) -> Any:
        if isinstance(padding, str) or input.ndim != dim + 2:
            return NotImplemented
        differentiable = input.requires_grad or weight.requires_grad
        if not differentiable or not input.is_floating_point():
            return NotImplemented
        if input.dtype != weight.dtype:
            return NotImplemented
        axes = [per_axis(value) for value in (stride, padding, dilation)]
        config = (*axes, False, [0] * dim, groups)
        return _Convolution.apply(input, weight, bias, config)

    return rule


RULES: Rules = {
    F.conv1d: _convolution_rule(1),
    F.conv2d: _convolution_rule(2),
    F.conv3d: _convolution_rule(3),
}

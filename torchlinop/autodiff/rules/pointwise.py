"""Activations: slopes and curvatures that are computed once and kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from torchlinop.autodiff.rules.functions import (
    Rules,
    call,
    is_differentiated,
    is_worth_a_function,
    note_tensors,
    wanted,
)


class _Pointwise(Function):
    """``f(x)`` with its slope kept for the backward pass."""

    @staticmethod
    def forward(x: Tensor, kind: _Kind) -> tuple[Tensor, Tensor]:
        return kind.value(x), kind.slope(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        x, ctx.kind = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, output[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Any) -> tuple:
        x, slope = ctx.saved_tensors
        return call(_PointwiseBackward, g, x, slope, ctx.kind), None


class _PointwiseBackward(Function):
    """``g f'(x)`` with ``g f''(x)`` kept for its own backward pass."""

    @staticmethod
    def forward(g: Tensor, x: Tensor, slope: Tensor, kind: _Kind) -> Tensor:
        return g * slope

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        note_tensors(ctx, inputs)
        g, x, slope, ctx.kind = inputs
        ctx.curvature = None
        ctx.save_for_backward(g, x, slope)

    @staticmethod
    def backward(ctx: Any, gg: Tensor) -> tuple:
        g, x, slope = ctx.saved_tensors
        if torch.is_grad_enabled():  # a third derivative may follow
            return gg * ctx.kind.slope(x), gg * g * ctx.kind.curvature(x), None, None
        want_g, want_x, *_ = wanted(ctx)
        if want_x and ctx.curvature is None:
            ctx.curvature = g * ctx.kind.curvature(x)
        return (
            gg * slope if want_g else None,
            gg * ctx.curvature if want_x else None,
            None,
            None,
        )


class _Kind:
    """A pointwise function with its first two derivatives."""

    def __init__(
        self,
        value: Callable[[Tensor], Tensor],
        slope: Callable[[Tensor], Tensor],
        curvature: Callable[[Tensor], Tensor],
    ) -> None:
        self.value = value
        self.slope = slope
        self.curvature = curvature


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))


def _normal_pdf(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x * x) * (0.5 * math.sqrt(2 / math.pi))


def _gelu_tanh_parts(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    k, a = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(k * (x + a * x * x * x))
    return t, k * (1 + 3 * a * x * x), 6 * k * a * x


def _gelu_tanh_slope(x: Tensor) -> Tensor:
    t, du, _ = _gelu_tanh_parts(x)
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * du


def _gelu_tanh_curvature(x: Tensor) -> Tensor:
    t, du, ddu = _gelu_tanh_parts(x)
    return (1 - t * t) * (du + 0.5 * x * (ddu - 2 * t * du * du))


def _silu_slope(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _silu_curvature(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 - s) * (2 + x * (1 - 2 * s))


def _sigmoid_slope(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 - s)


def _sigmoid_curvature(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 - s) * (1 - 2 * s)


def _tanh_slope(x: Tensor) -> Tensor:
    t = torch.tanh(x)
    return 1 - t * t


def _tanh_curvature(x: Tensor) -> Tensor:
    t = torch.tanh(x)
    return -2 * t * (1 - t * t)


_GELU = _Kind(
    F.gelu,
    lambda x: _normal_cdf(x) + x * _normal_pdf(x),
    lambda x: _normal_pdf(x) * (2 - x * x),
)
_GELU_TANH = _Kind(
    lambda x: F.gelu(x, approximate="tanh"), _gelu_tanh_slope, _gelu_tanh_curvature
)
_SILU = _Kind(F.silu, _silu_slope, _silu_curvature)
_SIGMOID = _Kind(torch.sigmoid, _sigmoid_slope, _sigmoid_curvature)
_TANH = _Kind(torch.tanh, _tanh_slope, _tanh_curvature)


def _pointwise(x: Tensor, kind: _Kind) -> Any:
    return _Pointwise.apply(x, kind)[0] if is_worth_a_function(x) else NotImplemented


def _gelu(input: Tensor, approximate: str = "none") -> Any:
    return _pointwise(input, _GELU if approximate == "none" else _GELU_TANH)


def _silu(input: Tensor, inplace: bool = False) -> Any:
    return NotImplemented if inplace else _pointwise(input, _SILU)


def _tanh(input: Tensor, *, out: Tensor | None = None) -> Any:
    return NotImplemented if out is not None else _pointwise(input, _TANH)


def _sigmoid(input: Tensor, *, out: Tensor | None = None) -> Any:
    return NotImplemented if out is not None else _pointwise(input, _SIGMOID)


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Any:
    if not is_differentiated(input):
        return NotImplemented
    y = F.relu6(input + 3) / 6
    return input.copy_(y) if inplace else y


CORRECTIONS: Rules = {F.hardsigmoid: _hardsigmoid}
RULES: Rules = {
    F.gelu: _gelu,
    F.silu: _silu,
    torch.tanh: _tanh,
    Tensor.tanh: _tanh,
    torch.sigmoid: _sigmoid,
    Tensor.sigmoid: _sigmoid,
}

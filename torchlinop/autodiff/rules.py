r"""Differentiation rules that make second derivatives cheap.

PyTorch's own double-backward formulas are written to be right for any order of
differentiation, not to be evaluated many times at one point. Within
:class:`SecondOrderRules`, calls of a few functions are replaced by equivalents whose
backward pass differentiates into few kernels:

==================  =============================================================
function            what changes
==================  =============================================================
``batch_norm``      in evaluation mode it is affine and is computed as such
``layer_norm``      its Jacobian :math:`P` is symmetric, so the derivative of
                    :math:`P g` is again two products with :math:`P`; third
                    derivatives, which are wrong in torch 2.13, are right
``conv1d/2d/3d``    the derivative of a convolution's gradient uses the library's
                    own backward kernels instead of transposed copies
``gelu``, ``silu``, the factors :math:`f'(x)` and :math:`g f''(x)` are computed once
``tanh``,           and kept
``sigmoid``
``lstm``, ``gru``,  the fused kernels, which have no second derivative, are
``rnn_*``           switched off
``weight_norm``     written out: its second derivatives are wrong in torch 2.13
``embedding``       never with sparse gradients, which cannot be differentiated
==================  =============================================================

Every rule stays differentiable to any order, so a function that itself contains
derivatives (a physics-informed loss, for instance) can be linearized.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

_aten = torch.ops.aten


class Corrections(TorchFunctionMode):
    """Context in which derivatives that PyTorch gets wrong are right."""

    rules: dict[Callable, Callable]

    def __init__(self) -> None:
        super().__init__()
        self.rules = _CORRECTIONS

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Call the rule for ``func`` if there is one and it applies, else ``func``."""
        kwargs = kwargs or {}
        rule = self.rules.get(func)
        if rule is not None and torch._C._functorch.peek_interpreter_stack() is None:
            result = rule(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return func(*args, **kwargs)


#: dtypes in which the rules are as accurate as what they replace
_EXACT = (torch.float32, torch.float64)
#: below this number of entries a rule written in Python costs more than it saves
_SMALL = 1 << 15


class SecondOrderRules(Corrections):
    """Context in which, moreover, second derivatives are cheap."""

    def __init__(self) -> None:
        super().__init__()
        self.rules = _RULES


def _applies(x: Tensor) -> bool:
    """Whether a rule is exact for this tensor and worth its overhead."""
    return x.requires_grad and x.dtype in _EXACT and x.numel() >= _SMALL


def _call(function: type[Function], *args: Any) -> Any:
    """Apply a Function; without gradient mode call its forward, which is cheaper.

    The direct call also lets ``vmap`` see plain tensor operations.
    """
    if torch.is_grad_enabled():
        return function.apply(*args)
    return function.forward(*args)


def _note_tensors(ctx: Any, inputs: tuple) -> None:
    """Remember which inputs are tensors: only they have an edge in the graph."""
    ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]


def _wanted(ctx: Any) -> list[bool]:
    """Which of a Function's inputs the running backward pass asks for.

    ``ctx.needs_input_grad`` is also true for gradients that the engine will drop.
    """
    edges = iter(ctx.next_functions)
    return [is_tensor and _executes(next(edges)[0]) for is_tensor in ctx.is_tensor]


def _executes(node: Any) -> bool:
    if node is None:
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf that torch.autograd.grad was asked for
        return True


# --------------------------------------------------------------------- pointwise


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
        return _call(_PointwiseBackward, g, x, slope, ctx.kind), None


class _PointwiseBackward(Function):
    """``g f'(x)`` with ``g f''(x)`` kept for its own backward pass."""

    @staticmethod
    def forward(g: Tensor, x: Tensor, slope: Tensor, kind: _Kind) -> Tensor:
        return g * slope

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _note_tensors(ctx, inputs)
        g, x, slope, ctx.kind = inputs
        ctx.curvature = None
        ctx.save_for_backward(g, x, slope)

    @staticmethod
    def backward(ctx: Any, gg: Tensor) -> tuple:
        g, x, slope = ctx.saved_tensors
        if torch.is_grad_enabled():  # a third derivative may follow
            return gg * ctx.kind.slope(x), gg * g * ctx.kind.curvature(x), None, None
        want_g, want_x, *_ = _wanted(ctx)
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
    return _Pointwise.apply(x, kind)[0] if _applies(x) else NotImplemented


def _gelu(input: Tensor, approximate: str = "none") -> Any:
    return _pointwise(input, _GELU if approximate == "none" else _GELU_TANH)


def _silu(input: Tensor, inplace: bool = False) -> Any:
    return NotImplemented if inplace else _pointwise(input, _SILU)


def _tanh(input: Tensor, *, out: Tensor | None = None) -> Any:
    return NotImplemented if out is not None else _pointwise(input, _TANH)


def _sigmoid(input: Tensor, *, out: Tensor | None = None) -> Any:
    return NotImplemented if out is not None else _pointwise(input, _SIGMOID)


# ----------------------------------------------------------------- normalizations


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
        gx = None if gy is None else _call(_NormalizeBackward, gy, xhat, rstd)
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
        _note_tensors(ctx, inputs)
        g, xhat, rstd = inputs
        ctx.save_for_backward(g, xhat, rstd, output)

    @staticmethod
    def backward(ctx: Any, gg: Tensor) -> tuple:
        g, xhat, rstd, output = ctx.saved_tensors
        want_g, want_xhat, want_rstd = _wanted(ctx)
        bar_g = bar_xhat = bar_rstd = None
        if want_g:
            bar_g = _call(_NormalizeBackward, gg, xhat, rstd)
        if want_xhat:
            a = (xhat * gg).mean(-1, keepdim=True) * rstd
            b = (xhat * g).mean(-1, keepdim=True) * rstd
            bar_xhat = torch.addcmul(-(a * g), b, gg, value=-1)
        if want_rstd:
            bar_rstd = (gg * output).sum(-1, keepdim=True) / rstd
        return bar_g, bar_xhat, bar_rstd


def _layer_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    shape = tuple(normalized_shape)
    if not input.requires_grad or input.dtype not in _EXACT:
        return NotImplemented
    if input.shape[-len(shape) :] != shape:
        return NotImplemented
    rows = input if len(shape) == 1 else input.flatten(-len(shape))
    y = _Normalize.apply(rows, eps)[0].view(input.shape)
    if weight is not None:
        y = y * weight
    return y if bias is None else y + bias


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,  # noqa: ARG001
    eps: float = 1e-5,
) -> Any:
    if training or running_mean is None or running_var is None or input.ndim < 2:
        return NotImplemented
    if input.dtype != running_mean.dtype:
        return NotImplemented
    scale = torch.rsqrt(running_var + eps)
    scale = scale if weight is None else scale * weight
    shift = -running_mean * scale
    shift = shift if bias is None else shift + bias
    per_channel = [1, -1] + [1] * (input.ndim - 2)
    return torch.addcmul(shift.view(per_channel), input, scale.view(per_channel))


# ------------------------------------------------------------------- convolutions

#: stride, padding, dilation, transposed, output padding, groups
_ConvolutionConfig = tuple[list[int], list[int], list[int], bool, list[int], int]


def _convolution_backward(
    g: Tensor, x: Tensor, w: Tensor, config: _ConvolutionConfig, mask: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return _aten.convolution_backward(g, x, w, None, *config, mask)


class _Convolution(Function):
    @staticmethod
    def forward(
        x: Tensor, w: Tensor, b: Tensor | None, config: _ConvolutionConfig
    ) -> Tensor:
        return torch.convolution(x, w, b, *config)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _note_tensors(ctx, inputs)
        x, w, _, ctx.config = inputs
        ctx.save_for_backward(x, w)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        x, w = ctx.saved_tensors
        want_x, want_w, want_b, _ = _wanted(ctx)
        gx = gw = None
        if want_x or want_w:
            gx, gw = _call(_ConvolutionBackward, g, x, w, ctx.config, want_x, want_w)
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
        _note_tensors(ctx, inputs)
        g, x, w, ctx.config, *_ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, x, w)

    @staticmethod
    def backward(ctx: Any, ggx: Tensor | None, ggw: Tensor | None) -> tuple:
        g, x, w = ctx.saved_tensors
        config = ctx.config
        want_g, want_x, want_w, *_ = _wanted(ctx)
        bar_g = bar_x = bar_w = None
        if want_g and ggx is not None:
            bar_g = _call(_Convolution, ggx, w, None, config)
        if want_g and ggw is not None:
            term = _call(_Convolution, x, ggw, None, config)
            bar_g = term if bar_g is None else bar_g + term
        if want_x and ggw is not None:
            bar_x = _call(_ConvolutionBackward, g, x, ggw, config, True, False)[0]
        if want_w and ggx is not None:
            bar_w = _call(_ConvolutionBackward, g, ggx, w, config, False, True)[1]
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


# --------------------------------------------------------------- recurrent networks


def _without_fused_kernels(func: Callable) -> Callable:
    def rule(*args: Any, **kwargs: Any) -> Any:
        # torch.backends.*.flags() would touch precision settings too, and warn
        enabled = torch._C._get_cudnn_enabled(), torch._C._get_mkldnn_enabled()
        torch._C._set_cudnn_enabled(False)
        torch._C._set_mkldnn_enabled(False)
        try:
            return func(*args, **kwargs)
        finally:
            torch._C._set_cudnn_enabled(enabled[0])
            torch._C._set_mkldnn_enabled(enabled[1])

    return rule


# ---------------------------------------------------------------------- corrections


def _explicit_layer_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    dims = tuple(range(-len(normalized_shape), 0))
    if not input.requires_grad or input.dtype not in _EXACT:
        return NotImplemented
    x = input - input.mean(dims, keepdim=True)
    y = x * torch.rsqrt(x.square().mean(dims, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``g v / |v|``; the norm over all dimensions but ``dim``, or all for -1."""
    if dim == -1:
        return v * (g / v.square().sum().sqrt())
    others = [d for d in range(v.ndim) if d != dim]
    return v * (g / v.square().sum(others, keepdim=True).sqrt())


def _dense_gradient(func: Callable) -> Callable:
    """Gradients of an embedding as dense tensors, which can be differentiated."""

    def rule(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("sparse"):
            kwargs["sparse"] = False
        return func(*args, **kwargs)

    return rule


_CORRECTIONS: dict[Callable, Callable] = {
    F.layer_norm: _explicit_layer_norm,
    torch._weight_norm: _weight_norm,
    F.embedding: _dense_gradient(F.embedding),
    F.embedding_bag: _dense_gradient(F.embedding_bag),
    **{
        func: _without_fused_kernels(func)
        for func in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
    },
}
_RULES: dict[Callable, Callable] = {
    **_CORRECTIONS,
    F.gelu: _gelu,
    F.silu: _silu,
    torch.tanh: _tanh,
    Tensor.tanh: _tanh,
    torch.sigmoid: _sigmoid,
    Tensor.sigmoid: _sigmoid,
    F.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
    F.conv1d: _convolution_rule(1),
    F.conv2d: _convolution_rule(2),
    F.conv3d: _convolution_rule(3),
}

"""Which functions of torch use parameters in a way that makes a block.

A rule takes the arguments of its function, after a way to find out which tensors are
parameters, and returns the use, two uses where weight and bias are used apart, or None if
it does not apply.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torchlinop.kronecker.patches import Window
from torchlinop.kronecker.uses import (
    ConvolutionUse,
    EmbeddingUse,
    LinearUse,
    Use,
    VectorUse,
)


class Parameter(NamedTuple):
    """A tensor that is a parameter, its transpose, or some of its rows."""

    position: int
    transposed: bool
    #: first and last row of the parameter, and how many it has
    rows: tuple[int, int, int] | None
    tensor: Tensor


#: from a tensor to the parameter that it is, or None
Find = Callable[[Any], Parameter | None]
#: what a rule returns
Found = Use | tuple[Use, Use] | None


def _linear(find: Find, x: Tensor, weight: Tensor, bias: Any = None) -> Found:
    W, b = find(weight), find(bias)
    if find(x) is not None or (W is not None and W.tensor.ndim != 2):
        return None
    return _matrix_use(W, b, x)


def _matrix_use(
    W: Parameter | None, b: Parameter | None, x: Tensor, *, columns: bool = False
) -> Found:
    if W is None or x.is_nested:
        return None if b is None else _shift_use(b, x)
    if W.transposed and W.rows is not None:
        return None
    shift = None
    if b is not None and b.rows != W.rows:  # attention with keys of another size
        shift, b = _shift_use(b, x), None
        if shift is None:
            return None
    use = LinearUse(
        W.position,
        None if b is None else b.position,
        x,
        transposed=W.transposed,
        rows=W.rows,
        columns=columns,
    )
    return use if shift is None else (use, shift)


def _shift_use(b: Parameter, x: Tensor) -> Use | None:
    if b.tensor.ndim != 1:
        return None
    one = x.new_ones(1)  # the same at all positions
    return LinearUse(None, b.position, one, rows=b.rows)


def _matmul(find: Find, a: Tensor, b: Tensor) -> Found:
    left, right = find(a), find(b)
    if (left is None) == (right is None):
        return None
    if right is not None:  # x @ W, which is F.linear(x, W.T)
        if b.ndim != 2:
            return None
        return _matrix_use(right._replace(transposed=not right.transposed), None, a)
    assert left is not None
    if a.ndim != 2:
        return None
    if b.ndim == 1:
        return _matrix_use(left, None, b)
    return _matrix_use(left, None, b.mT, columns=True)


def _addmm(find: Find, bias: Tensor, a: Tensor, b: Tensor, **factors: Any) -> Found:
    shift = find(bias)
    W = find(b)
    if factors or find(a) is not None or W is None or W.rows is not None:
        return None
    if shift is not None and shift.tensor.ndim != 1:
        return None
    return _matrix_use(W._replace(transposed=not W.transposed), shift, a)


def _embedding(
    find: Find,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Use | None:
    W = find(weight)
    if W is None or W.transposed or W.rows is not None or scale_grad_by_freq:
        return None
    padding = None if padding_idx is None else padding_idx % weight.shape[0]
    return EmbeddingUse(W.position, input, padding)


def _convolution(
    find: Find,
    input: Tensor,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Use | None:
    W, b = find(weight), find(bias)
    if find(input) is not None or (b is not None and b.rows is not None):
        return None
    n = weight.ndim - 2
    if W is None:
        assert b is not None
        return _ChannelShift(b.position, input, n)
    if W.rows is not None:
        return None
    kernel = weight.shape[2:]
    dilations = _each(dilation, n)
    return ConvolutionUse(
        W.position,
        None if b is None else b.position,
        input,
        Window(
            kernel=kernel,
            stride=_each(stride, n),
            padding=_pads(padding, kernel, dilations),
            dilation=dilations,
            groups=groups,
        ),
    )


class _ChannelShift(LinearUse):
    """The bias of a convolution whose kernel is no parameter."""

    def __init__(self, bias: int, x: Tensor, space: int) -> None:
        super().__init__(None, bias, x.new_ones(1))
        self._space = space

    @property
    def positions(self) -> tuple[int, ...]:
        channel = len(self.shape) - self._space - 1
        return (*self.shape[:channel], *self.shape[channel + 1 :])

    def positions_first(self, gradient: Tensor) -> Tensor:
        return gradient.movedim(-1 - self._space, -1)


def _each(value: Any, n: int) -> list[int]:
    if isinstance(value, int):
        return [value] * n
    values = [int(v) for v in value]
    return values * n if len(values) == 1 else values


def _pads(
    padding: Any, kernel: Sequence[int], dilation: Sequence[int]
) -> list[tuple[int, int]]:
    if padding == "valid":
        return [(0, 0)] * len(kernel)
    if padding == "same":
        reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [(r // 2, r - r // 2) for r in reach]
    return [(p, p) for p in _each(padding, len(kernel))]


def _layer_norm(
    find: Find,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
) -> Use | None:
    x = input.detach()
    return _vector_use(
        find,
        input,
        weight,
        bias,
        lambda: F.layer_norm(x, normalized_shape, None, None, eps),
        dims=len(normalized_shape),
    )


def _rms_norm(
    find: Find,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Any = None,
    eps: float | None = None,
) -> Use | None:
    x = input.detach()
    return _vector_use(
        find,
        input,
        weight,
        None,
        lambda: F.rms_norm(x, normalized_shape, None, eps),
        dims=len(normalized_shape),
    )


def _group_norm(
    find: Find,
    input: Tensor,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
) -> Use | None:
    x = input.detach()
    standardized = lambda: F.group_norm(x, num_groups, None, None, eps)  # noqa: E731
    return _vector_use(find, input, weight, bias, standardized, channel=1)


def _batch_norm(
    find: Find,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Use | None:
    if training:  # a sample's output depends on the others
        return None
    x = input.detach()
    return _vector_use(
        find,
        input,
        weight,
        bias,
        lambda: F.batch_norm(x, running_mean, running_var, None, None, False, 0.0, eps),
        channel=1,
    )


def _vector_use(
    find: Find,
    x: Tensor,
    weight: Any,
    bias: Any,
    standardized: Callable[[], Tensor],
    **where: Any,
) -> Use | None:
    W, b = find(weight), find(bias)
    parts = [part for part in (W, b) if part is not None]
    if find(x) is not None or any(part.rows is not None for part in parts):
        return None
    index = [None if part is None else part.position for part in (W, b)]
    return VectorUse(index[0], index[1], standardized, **where)


def _add(find: Find, a: Any, b: Any, **options: Any) -> Use | None:
    """A vector that is added along the last dimension."""
    if options or not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return None
    x, shift = (a, find(b)) if find(b) is not None else (b, find(a))
    if shift is None or find(x) is not None:
        return None
    if shift.tensor.ndim != 1 or x.ndim == 0 or x.shape[-1] != shift.tensor.shape[0]:
        return None
    return _shift_use(shift, x)


def _multiply(find: Find, a: Any, b: Any) -> Use | None:
    """A vector that is multiplied along the last dimension."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return None
    x, scale = (a, find(b)) if find(b) is not None else (b, find(a))
    if scale is None or find(x) is not None or scale.rows is not None:
        return None
    if scale.tensor.ndim != 1 or x.ndim == 0 or x.shape[-1] != scale.tensor.shape[0]:
        return None
    kept = x.detach()
    return VectorUse(scale.position, None, lambda: kept)


_T: Any = torch.Tensor
#: what a function of torch does with parameters
RULES: dict[Callable, Callable[..., Found]] = {
    F.linear: _linear,
    **dict.fromkeys(
        (_T.matmul, torch.matmul, _T.__matmul__, _T.mm, torch.mm, _T.mv, torch.mv), _matmul
    ),
    torch.addmm: _addmm,
    F.embedding: _embedding,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _convolution),
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    F.batch_norm: _batch_norm,
    **dict.fromkeys((_T.add, torch.add, _T.__add__, _T.__radd__), _add),
    **dict.fromkeys((_T.mul, torch.mul, _T.__mul__, _T.__rmul__), _multiply),
}

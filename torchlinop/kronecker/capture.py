"""Seeing how a model uses its parameters, call by call, while it is evaluated.

A function mode sees each call of a torch function that has a leaf (what stands for a
parameter) among its arguments, whoever makes it: a module, a plain function, a weight
that is tied or used several times. Nothing is hooked onto modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torchlinop.autodiff.interruptible import InterruptibleMode, in_force
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


class Capture(InterruptibleMode):
    """Records the uses of leaves, and calls that no rule understands.

    Parameters
    ----------
    leaves
        What stands for the parameters.

    Attributes
    ----------
    uses : list of Use
        In the order of the calls.
    unknown : dict
        Names of functions that no rule understands, by the parameter they were given.
    """

    def __init__(self, leaves: Sequence[Tensor]) -> None:
        super().__init__()
        self.uses: list[Use] = []
        self.unknown: dict[int, str] = {}
        self._known: dict[int, Parameter] = {
            id(leaf): Parameter(i, False, None, leaf) for i, leaf in enumerate(leaves)
        }

    def handle(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """Call a function, and note what it does with parameters."""
        given = [self._known[id(a)] for a in _flat(args, kwargs) if id(a) in self._known]
        if not given:
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._look_inside(func, args, kwargs)
        rule = _RULES.get(func)
        use = None if rule is None else rule(self, *args, **kwargs)
        result = func(*args, **kwargs)
        if use is not None:
            use.record(_name(func), result)
            self.uses.append(use)
        elif not self._is_view(func, given, result) and _depends(result):
            for parameter in given:
                self.unknown.setdefault(parameter.position, _name(func))
        return result

    def find(self, tensor: Any) -> Parameter | None:
        """Return which parameter a tensor is."""
        return self._known.get(id(tensor))

    def _is_view(self, func: Callable, given: list[Parameter], result: Any) -> bool:
        """Recognize transposes and rows of a parameter."""
        parameter = given[0]
        if isinstance(result, Tensor) and id(result) in self._known:
            return True  # nothing was done: contiguous(), to(dtype)
        if func in _TRANSPOSES and parameter.tensor.ndim == 2 and parameter.rows is None:
            if result.shape == parameter.tensor.shape[::-1] and (
                result.stride() == parameter.tensor.stride()[::-1]
            ):
                flipped = Parameter(
                    parameter.position, not parameter.transposed, None, result
                )
                self._known[id(result)] = flipped
                return True
            return False
        if func not in _ROWS or parameter.transposed or parameter.rows is not None:
            return False
        parts = [result] if isinstance(result, Tensor) else list(result)
        whole = parameter.tensor
        if not all(
            part.shape[1:] == whole.shape[1:] and part.stride() == whole.stride()
            for part in parts
        ):
            return False
        for part in parts:
            start = (part.storage_offset() - whole.storage_offset()) // whole.stride(0)
            rows = (start, start + part.shape[0], whole.shape[0])
            self._known[id(part)] = Parameter(parameter.position, False, rows, part)
        return True

    def _look_inside(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Run torch's own code; a mode does not see what a function calls in turn."""
        names = {**vars(F), "has_torch_function": lambda _: False}
        inner = Capture([])
        inner.uses, inner.unknown, inner._known = self.uses, self.unknown, self._known
        with in_force(inner):
            code = FunctionType(func.__code__, names, argdefs=func.__defaults__)
            return code(*args, **kwargs)


def _flat(args: tuple, kwargs: dict) -> Iterator[Any]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, (list, tuple)):
            yield from value
        else:
            yield value


def _depends(result: Any) -> bool:
    """Whether a derivative flows through what a function returned."""
    parts = result if isinstance(result, (list, tuple)) else (result,)
    return any(isinstance(part, Tensor) and part.requires_grad for part in parts)


def _name(func: Any) -> str:
    name: str = getattr(func, "__name__", repr(func))
    if name == "__get__":  # of a property
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    return name


# ------------------------------------------------------------------------- rules


def _linear(capture: Capture, x: Tensor, weight: Tensor, bias: Any = None) -> Use | None:
    W, b = capture.find(weight), capture.find(bias)
    if capture.find(x) is not None or (W is not None and W.tensor.ndim != 2):
        return None
    return _matrix_use(W, b, x)


def _matrix_use(
    W: Parameter | None, b: Parameter | None, x: Tensor, *, columns: bool = False
) -> Use | None:
    if W is None or x.is_nested:
        return None if b is None else _shift_use(b, x)
    rows = W.rows
    if b is not None and b.rows != rows:
        return None
    if W.transposed and rows is not None:
        return None
    return LinearUse(
        W.position,
        None if b is None else b.position,
        x,
        transposed=W.transposed,
        rows=rows,
        columns=columns,
    )


def _shift_use(b: Parameter, x: Tensor) -> Use | None:
    if b.tensor.ndim != 1:
        return None
    one = x.new_ones(1)  # the same at all positions
    return LinearUse(None, b.position, one, rows=b.rows)


def _matmul(capture: Capture, a: Tensor, b: Tensor) -> Use | None:
    left, right = capture.find(a), capture.find(b)
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


def _addmm(
    capture: Capture, bias: Tensor, a: Tensor, b: Tensor, **factors: Any
) -> Use | None:
    shift = capture.find(bias)
    W = capture.find(b)
    if factors or capture.find(a) is not None or W is None or W.rows is not None:
        return None
    if shift is not None and shift.tensor.ndim != 1:
        return None
    return _matrix_use(W._replace(transposed=not W.transposed), shift, a)


def _embedding(
    capture: Capture,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Use | None:
    W = capture.find(weight)
    if W is None or W.transposed or W.rows is not None or scale_grad_by_freq:
        return None
    padding = None if padding_idx is None else padding_idx % weight.shape[0]
    return EmbeddingUse(W.position, input, padding)


def _convolution(
    capture: Capture,
    input: Tensor,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Use | None:
    W, b = capture.find(weight), capture.find(bias)
    if capture.find(input) is not None or (b is not None and b.rows is not None):
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
        kernel=kernel,
        stride=_each(stride, n),
        padding=_pads(padding, kernel, dilations),
        dilation=dilations,
        groups=groups,
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
    capture: Capture,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
) -> Use | None:
    x = input.detach()
    return _vector_use(
        capture,
        input,
        weight,
        bias,
        lambda: F.layer_norm(x, normalized_shape, None, None, eps),
        dims=len(normalized_shape),
    )


def _rms_norm(
    capture: Capture,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Any = None,
    eps: float | None = None,
) -> Use | None:
    x = input.detach()
    return _vector_use(
        capture,
        input,
        weight,
        None,
        lambda: F.rms_norm(x, normalized_shape, None, eps),
        dims=len(normalized_shape),
    )


def _group_norm(
    capture: Capture,
    input: Tensor,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
) -> Use | None:
    x = input.detach()
    standardized = lambda: F.group_norm(x, num_groups, None, None, eps)  # noqa: E731
    return _vector_use(capture, input, weight, bias, standardized, channel=1)


def _batch_norm(
    capture: Capture,
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
        capture,
        input,
        weight,
        bias,
        lambda: F.batch_norm(x, running_mean, running_var, None, None, False, 0.0, eps),
        channel=1,
    )


def _vector_use(
    capture: Capture,
    x: Tensor,
    weight: Any,
    bias: Any,
    standardized: Callable[[], Tensor],
    **where: Any,
) -> Use | None:
    W, b = capture.find(weight), capture.find(bias)
    parts = [part for part in (W, b) if part is not None]
    if capture.find(x) is not None or any(part.rows is not None for part in parts):
        return None
    index = [None if part is None else part.position for part in (W, b)]
    return VectorUse(index[0], index[1], standardized, **where)


def _add(capture: Capture, a: Any, b: Any, **options: Any) -> Use | None:
    """A vector that is added along the last dimension."""
    if options or not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return None
    x, shift = (a, capture.find(b)) if capture.find(b) is not None else (b, capture.find(a))
    if shift is None or capture.find(x) is not None:
        return None
    if shift.tensor.ndim != 1 or x.ndim == 0 or x.shape[-1] != shift.tensor.shape[0]:
        return None
    return _shift_use(shift, x)


def _multiply(capture: Capture, a: Any, b: Any) -> Use | None:
    """A vector that is multiplied along the last dimension."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return None
    x, scale = (a, capture.find(b)) if capture.find(b) is not None else (b, capture.find(a))
    if scale is None or capture.find(x) is not None or scale.rows is not None:
        return None
    if scale.tensor.ndim != 1 or x.ndim == 0 or x.shape[-1] != scale.tensor.shape[0]:
        return None
    kept = x.detach()
    return VectorUse(scale.position, None, lambda: kept)


_T: Any = torch.Tensor
_TRANSPOSES = {
    _T.T.__get__,
    _T.mT.__get__,
    _T.H.__get__,
    _T.mH.__get__,
    _T.t,
    torch.t,
    _T.transpose,
    torch.transpose,
    _T.swapaxes,
    _T.permute,
    torch.permute,
}
_ROWS = {
    _T.split,
    torch.split,
    _T.chunk,
    torch.chunk,
    _T.narrow,
    torch.narrow,
    _T.__getitem__,
    _T.tensor_split,
    torch.tensor_split,
}
_RULES: dict[Callable, Callable[..., Use | None]] = {
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

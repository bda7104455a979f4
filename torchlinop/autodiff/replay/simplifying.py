"""Fewer and cheaper kernels for the same result.

* Transposes that cancel, additions of zero and multiplications with one are dropped,
* factors that do not depend on the argument are multiplied with each other first,
* a matrix product and the addition that follows it become one kernel,
* matrix products are written where they belong in the result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from torchlinop.autodiff.replay.recording import Call, Recording, Value, looks_like, mapped
from torchlinop.autodiff.replay.selecting import BY_POSITION

_aten = torch.ops.aten
_MUL, _MUL_NUMBER = _aten.mul.Tensor, _aten.mul.Scalar
_MM, _EXPAND = _aten.mm.default, _aten.expand.default
_TRANSPOSE, _ZEROS = _aten.t.default, _aten.zeros_like.default

#: the memory of what is made here: which one is of no matter any more
_NEW = 1


def simplify(calls: list[Call], recording: Recording) -> tuple[list[Call], Value]:
    """Return calls that give the same result, and the value that is the result then."""
    if not BY_POSITION.isdisjoint([call.func for call in calls]):
        return calls, recording.result  # memory could be laid out differently
    fixed = _fixed(calls)
    return _in_place(_reduce(calls, recording, fixed), recording.result, fixed)


def _fixed(calls: list[Call]) -> set[Call]:
    """Return the calls on memory into which something is written, or will be."""
    fixed: set[Call] = set()
    to_be_written: set[int] = set()
    for call in reversed(calls):
        to_be_written.update([v.memory for v in call.written()])
        if to_be_written and not to_be_written.isdisjoint(
            [v.memory for v in (*call.inputs, *call.outputs)]
        ):
            fixed.add(call)
    return fixed


class _Known:
    """What is known of values that depend on the argument, as far as calls were read."""

    def __init__(self, calls: list[Call], x: Value) -> None:
        self.values = {x}.union(*[call.outputs for call in calls])
        self.uses = _uses(calls)
        self.made_by: dict[Value, Call] = {}

    def is_zero(self, value: Value) -> bool:
        """Whether a value is zero whatever the argument is."""
        if value in self.values:
            made = self.made_by.get(value)
            return made is not None and made.func is _ZEROS
        assert value.constant is not None
        return not value.constant.any()


def _reduce(live: list[Call], recording: Recording, fixed: set[Call]) -> list[Call]:
    """Drop calls that change nothing and gather constant factors."""
    result = recording.result
    known = _Known(live, recording.x)
    replaced: dict[Value, Value] = {}

    def current(value: Value) -> Value:
        while value in replaced:
            value = replaced[value]
        return value

    kept = []
    for original in live:
        call = original
        if replaced and not replaced.keys().isdisjoint(call.inputs):
            args = mapped(current, Value, call.args)
            kwargs = {k: mapped(current, Value, v) for k, v in call.kwargs.items()}
            call = Call(call.func, args, kwargs, call.result)
        if original in fixed:
            fixed.add(call)
            kept.append(call)
            continue
        same, other = _RULES.get(call.func, (None, None))
        if same is not None and call.result is not result:
            value = same(call, known)
            if value is not None:
                replaced[call.result] = value
                continue
        if other is not None:
            call = other(call, known)
        for value in call.outputs:
            known.made_by[value] = call
        kept.append(call)
    return _needed(kept, result, fixed)


def _uses(calls: list[Call]) -> Counter[Value]:
    """How often each value is an argument."""
    return Counter([v for call in calls for v in call.inputs])


def _argument(call: Call, _: _Known) -> Value:
    """The value that goes by another name from here on."""
    value: Value = call.args[0]
    return value


def _times_one(call: Call, _: _Known) -> Value | None:
    """The factor of one, which addcmul's derivative has."""
    term: Value = call.args[0]
    alike = call.args[1] == 1 and term.memory != 0 and looks_like(term, call.result)
    return term if alike else None


def _transposed_twice(call: Call, known: _Known) -> Value | None:
    inner = known.made_by.get(call.args[0])
    return inner.inputs[0] if inner is not None and inner.func is _TRANSPOSE else None


def _plus_zero(call: Call, known: _Known) -> Value | None:
    if call.kwargs:
        return None
    a, b = call.args[:2]
    for term, other in ((a, b), (b, a)):
        if not isinstance(other, Value) or not isinstance(term, Value):
            continue
        # the result must not turn out to be a view of the argument
        if term.memory == 0 or not looks_like(term, call.result):
            continue
        if known.is_zero(other):
            return term
    return None


def _gather_factors(call: Call, known: _Known) -> Call:
    """Turn ``(u * a) * b`` into ``u * (a * b)`` where ``a`` and ``b`` are constant."""

    def parts(c: Call) -> tuple[Value, Any] | None:
        if c.func is _MUL_NUMBER:
            return c.args[0], c.args[1]
        if c.func is not _MUL:
            return None
        a, b = c.args
        if not isinstance(b, Value) or b not in known.values:
            return (a, _constant(b)) if isinstance(a, Value) and a in known.values else None
        return (
            (b, _constant(a)) if not isinstance(a, Value) or a not in known.values else None
        )

    outer = parts(call)
    if outer is None or known.uses[outer[0]] != 1:
        return call
    inner_call = known.made_by.get(outer[0])
    inner = parts(inner_call) if inner_call is not None else None
    if inner is None:
        return call
    u, a, b = inner[0], inner[1], outer[1]
    factor = a * b
    shape = factor.shape if isinstance(factor, Tensor) else ()
    # by NumPy: torch would import SymPy for it
    if np.broadcast_shapes(u.shape, shape) != call.result.shape:
        return call
    if isinstance(factor, Tensor) and factor.dtype != call.result.dtype:
        return call
    if _underflows(factor, a, b, call.result.dtype):
        return call
    if isinstance(factor, Tensor):
        factor = Value.fixed(factor, _NEW)
    return Call(_MUL, (u, factor), {}, call.result)


def _constant(value: Any) -> Any:
    """Return a constant as a tensor or a number."""
    return value.constant if isinstance(value, Value) else value


def _underflows(factor: Any, a: Any, b: Any, dtype: torch.dtype) -> bool:
    """Whether a product of constants is lost that ``(u * a) * b`` may still have."""
    if not dtype.is_floating_point and not dtype.is_complex:
        return False
    # numbers stay numbers: as tensors they would be rounded, on whatever default device
    lost = (abs(factor) < torch.finfo(dtype).tiny) & (a != 0) & (b != 0)
    return bool(lost.any() if isinstance(lost, Tensor) else lost)


def _fuse_product(call: Call, known: _Known) -> Call:
    """Turn ``a + m @ n`` into one call, and drop the expansion of a broadcast ``a``."""
    if call.kwargs:
        return call
    for product, other in (call.args, call.args[::-1]):
        made = known.made_by.get(product)
        if made is None or made.func is not _MM:
            continue
        if known.uses[product] != 1 or not isinstance(other, Value):
            continue
        if product.shape != call.result.shape or other.dtype != product.dtype:
            continue
        if product.strides != call.result.strides:  # those that one kernel would give
            continue
        expanded = known.made_by.get(other)
        if expanded is not None and expanded.func is _EXPAND:
            other = expanded.args[0]
        return Call(_aten.addmm.default, (other, *made.args), {}, call.result)
    return call


#: by kernel: what finds a value that equals the result, and what makes another call of it
_RULES: dict[Any, tuple[Callable | None, Callable | None]] = {
    _aten.detach.default: (_argument, None),
    _aten.alias.default: (_argument, None),
    _TRANSPOSE: (_transposed_twice, None),
    _MUL_NUMBER: (_times_one, None),
    _aten.add.Tensor: (_plus_zero, _fuse_product),
    _MUL: (None, _gather_factors),
}


def _needed(calls: list[Call], result: Value, fixed: set[Call]) -> list[Call]:
    """Keep the calls that the result needs."""
    needed = {result}
    kept = []
    for call in reversed(calls):
        if call in fixed or not needed.isdisjoint(call.outputs):
            kept.append(call)
            needed.update(call.inputs)
    return kept[::-1]


_WITH_OUTPUT = {
    _MM: _aten.mm.out,
    _aten.addmm.default: _aten.addmm.out,
}
_RESHAPES = {_aten.view.default, _aten._unsafe_view.default}


def _in_place(
    calls: list[Call], result: Value, fixed: set[Call]
) -> tuple[list[Call], Value]:
    """Let matrix products write into their part of a concatenated result."""
    last = calls[-1]
    if last in fixed or last.func is not _aten.cat.default or last.args[1:] or last.kwargs:
        return calls, result
    pieces = last.args[0]
    if any(len(p.shape) != 1 or p.dtype != result.dtype for p in pieces):
        return calls, result
    made_by = {v: call for call in calls if call not in fixed for v in call.outputs}
    uses = _uses(calls)

    def place(shape: tuple[int, ...]) -> Value:
        return Value(shape, result.dtype, result.device, _NEW)

    out = place(result.shape)
    allocation = Call(
        _aten.empty.memory_format,
        (list(result.shape),),
        {"dtype": result.dtype, "device": result.device},
        out,
    )
    instead: dict[Call, list[Call]] = {}
    copies = []
    start = 0
    for piece in pieces:
        stop = start + piece.shape[0]
        part = place(piece.shape)
        slicing = Call(_aten.slice.Tensor, (out, 0, start, stop), {}, part)
        reshape = made_by.get(piece)
        product = made_by.get(reshape.args[0]) if _is_reshape(reshape) else None
        if (
            product is not None
            and product.func in _WITH_OUTPUT
            and uses[product.result] == uses[piece] == 1
        ):
            there = place(product.result.shape)
            viewing = Call(_aten.view.default, (part, list(there.shape)), {}, there)
            kernel = _WITH_OUTPUT[product.func]
            writing = Call(kernel, product.args, {"out": there}, there)
            instead[product] = [slicing, viewing, writing]
            instead[reshape] = []  # type: ignore[index]
        else:
            copies += [slicing, Call(_aten.copy_.default, (part, piece), {}, part)]
        start = stop
    if not instead:
        return calls, result
    placed = [c for call in calls[:-1] for c in instead.get(call, [call])]
    return [allocation, *placed, *copies], out


def _is_reshape(call: Call | None) -> TypeGuard[Call]:
    return call is not None and call.func in _RESHAPES

"""Fewer and cheaper kernels for the same result.

* Transposes that cancel and additions of zero are dropped,
* factors that do not depend on the argument are multiplied with each other first,
* a matrix product and the addition that follows it become one kernel,
* matrix products are written where they belong in the result.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchlinop.autodiff.replay.recording import Call, Recording, storage
from torchlinop.autodiff.replay.selecting import BY_POSITION

_aten = torch.ops.aten

#: kernels that return their argument under another name
_IDENTITIES = {_aten.detach.default, _aten.alias.default}


def simplify(calls: list[Call], recording: Recording) -> tuple[list[Call], Tensor]:
    """Return calls that give the same result, and the tensor that is the result then."""
    # else values change under their names, or memory would be laid out differently
    if any(call.written() or call.func in BY_POSITION for call in calls):
        return calls, recording.result
    return _in_place(*_reduce(calls, recording))


def _reduce(live: list[Call], recording: Recording) -> tuple[list[Call], Tensor]:
    """Drop calls that change nothing and gather constant factors."""
    result = recording.result
    known = {id(recording.x)} | {id(t) for call in live for t in call.outputs()}
    replaced: dict[int, Tensor] = {}
    made_by: dict[int, Call] = {}
    uses = _uses(live)

    def current(value: Any) -> Any:
        while isinstance(value, Tensor) and id(value) in replaced:
            value = replaced[id(value)]
        return value

    kept = []
    for call in live:
        args = pytree.tree_map(current, call.args)
        kwargs = pytree.tree_map(current, call.kwargs)
        call = Call(call.func, args, kwargs, call.result)
        same = _same_as(call, made_by, known, recording.x)
        if same is not None and call.result is not result:
            replaced[id(call.result)] = same
            continue
        if call.func is _aten.mul.Tensor:
            call = _gather_factors(call, made_by, known, uses)
        elif call.func is _aten.add.Tensor:
            call = _fuse_product(call, made_by, uses)
        for t in call.outputs():
            made_by[id(t)] = call
        kept.append(call)
    return _needed(kept, result), result


def _uses(calls: list[Call]) -> Counter[int]:
    """How often each tensor is an argument."""
    return Counter(id(t) for call in calls for t in call.inputs())


def _same_as(
    call: Call, made_by: dict[int, Call], known: set[int], x: Tensor
) -> Tensor | None:
    """Return the tensor that the call's result equals, if there is one."""
    if call.func in _IDENTITIES:
        return call.args[0]
    if call.func is _aten.t.default:
        inner = made_by.get(id(call.args[0]))
        if inner is not None and inner.func is _aten.t.default:
            return inner.args[0]
    if call.func is _aten.add.Tensor and not call.kwargs:
        a, b = call.args[:2]
        for term, other in ((a, b), (b, a)):
            if not isinstance(other, Tensor) or not isinstance(term, Tensor):
                continue
            same = term.shape == call.result.shape and term.dtype == call.result.dtype
            # the result must not turn out to be a view of the argument
            fresh = storage(term) != storage(x)
            if id(other) not in known and same and fresh and not other.any():
                return term
    return None


def _gather_factors(
    call: Call, made_by: dict[int, Call], known: set[int], uses: Counter[int]
) -> Call:
    """Turn ``(u * a) * b`` into ``u * (a * b)`` where ``a`` and ``b`` are constant."""

    def parts(c: Call) -> tuple[Tensor, Any] | None:
        if c.func is _aten.mul.Scalar:
            return c.args[0], c.args[1]
        if c.func is not _aten.mul.Tensor:
            return None
        a, b = c.args
        if not isinstance(b, Tensor) or id(b) not in known:
            return (a, b) if isinstance(a, Tensor) and id(a) in known else None
        return (b, a) if not isinstance(a, Tensor) or id(a) not in known else None

    outer = parts(call)
    if outer is None or uses[id(outer[0])] != 1:
        return call
    inner_call = made_by.get(id(outer[0]))
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
    return Call(_aten.mul.Tensor, (u, factor), {}, call.result)


def _underflows(factor: Any, a: Any, b: Any, dtype: torch.dtype) -> bool:
    """Whether a product of constants is lost that ``(u * a) * b`` may still have."""
    if not dtype.is_floating_point and not dtype.is_complex:
        return False
    # numbers stay numbers: as tensors they would be rounded, on whatever default device
    lost = (abs(factor) < torch.finfo(dtype).tiny) & (a != 0) & (b != 0)
    return bool(lost.any() if isinstance(lost, Tensor) else lost)


def _fuse_product(call: Call, made_by: dict[int, Call], uses: Counter[int]) -> Call:
    """Turn ``a + m @ n`` into one call, and drop the expansion of a broadcast ``a``."""
    if call.kwargs:
        return call
    for product, other in (call.args, call.args[::-1]):
        made = made_by.get(id(product))
        if made is None or made.func is not _aten.mm.default:
            continue
        if uses[id(product)] != 1 or not isinstance(other, Tensor):
            continue
        if product.shape != call.result.shape or other.dtype != product.dtype:
            continue
        expanded = made_by.get(id(other))
        if expanded is not None and expanded.func is _aten.expand.default:
            other = expanded.args[0]
        return Call(_aten.addmm.default, (other, *made.args), {}, call.result)
    return call


def _needed(calls: list[Call], result: Tensor) -> list[Call]:
    """Keep the calls that the result needs."""
    needed = {id(result)}
    kept = []
    for call in reversed(calls):
        if any(id(t) in needed for t in call.outputs()):
            kept.append(call)
            needed.update(id(t) for t in call.inputs())
    return kept[::-1]


_WITH_OUTPUT = {
    _aten.mm.default: _aten.mm.out,
    _aten.addmm.default: _aten.addmm.out,
}
_RESHAPES = {_aten.view.default, _aten._unsafe_view.default}


def _in_place(calls: list[Call], result: Tensor) -> tuple[list[Call], Tensor]:
    """Let matrix products write into their part of a concatenated result."""
    last = calls[-1]
    if last.func is not _aten.cat.default or last.args[1:] or last.kwargs:
        return calls, result
    pieces = last.args[0]
    if any(p.ndim != 1 or p.dtype != result.dtype for p in pieces):
        return calls, result
    made_by = {id(t): call for call in calls for t in call.outputs()}
    uses = _uses(calls)
    out = torch.empty_like(result)
    allocation = Call(
        _aten.empty.memory_format,
        (list(result.shape),),
        {"dtype": result.dtype, "device": result.device},
        out,
    )
    instead: dict[int, list[Call]] = {}
    copies = []
    start = 0
    for piece in pieces:
        stop = start + piece.shape[0]
        part = out[start:stop]
        slicing = Call(_aten.slice.Tensor, (out, 0, start, stop), {}, part)
        reshape = made_by.get(id(piece))
        product = made_by.get(id(reshape.args[0])) if _is_reshape(reshape) else None
        if (
            product is not None
            and product.func in _WITH_OUTPUT
            and uses[id(product.result)] == uses[id(piece)] == 1
        ):
            place = part.view(product.result.shape)
            viewing = Call(_aten.view.default, (part, list(place.shape)), {}, place)
            kernel = _WITH_OUTPUT[product.func]
            writing = Call(kernel, product.args, {"out": place}, place)
            instead[id(product)] = [slicing, viewing, writing]
            instead[id(reshape)] = []
        else:
            copies += [slicing, Call(_aten.copy_.default, (part, piece), {}, part)]
        start = stop
    if not instead:
        return calls, result
    placed = [c for call in calls[:-1] for c in instead.get(id(call), [call])]
    return [allocation, *placed, *copies], out


def _is_reshape(call: Call | None) -> TypeGuard[Call]:
    return call is not None and call.func in _RESHAPES

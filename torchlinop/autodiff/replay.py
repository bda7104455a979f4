"""Replaying the kernels of a linear function without the machinery around them.

A product with a linearization is a walk through an autograd graph. The kernels it calls
are the same every time, so after a few calls they are recorded and from then on called
directly. On the way

* kernels that do not depend on the argument are run once and their results kept,
* transposes that cancel and additions of zero are dropped,
* factors that do not depend on the argument are multiplied with each other first,
* a matrix product and the addition that follows it become one kernel,
* matrix products are written where they belong in the result.

A recording that cannot be replayed (it reads a value back to the host, refers to memory
by position, or does not reproduce the recorded result) is discarded, and the function
itself is called as before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten

#: calls of a function before it is recorded
WARM_UP = 3
#: kernels that see more than their arguments' values
_REFUSED = {_aten.as_strided.default, _aten._local_scalar_dense.default}
#: kernels that return their argument under another name
_IDENTITIES = {_aten.detach.default, _aten.alias.default}

Function = Callable[[Tensor], Tensor]


class Replayed:
    """Calls of one linear function of a tensor, replayed from the fourth on.

    The function is handed over with each call, so that its owner, which may own this
    object too, is freed as soon as it is no longer used.
    """

    def __init__(self) -> None:
        self._run: Function | None = None
        self._calls = 0

    def __call__(self, function: Function, x: Tensor) -> Tensor:
        """Evaluate ``function``, always the same one, at a contiguous ``x``."""
        if self._run is not None:
            return self._run(x)
        self._calls += 1
        if self._calls == WARM_UP + 1:
            self._run = record(function, x)
            if self._run is not None:
                return self._run(x)
        return function(x)


def record(function: Function, x: Tensor) -> Function | None:
    """Return the kernels of ``function`` as one function, None if it has no replay."""
    generator = torch.Generator(x.device).manual_seed(0)
    probe = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    x = x.clone()
    with torch.no_grad():
        first, second = _Recorder(), _Recorder()
        with first:
            expected = function(x)
        with second:
            reference = function(probe)
        if not _repeats(first.calls, x, second.calls, probe):
            return None
        run = _compile(first.calls, x, expected)
        if run is None:
            return None
        try:
            replayed = run(probe)
        except Exception:  # whatever it is, the function itself still works
            return None
        error = torch.linalg.vector_norm(replayed - reference)
        scale = torch.linalg.vector_norm(reference)
        close = error <= 1e3 * torch.finfo(x.dtype).eps * scale
        return run if replayed.shape == reference.shape and bool(close) else None


class _Call:
    """One kernel call: what it was given and what it returned."""

    def __init__(self, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
        self.func = func
        self.args = args
        self.kwargs = kwargs
        self.result = result

    def inputs(self) -> list[Tensor]:
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def outputs(self) -> list[Tensor]:
        leaves = pytree.tree_leaves(self.result)
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def written(self) -> list[Tensor]:
        """Arguments that the kernel writes into."""
        found = []
        for i, argument in enumerate(self.func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = self.args[i] if i < len(self.args) else None
                value = self.kwargs.get(argument.name, given)
                found += [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]
        return found


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append(_Call(func, args, kwargs or {}, result))
        return result


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _repeats(first: list[_Call], x: Tensor, second: list[_Call], y: Tensor) -> bool:
    """Whether two recordings differ in nothing but the argument.

    They call the same kernels, and what they read without having made it is the same
    memory: a tensor that was made where the recorder does not see it (by NumPy in a
    custom backward, say) is another one each time.
    """
    if [call.func for call in first] != [call.func for call in second]:
        return False
    made = [{_storage(x)}, {_storage(y)}]
    for calls in zip(first, second, strict=True):
        inputs = [call.inputs() for call in calls]
        outputs = [call.outputs() for call in calls]
        if any(t.layout != torch.strided for t in inputs[0] + outputs[0]):
            return False
        if any(len(pair[0]) != len(pair[1]) for pair in (inputs, outputs)):
            return False
        for a, b in zip(*inputs, strict=True):
            if b.layout != torch.strided:
                return False
            known = _storage(a) in made[0], _storage(b) in made[1]
            if known[0] != known[1] or (not known[0] and _storage(a) != _storage(b)):
                return False
        for side in (0, 1):
            made[side].update(_storage(t) for t in outputs[side])
    return True


def _compile(calls: list[_Call], x: Tensor, result: Tensor) -> Function | None:
    """Select the calls that depend on ``x``, simplify them, and write them as code."""
    live = _dependent(calls, x)
    if any(call.func in _REFUSED or not call.outputs() for call in live):
        return None
    known = {id(x)} | {id(t) for call in live for t in call.outputs()}
    if id(result) not in known:
        return None
    if not any(call.written() for call in live):  # else values change under their names
        live = _simplify(live, known, result)
        live, result = _in_place(live, result)
    return _write(live, x, result)


def _dependent(calls: list[_Call], x: Tensor) -> list[_Call]:
    """Return the calls whose memory depends on ``x``.

    Memory, not values: a buffer of zeros that is later written into has to be made
    anew in every replay. Whatever is written into during the recording counts as
    dependent, since its value at one moment is not what is left of it at the end.
    """
    dependent = {_storage(x)}
    for call in calls:
        dependent.update(_storage(t) for t in call.written())
    size = 0
    while len(dependent) != size:
        size = len(dependent)
        for call in calls:
            if any(_storage(t) in dependent for t in call.inputs()):
                dependent.update(_storage(t) for t in call.outputs())
    return [
        call
        for call in calls
        if any(_storage(t) in dependent for t in call.outputs() + call.written())
    ]


def _simplify(live: list[_Call], known: set[int], result: Tensor) -> list[_Call]:
    """Drop calls that change nothing and gather constant factors."""
    replaced: dict[int, Tensor] = {}
    made_by: dict[int, _Call] = {}
    uses: dict[int, int] = {}
    for call in live:
        for t in call.inputs():
            uses[id(t)] = uses.get(id(t), 0) + 1

    def current(value: Any) -> Any:
        while isinstance(value, Tensor) and id(value) in replaced:
            value = replaced[id(value)]
        return value

    kept = []
    for call in live:
        args = pytree.tree_map(current, call.args)
        kwargs = pytree.tree_map(current, call.kwargs)
        call = _Call(call.func, args, kwargs, call.result)
        same = _same_as(call, made_by, known)
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
    return _needed(kept, result)


def _same_as(call: _Call, made_by: dict[int, _Call], known: set[int]) -> Tensor | None:
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
            if id(other) not in known and same and not other.any():
                return term
    return None


def _gather_factors(
    call: _Call, made_by: dict[int, _Call], known: set[int], uses: dict[int, int]
) -> _Call:
    """Turn ``(u * a) * b`` into ``u * (a * b)`` where ``a`` and ``b`` are constant."""

    def parts(c: _Call) -> tuple[Tensor, Any] | None:
        if c.func is _aten.mul.Scalar:
            return c.args[0], c.args[1]
        if c.func is not _aten.mul.Tensor:
            return None
        a, b = c.args
        if not isinstance(b, Tensor) or id(b) not in known:
            return (a, b) if isinstance(a, Tensor) and id(a) in known else None
        return (b, a) if not isinstance(a, Tensor) or id(a) not in known else None

    outer = parts(call)
    if outer is None or uses.get(id(outer[0]), 0) != 1:
        return call
    inner_call = made_by.get(id(outer[0]))
    inner = parts(inner_call) if inner_call is not None else None
    if inner is None:
        return call
    u, a, b = inner[0], inner[1], outer[1]
    factor = a * b
    shape = factor.shape if isinstance(factor, Tensor) else ()
    if torch.broadcast_shapes(u.shape, shape) != call.result.shape:
        return call
    if isinstance(factor, Tensor) and factor.dtype != call.result.dtype:
        return call
    return _Call(_aten.mul.Tensor, (u, factor), {}, call.result)


def _fuse_product(call: _Call, made_by: dict[int, _Call], uses: dict[int, int]) -> _Call:
    """Turn ``a + m @ n`` into one call, and drop the expansion of a broadcast ``a``."""
    if call.kwargs:
        return call
    for product, other in (call.args, call.args[::-1]):
        made = made_by.get(id(product))
        if made is None or made.func is not _aten.mm.default:
            continue
        if uses.get(id(product), 0) != 1 or not isinstance(other, Tensor):
            continue
        if product.shape != call.result.shape or other.dtype != product.dtype:
            continue
        expanded = made_by.get(id(other))
        if expanded is not None and expanded.func is _aten.expand.default:
            other = expanded.args[0]
        return _Call(_aten.addmm.default, (other, *made.args), {}, call.result)
    return call


def _needed(calls: list[_Call], result: Tensor) -> list[_Call]:
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


def _in_place(calls: list[_Call], result: Tensor) -> tuple[list[_Call], Tensor]:
    """Let matrix products write into their part of a concatenated result."""
    last = calls[-1]
    if last.func is not _aten.cat.default or last.args[1:] or last.kwargs:
        return calls, result
    pieces = last.args[0]
    if any(p.ndim != 1 or p.dtype != result.dtype for p in pieces):
        return calls, result
    made_by = {id(t): call for call in calls for t in call.outputs()}
    uses: dict[int, int] = {}
    for call in calls:
        for t in call.inputs():
            uses[id(t)] = uses.get(id(t), 0) + 1

    out = torch.empty_like(result)
    allocation = _Call(
        _aten.empty.memory_format,
        (list(result.shape),),
        {"dtype": result.dtype, "device": result.device},
        out,
    )
    instead: dict[int, list[_Call]] = {}
    copies = []
    start = 0
    for piece in pieces:
        stop = start + piece.shape[0]
        part = out[start:stop]
        slicing = _Call(_aten.slice.Tensor, (out, 0, start, stop), {}, part)
        reshape = made_by.get(id(piece))
        product = made_by.get(id(reshape.args[0])) if _is_reshape(reshape) else None
        if (
            product is not None
            and product.func in _WITH_OUTPUT
            and uses[id(product.result)] == uses[id(piece)] == 1
        ):
            place = part.view(product.result.shape)
            viewing = _Call(_aten.view.default, (part, list(place.shape)), {}, place)
            kernel = _WITH_OUTPUT[product.func]
            writing = _Call(kernel, product.args, {"out": place}, place)
            instead[id(product)] = [slicing, viewing, writing]
            instead[id(reshape)] = []
        else:
            copies += [slicing, _Call(_aten.copy_.default, (part, piece), {}, part)]
        start = stop
    if not instead:
        return calls, result
    placed = [c for call in calls[:-1] for c in instead.get(id(call), [call])]
    return [allocation, *placed, *copies], out


def _is_reshape(call: _Call | None) -> TypeGuard[_Call]:
    return call is not None and call.func in _RESHAPES


def _write(calls: Sequence[_Call], x: Tensor, result: Tensor) -> Function:
    """Write the calls as the source of a Python function and compile it."""
    names = {id(x): "x"}
    scope: dict[str, Any] = {}
    last_use: dict[int, int] = {}
    for i, call in enumerate(calls):
        for t in call.inputs() + call.outputs():
            last_use[id(t)] = i
    last_use.pop(id(x), None)
    last_use.pop(id(result), None)

    def constant(value: Any, prefix: str) -> str:
        name = f"{prefix}{len(scope)}"
        scope[name] = value
        return name

    def spell(value: Any) -> str:
        if isinstance(value, Tensor):
            if id(value) not in names:
                names[id(value)] = constant(value.detach(), "c")
            return names[id(value)]
        if isinstance(value, (list, tuple)):
            return "[" + ", ".join(spell(v) for v in value) + "]"
        if value is None or isinstance(value, (bool, int)):
            return repr(value)
        return constant(value, "k")

    lines = []
    for i, call in enumerate(calls):
        arguments = [spell(a) for a in call.args]
        arguments += [f"{key}={spell(a)}" for key, a in call.kwargs.items()]
        targets = []
        several = isinstance(call.result, (tuple, list))
        for t in call.result if several else (call.result,):
            if isinstance(t, Tensor):
                targets.append(names.setdefault(id(t), f"t{len(names)}"))
            else:
                targets.append("_")
        left = ", ".join(targets) + ("," if several else "")
        kernel = constant(call.func._op, "f")
        lines.append(f"{left} = {kernel}({', '.join(arguments)})")
        dead = [names[k] for k, last in last_use.items() if last == i and k in names]
        dead = [name for name in dict.fromkeys(dead) if name.startswith("t")]
        if dead:
            lines.append("del " + ", ".join(dead))
    lines.append(f"return {names[id(result)]}")
    source = "def run(x):\n    " + "\n    ".join(lines)
    exec(compile(source, "<replayed kernels>", "exec"), scope)
    return scope.pop("run")  # which refers to scope: no reference cycle

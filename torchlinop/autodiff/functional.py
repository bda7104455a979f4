"""Evaluating a module with other tensors in the place of its own, without touching it.

:func:`torch.func.functional_call` puts the other tensors into the module and takes them
out again afterwards. Whoever looks at the module in between (a thread that trains it, or
everybody, if an interrupt falls between) finds tensors that are not its own. Here the
module's structure is copied and the copy gets the other tensors: modules, and whatever
among their attributes refers to a module or to a replaced tensor, are made anew, and
everything else is shared.

Where a forward pass reaches a parameter on a way that no attribute shows (a global
variable, an attribute of an object that is no module), :class:`Substitution` replaces it
as the argument of the function that it is given to.
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
import sys
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchlinop.autodiff.interruptible import InterruptibleMode

#: replacements by the identity of what is replaced
Replacements = Mapping[int, Tensor]

#: types of which most attributes are, none of which refers to anything
_ATOMS = frozenset({int, float, str, bool, type(None)})


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside of wrappers that only change how it is executed."""
    while True:
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        elif "_orig_mod" in module._modules:  # made by torch.compile
            module = module._modules["_orig_mod"]  # type: ignore[assignment]
        elif isinstance(module, _Direct):
            module = module.inside()
        else:
            return module


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether the module's parameters are sharded by ``fully_shard``."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


class _Direct(nn.Module):
    """In the place of a wrapper: has its hooks, and calls the module inside."""

    def inside(self) -> nn.Module:
        """Return the module that is wrapped."""
        return next(m for m in self._modules.values() if m is not None)

    def __getattr__(self, name: str) -> Any:
        if name in self._modules:
            return self._modules[name]
        return getattr(self.inside(), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inside()(*args, **kwargs)


def scripted_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the parts that TorchScript executes, whose tensors cannot be replaced."""
    for name, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            yield name, part


def with_tensors(
    module: nn.Module, replacements: Replacements
) -> tuple[nn.Module, list[Any]]:
    """Copy the structure of a module, with other tensors.

    Parameters
    ----------
    module
        Not changed, and not executed.
    replacements
        The tensors to use, by the ``id`` of those whose places they take: wherever the
        module holds one (tied parameters, lists of weights), its replacement stands.

    Returns
    -------
    copied : nn.Module
        Wrappers that only change how a module is executed call it directly.
    alive : list
        What weak references in the copy refer to: to be kept while it is used.
    """
    copy = _Copy(replacements)
    return copy(module), copy.alive


class Substitution(InterruptibleMode):
    """Lets torch functions see replacements of their arguments."""

    def __init__(self, replacements: Replacements) -> None:
        super().__init__()
        self._replacements = replacements

    def handle(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """Call ``func`` with the replacements."""
        for value in args:
            if id(value) in self._replacements or isinstance(value, (list, tuple)):
                args = tuple(self._of(a) for a in args)
                break
        if not kwargs:
            return func(*args)
        return func(*args, **{key: self._of(value) for key, value in kwargs.items()})

    def _of(self, value: Any) -> Any:
        if type(value) in (list, tuple):
            return type(value)(self._of(v) for v in value)
        return self._replacements.get(id(value), value)


class _Copy:
    """Copies of objects that refer to modules or to replaced tensors; others are shared."""

    def __init__(self, replacements: Replacements) -> None:
        self._replacements = replacements
        self._copies: dict[int, Any] = {}
        self.alive: list[Any] = []

    def __call__(self, value: Any) -> Any:
        kind = type(value)
        if kind in _ATOMS or (kind in _CONTAINERS and not value):
            return value
        if id(value) in self._copies:
            return self._copies[id(value)]
        copy = _COPIERS.get(kind)
        if copy is None:
            if isinstance(value, nn.Module):
                return self._module(value)
            return self._replacements.get(id(value), value)
        if not self._refers(value):
            return value
        self._copies[id(value)] = copied = copy(self, value)
        return copied

    def _refers(self, value: Any) -> bool:
        """Whether there is a module or a replaced tensor in a container."""
        seen: set[int] = set()
        stack = [value]
        while stack:
            value = stack.pop()
            if type(value) not in _COPIERS:
                if isinstance(value, nn.Module) or id(value) in self._replacements:
                    return True
            elif id(value) not in seen:
                seen.add(id(value))
                stack.extend(_parts(value))
        return False

    def _module(self, module: nn.Module) -> nn.Module:
        if isinstance(module, torch.jit.ScriptModule):
            return module
        kind, state = type(module), vars(module)
        if unwrapped(module) is not module:
            kind = _Direct
            state = {k: v for k, v in state.items() if k not in ("forward", "_forward")}
        if is_fully_sharded(module):
            kind, state = _without_sharding(kind, state)
        copied = object.__new__(kind)
        self._copies[id(module)] = copied  # its parts may refer to it
        new = vars(copied)
        for name, value in state.items():
            part = value if type(value) in _ATOMS else self(value)
            # a forward pass may write into what belongs to the module
            new[name] = value.copy() if part is value and name in _OWN else part
        new["_compiled_call_impl"] = None  # of module.compile()
        for name in copyreg._slotnames(kind):  # type: ignore[attr-defined]
            with contextlib.suppress(AttributeError):  # an empty one
                value = object.__getattribute__(module, name)
                object.__setattr__(copied, name, self(value))
        return copied

    def _list(self, value: list) -> list:
        copied: list[Any] = []
        self._copies[id(value)] = copied
        copied.extend(self(item) for item in value)
        return copied

    def _dict(self, value: dict) -> dict:
        self._copies[id(value)] = copied = type(value)()
        for key, item in value.items():
            copied[self(key)] = self(item)
        return copied

    def _immutable(self, value: Any) -> Any:
        return type(value)(self(item) for item in value)

    def _method(self, value: types.MethodType) -> types.MethodType:
        return types.MethodType(value.__func__, self(value.__self__))

    def _partial(self, value: functools.partial) -> Any:
        func, args, keywords = self(value.func), self(value.args), self(value.keywords)
        return functools.partial(func, *args, **keywords)

    def _function(self, value: types.FunctionType) -> Any:
        compiled = vars(value).get(_COMPILED)
        if compiled is not None:  # by torch.compile
            return self(compiled)
        copied = types.FunctionType(
            value.__code__,
            value.__globals__,
            value.__name__,
            self(value.__defaults__),
            tuple(self._cell(cell) for cell in value.__closure__ or ()),
        )
        copied.__kwdefaults__ = self(value.__kwdefaults__)
        vars(copied).update(vars(value))
        return copied

    def _cell(self, cell: types.CellType) -> types.CellType:
        if id(cell) not in self._copies:
            self._copies[id(cell)] = copied = types.CellType()
            for content in _contents(cell):
                copied.cell_contents = self(content)
        return self._copies[id(cell)]

    def _reference(self, value: weakref.ref) -> Any:
        return weakref.ref(self._alive(value()))

    def _proxy(self, value: Any) -> Any:
        return weakref.proxy(self._alive(_referent(value)))

    def _alive(self, value: Any) -> Any:
        self.alive.append(self(value))
        return self.alive[-1]


def _without_sharding(kind: type, state: dict) -> tuple[type, dict]:
    """Return the class and attributes that a module had before ``fully_shard``."""
    fsdp: Any = sys.modules["torch.distributed.fsdp"]
    plain = next(base for base in kind.__mro__ if not issubclass(base, fsdp.FSDPModule))
    hooks = {
        name: type(state[name])((k, h) for k, h in state[name].items() if not _of_fsdp(h))
        for name in ("_forward_pre_hooks", "_forward_hooks")
    }
    return plain, state | hooks


def _of_fsdp(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp.")


#: types that refer to nothing if they are empty
_CONTAINERS = frozenset({list, dict, OrderedDict, tuple, set})
#: where a module keeps what belongs to it: parameters, buffers, modules, hooks
_OWN = frozenset(k for k, v in vars(nn.Module()).items() if isinstance(v, (dict, set)))
#: where torch.compile keeps the function that it was given
_COMPILED = "_torchdynamo_orig_callable"

_COPIERS: dict[type, Callable[[_Copy, Any], Any]] = {
    list: _Copy._list,
    dict: _Copy._dict,
    OrderedDict: _Copy._dict,
    tuple: _Copy._immutable,
    set: _Copy._immutable,
    types.MethodType: _Copy._method,
    types.FunctionType: _Copy._function,
    functools.partial: _Copy._partial,
    weakref.ref: _Copy._reference,
    weakref.ProxyType: _Copy._proxy,
    weakref.CallableProxyType: _Copy._proxy,
}


def _parts(value: Any) -> list[Any]:
    """What an object of one of the types above refers to."""
    if type(value) in weakref.ProxyTypes:
        return [_referent(value)]
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, types.MethodType):
        return [value.__self__]
    if isinstance(value, types.FunctionType):
        cells = [part for cell in value.__closure__ or () for part in _contents(cell)]
        return [
            *cells,
            value.__defaults__,
            value.__kwdefaults__,
            vars(value).get(_COMPILED),
        ]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, weakref.ref):
        return [value()]
    return list(value)


def _contents(cell: types.CellType) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # not filled yet
        return []


def _referent(proxy: Any) -> Any:
    """Return the module that a weak proxy stands for, if it is one that lives."""
    try:
        method: Any = proxy.modules if isinstance(proxy, nn.Module) else None
        return getattr(method, "__self__", None)
    except ReferenceError:
        return None

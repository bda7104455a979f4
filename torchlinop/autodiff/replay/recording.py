"""Recording the kernels that a function calls, without keeping what they compute."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: bytes of a tensor that is kept while recording although nothing needs it so far
_SMALL = 1 << 12


class Value:
    """A tensor of a recording: what it looks like and which memory it lies in.

    The tensor itself is kept only where a kernel that depends on the argument reads it
    and it does not depend on the argument.
    """

    __slots__ = ("alive", "constant", "device", "dtype", "memory", "shape", "strides")

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, memory: int
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.device = device
        #: what tensors that share their memory have in common: 0 is the argument's,
        #: below are memories that were there before
        self.memory = memory
        self.strides: tuple[int, ...] = ()
        self.constant: Tensor | None = None
        self.alive: Callable[[], Tensor | None] = _nothing

    @classmethod
    def of(cls, tensor: Tensor, memory: int) -> Value:
        """Describe a tensor."""
        value = cls(tensor.shape, tensor.dtype, tensor.device, memory)
        value.strides = tensor.stride()
        value.alive = weakref.ref(tensor)
        return value

    @classmethod
    def fixed(cls, tensor: Tensor, memory: int) -> Value:
        """Describe a constant, and keep it."""
        value = cls.of(tensor, memory)
        value.constant = tensor
        return value


def _nothing() -> None:
    return None


class Call:
    """One kernel call, with a :class:`Value` for each tensor."""

    __slots__ = ("args", "func", "inputs", "kwargs", "outputs", "result")

    def __init__(
        self,
        func: Any,
        args: tuple,
        kwargs: dict,
        result: Any,
        inputs: list[Value] | None = None,
    ) -> None:
        self.func = func
        self.args = args
        self.kwargs = kwargs
        self.result = result
        if inputs is None:
            inputs = [*values_in(args), *values_in(tuple(kwargs.values()))]
        self.inputs = inputs
        self.outputs = [result] if type(result) is Value else values_in(result)

    def written(self) -> list[Value]:
        """Arguments that the kernel writes into."""
        found: list[Value] = []
        for i, name in _written(self.func):
            given = self.args[i] if i < len(self.args) else self.kwargs.get(name)
            found += values_in(given)
        return found


class Recording(NamedTuple):
    """The kernel calls that lead from ``x`` to ``result``."""

    x: Value
    calls: list[Call]
    result: Value
    #: memories that depend on the argument as far as was seen while recording
    dependent: set[int]


def record_calls(
    function: Callable[[Tensor], Tensor], x: Tensor
) -> tuple[Tensor, Recording | None]:
    """Evaluate ``function``; return its result and its calls if they can be told apart."""
    with _Recorder(x) as recorder:
        result = function(x)
    value = recorder.known(result)
    if not recorder.understood or value is None:
        return result, None
    return result, Recording(recorder.x, recorder.calls, value, recorder.dependent)


def mapped(function: Callable[[Any], Any], kind: type, tree: Any) -> Any:
    """Replace the objects of a type in nested lists and tuples."""
    if isinstance(tree, kind):
        return function(tree)
    if type(tree) is list or type(tree) is tuple:
        return type(tree)([mapped(function, kind, part) for part in tree])
    return tree


def values_in(tree: Any) -> list[Value]:
    """Return the values in nested lists and tuples."""
    found: list[Value] = []
    mapped(found.append, Value, tree)
    return found


@functools.cache
def _written(func: Any) -> list[tuple[int, str]]:
    """Positions and names of the arguments that a kernel writes into."""
    return [
        (i, argument.name)
        for i, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


class _Recorder(TorchDispatchMode):
    """Collects kernel calls, as long as each tensor is memory and a shape.

    Below a dispatch mode, PyTorch no longer looks whether a tensor is a zero without
    memory, which forward-mode derivatives make. A kernel that is made of others
    (``mul.Scalar``) would read what is not there. So the kernels are called with the
    dispatch state in which the function would call them.

    A tensor is known by its Python object, as long as that lives; the recorder keeps no
    temporary alive, so recording takes the memory that the function takes.
    """

    #: operators on functions (``torch.cond``) come here, too: they are run, not recorded
    supports_higher_order_operators = True

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.understood = True
        self.dependent = {0}
        self._values: dict[int, Value] = {}
        self._memories = 1
        #: memories that were made while recording, by the address of their storage
        self._made = {_storage(x): 0}
        self.x = self._add(x, 0)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # what is not compiled need not be kept from it: a second of imports

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        included = torch._C._dispatch_tls_local_include_set()
        excluded = torch._C._dispatch_tls_local_exclude_set()
        excluded = excluded.remove(torch._C.DispatchKey.ZeroTensor)
        with torch._C._ForceDispatchKeyGuard(included, excluded):
            result = func(*args, **kwargs)
        if self.understood:
            self.understood = isinstance(func, torch._ops.OpOverload)
            if self.understood:
                self._append(func, args, kwargs, result)
            if not self.understood:
                self.calls.clear()
        return result

    def known(self, tensor: Tensor) -> Value | None:
        """The value of a tensor that has been seen and lives."""
        value = self._values.get(id(tensor))
        return value if value is not None and value.alive() is tensor else None

    def _add(self, tensor: Tensor, memory: int) -> Value:
        value = self._values[id(tensor)] = Value.of(tensor, memory)
        return value

    def _append(self, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
        made: list[Tensor] = [result] if isinstance(result, Tensor) else []
        if not made:
            mapped(made.append, Tensor, result)
        if made and all(t.is_meta for t in made):
            return  # a shape of a product with a lazy zero
        given: list[Tensor] = []
        inputs: list[Value] = []

        def read(tensor: Tensor) -> Value:
            value = self.known(tensor) or self._outside(tensor)
            given.append(tensor)
            inputs.append(value)
            return value

        arguments = tuple([mapped(read, Tensor, value) for value in args])
        if kwargs:
            kwargs = {key: mapped(read, Tensor, value) for key, value in kwargs.items()}
        memories = {}
        if self.understood:
            memories = {_storage(t): v.memory for t, v in zip(given, inputs, strict=True)}

        def write(tensor: Tensor) -> Value:
            return self.known(tensor) or self._result(tensor, memories)

        results = mapped(write, Tensor, result)
        call = Call(func, arguments, kwargs, results, inputs)
        self.calls.append(call)
        dependent = self.dependent
        if _written(func):
            dependent.update([v.memory for v in call.written()])
        if not dependent.isdisjoint([v.memory for v in inputs]):
            dependent.update([v.memory for v in call.outputs])
            for value, tensor in zip(inputs, given, strict=True):
                if value.memory not in dependent:
                    value.constant = tensor
        else:  # if the result is written into later, the call has to be made again
            for value, tensor in zip(inputs, given, strict=True):
                if tensor._is_zerotensor() or tensor.nbytes <= _SMALL:
                    value.constant = tensor

    def _outside(self, tensor: Tensor) -> Value:
        """Describe a tensor that was there before, or was made where nobody saw it."""
        storage = _storage(tensor) if _is_plain(tensor) else 0
        memory = self._made.get(storage, -storage)
        if not storage or (memory >= 0 and memory in self.dependent):
            self.understood = False
            return Value.of(tensor, 0)
        value = self._add(tensor, memory)
        value.constant = tensor  # so that no other storage gets its address
        return value

    def _result(self, tensor: Tensor, memories: dict[int, int]) -> Value:
        if not _is_plain(tensor):
            self.understood = False
            return Value.of(tensor, 0)
        storage = _storage(tensor)
        memory = memories.get(storage)
        if memory is None:
            memory, self._memories = self._memories, self._memories + 1
            self._made[storage] = memory
        return self._add(tensor, memory)


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is memory and a shape, nothing else."""
    return (
        tensor.layout == torch.strided
        and not (tensor.is_meta or tensor.is_nested)
        and type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    )


def _storage(tensor: Tensor) -> int:
    """Address of what tensors that share their memory have in common."""
    return tensor.untyped_storage()._cdata

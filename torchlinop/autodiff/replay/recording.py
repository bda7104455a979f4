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
_TIMES = torch.ops.aten.mul.Scalar


def _nothing() -> None:
    return None


class Value:
    """A tensor of a recording: what it looks like and which memory it lies in.

    The tensor itself is kept only where a kernel that depends on the argument reads it
    and it does not depend on the argument.
    """

    __slots__ = (
        "alive",
        "constant",
        "device",
        "dtype",
        "memory",
        "original",
        "shape",
        "storage",
        "strides",
    )

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
        #: address of the tensor's storage, as long as that lives
        self.storage = 0
        self.alive: Callable[[], Tensor | None] = _nothing
        self.constant: Tensor | None = None
        #: what was there before and has the same entries
        self.original: Value | None = None

    @classmethod
    def of(cls, tensor: Tensor, storage: int, memory: int) -> Value:
        """Describe a tensor with a storage at this address."""
        value = cls(tensor.shape, tensor.dtype, tensor.device, memory)
        value.strides = tensor.stride()
        value.storage = storage
        value.alive = weakref.ref(tensor)
        return value

    @classmethod
    def fixed(cls, tensor: Tensor, memory: int) -> Value:
        """Describe a constant, and keep it."""
        value = cls.of(tensor, 0, memory)
        value.constant = tensor
        return value


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
            inputs = values_in(args)
            if kwargs:
                inputs += values_in(tuple(kwargs.values()))
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
    #: whether these are all
    complete: bool


def record_calls(
    function: Callable[[Tensor], Tensor], x: Tensor
) -> tuple[Tensor, Recording | None]:
    """Evaluate ``function``; return its result and its calls if they can be told apart."""
    with _Recorder(x) as recorder:
        result = function(x)
    value = recorder.known(result)
    if not recorder.understood or value is None:
        return result, None
    calls, found = recorder.calls, recorder.dependent
    return result, Recording(recorder.x, calls, value, found, recorder.complete)


def mapped(function: Callable[[Any], Any], kind: type, tree: Any) -> Any:
    """Replace the objects of a type in nested lists and tuples."""
    if isinstance(tree, kind):
        return function(tree)
    if type(tree) is tuple or type(tree) is list:
        parts = [
            function(part)
            if isinstance(part, kind)
            else mapped(function, kind, part)
            if type(part) is list or type(part) is tuple
            else part
            for part in tree
        ]
        return tuple(parts) if type(tree) is tuple else parts
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
    (``mul.Scalar``) would read what is not there. So kernels that are given such a zero are
    called with the dispatch state in which the function would call them.

    A tensor is known by its Python object, as long as that lives; the recorder keeps no
    temporary alive, so recording takes the memory that the function takes.
    """

    #: operators on functions (``torch.cond``) come here, too: they are run, not recorded
    supports_higher_order_operators = True

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.understood = True
        #: whether a tensor of the current call is not memory and a shape
        self._strange = False
        self.dependent = {0}
        #: whether nothing has become dependent after it had been made
        self.complete = True
        self._values: dict[int, Value] = {}
        self._memories = 1
        #: memories that were made while recording, by the address of their storage
        self._made = {_storage(x): 0}
        self.x = self._values[id(x)] = Value.of(x, _storage(x), 0)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # what is not compiled need not be kept from it: a second of imports

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not (self.understood and isinstance(func, torch._ops.OpOverload)):
            self._give_up()
            return _with_zeros(func, args, kwargs)
        inputs: list[Value] = []
        zeros = False
        values = self._values

        def read(tensor: Tensor) -> Value:
            nonlocal zeros
            zeros = zeros or tensor._is_zerotensor()
            value = values.get(id(tensor))
            if value is None or value.alive() is not tensor:
                value = self._outside(tensor)
            inputs.append(value)
            return value

        arguments = mapped(read, Tensor, args)
        keywords = {}
        if kwargs:
            keywords = {key: mapped(read, Tensor, given) for key, given in kwargs.items()}
        if zeros or self._strange:
            result = _with_zeros(func, args, kwargs)
        else:
            result = func._op(*args, **kwargs)

        def write(tensor: Tensor) -> Value:
            value = values.get(id(tensor))
            if value is None or value.alive() is not tensor:
                value = self._result(tensor, inputs)
            return value

        results = mapped(write, Tensor, result)
        if not self._strange:
            self._append(Call(func, arguments, keywords, results, inputs))
        elif not _are_shapes(result):  # of a product with a lazy zero
            self._give_up()
        self._strange = False
        return result

    def known(self, tensor: Tensor) -> Value | None:
        """The value of a tensor that has been seen and lives."""
        value = self._values.get(id(tensor))
        return value if value is not None and value.alive() is tensor else None

    def _append(self, call: Call) -> None:
        self.calls.append(call)
        dependent = self.dependent
        if _written(call.func):
            for value in call.written():
                self.complete = self.complete and value.memory in dependent
                dependent.add(value.memory)
                tensor = value.alive()
                value.storage = 0 if tensor is None else _storage(tensor)
        depends = False
        for value in call.inputs:
            depends = depends or value.memory in dependent
        if depends:
            dependent.update([value.memory for value in call.outputs])
        elif call.func is _TIMES and call.args[1] == 1:  # of addcmul's derivative
            _note_copy(call.result, call.args[0])
        for value in call.inputs:
            # where the result is written into later, the call has to be made again
            if value.memory not in dependent and (depends or _is_small(value.alive())):
                same = value.original
                value.constant = value.alive() if same is None else same.constant

    def _give_up(self) -> None:
        self.understood = False
        self.calls.clear()

    def _outside(self, tensor: Tensor) -> Value:
        """Describe a tensor that was there before, or was made where nobody saw it."""
        storage = _storage(tensor) if _is_plain(tensor) else 0
        memory = self._made.get(storage, -storage)
        if not storage or (memory >= 0 and memory in self.dependent):
            self._strange = True
            return self.x
        value = self._values[id(tensor)] = Value.of(tensor, storage, memory)
        value.constant = tensor  # so that no other storage gets its address
        return value

    def _result(self, tensor: Tensor, inputs: list[Value]) -> Value:
        if not _is_plain(tensor):
            self._strange = True
            return self.x
        storage = _storage(tensor)
        for value in inputs:
            if value.storage == storage:
                memory = value.memory
                break
        else:
            memory, self._memories = self._memories, self._memories + 1
            self._made[storage] = memory
        made = self._values[id(tensor)] = Value.of(tensor, storage, memory)
        return made


def _with_zeros(func: Any, args: tuple, kwargs: dict) -> Any:
    """Call a kernel that looks whether its arguments are zeros without memory."""
    included = torch._C._dispatch_tls_local_include_set()
    excluded = torch._C._dispatch_tls_local_exclude_set()
    excluded = excluded.remove(torch._C.DispatchKey.ZeroTensor)
    with torch._C._ForceDispatchKeyGuard(included, excluded):
        return func(*args, **kwargs)


def _are_shapes(result: Any) -> bool:
    """Whether all that a kernel has made are tensors on the meta device."""
    made: list[Tensor] = []
    mapped(made.append, Tensor, result)
    return bool(made) and all(t.is_meta for t in made)


def _note_copy(copy: Value, original: Value) -> None:
    """Let what was there before stand for a copy, which then need not be kept."""
    if original.memory < 0 and looks_like(copy, original):
        copy.original, copy.memory = original, original.memory


def looks_like(a: Value, b: Value) -> bool:
    """Whether two tensors have the same type and layout."""
    return a.dtype == b.dtype and a.shape == b.shape and a.strides == b.strides


def _is_small(tensor: Tensor | None) -> bool:
    return tensor is not None and (tensor._is_zerotensor() or tensor.nbytes <= _SMALL)


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

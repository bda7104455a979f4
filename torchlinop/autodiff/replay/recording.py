"""Recording the kernels that a function calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Call:
    """One kernel call: what it was given and what it returned."""

    def __init__(self, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
        self.func = func
        self.args = args
        self.kwargs = kwargs
        self.result = result

    def inputs(self) -> list[Tensor]:
        """Tensors that the kernel was given."""
        return _tensors((self.args, self.kwargs))

    def outputs(self) -> list[Tensor]:
        """Tensors that the kernel returned."""
        return _tensors(self.result)

    def written(self) -> list[Tensor]:
        """Arguments that the kernel writes into."""
        found = []
        for i, argument in enumerate(self.func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = self.args[i] if i < len(self.args) else None
                found += _tensors(self.kwargs.get(argument.name, given))
        return found


@dataclass(frozen=True)
class Recording:
    """The kernel calls that lead from ``x`` to ``result``."""

    x: Tensor
    calls: list[Call]
    result: Tensor


def record_calls(function: Callable[[Tensor], Tensor], x: Tensor) -> Recording | None:
    """Evaluate ``function`` and return its calls, None if they cannot be told apart."""
    with _Recorder() as recorder:
        result = function(x)
    return Recording(x, recorder.calls, result) if recorder.understood else None


class _Recorder(TorchDispatchMode):
    """Collects kernel calls, as long as each tensor is memory and a shape.

    Below a dispatch mode, PyTorch no longer looks whether a tensor is a zero without
    memory, which forward-mode derivatives make. A kernel that is made of others
    (``mul.Scalar``) would read what is not there. So the kernels are called with the
    dispatch state in which the function would call them.
    """

    #: operators on functions (``torch.cond``) come here, too: they are run, not recorded
    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # what is not compiled need not be kept from it: a second of imports

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.understood = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        included = torch._C._dispatch_tls_local_include_set()
        excluded = torch._C._dispatch_tls_local_exclude_set()
        excluded = excluded.remove(torch._C.DispatchKey.ZeroTensor)
        with torch._C._ForceDispatchKeyGuard(included, excluded):
            result = func(*args, **(kwargs or {}))
        if self.understood:
            self._append(Call(func, args, kwargs or {}, result))
        return result

    def _append(self, call: Call) -> None:
        outputs = call.outputs()
        if outputs and all(t.is_meta for t in outputs):
            return  # a shape of a product with a lazy zero
        if isinstance(call.func, torch._ops.OpOverload) and all(
            _is_plain(t) for t in call.inputs() + outputs
        ):
            self.calls.append(call)
        else:
            self.understood = False
            self.calls.clear()


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is memory and a shape, nothing else."""
    return (
        tensor.layout == torch.strided
        and not (tensor.is_meta or tensor.is_nested)
        and type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    )


def storage(tensor: Tensor) -> int:
    """Return what tensors that share their memory have in common."""
    return tensor.untyped_storage()._cdata


def repeats(first: Recording, second: Recording) -> bool:
    """Whether two recordings differ in nothing but the argument.

    They call the same kernels with the same numbers, and what they read without having
    made it is the same memory: a tensor that was made where the recorder does not see it
    (by NumPy in a custom backward, say) is another one each time.
    """
    if len(first.calls) != len(second.calls):
        return False
    made = {storage(first.x)}, {storage(second.x)}
    for a, b in zip(first.calls, second.calls, strict=True):
        if a.func is not b.func or not _same_numbers(a, b):
            return False
        for s, t in zip(a.inputs(), b.inputs(), strict=True):
            known = storage(s) in made[0], storage(t) in made[1]
            if known[0] != known[1] or (not known[0] and storage(s) != storage(t)):
                return False
        for side, call in zip(made, (a, b), strict=True):
            side.update(storage(t) for t in call.outputs())
    return True


def _same_numbers(a: Call, b: Call) -> bool:
    """Whether two calls have the same structure and agree in all but their tensors."""
    ours, structure = pytree.tree_flatten((a.args, a.kwargs, a.result))
    theirs, other = pytree.tree_flatten((b.args, b.kwargs, b.result))
    return structure == other and all(
        isinstance(t, Tensor)
        if isinstance(s, Tensor)
        else s is t or bool(s == t) or bool(s != s and t != t)
        for s, t in zip(ours, theirs, strict=True)
    )


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]

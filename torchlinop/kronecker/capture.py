"""Seeing how a model uses its parameters, call by call, while it is evaluated.

A function mode sees each call of a torch function that has a leaf (what stands for a
parameter) among its arguments, whoever makes it: a module, a plain function, a weight
that is tied or used several times. Nothing is hooked onto modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchlinop.autodiff.interruptible import InterruptibleMode, in_force
from torchlinop.autodiff.rules.normalizations import FIRST as NORMALIZATIONS
from torchlinop.kronecker.rules import RULES, Parameter
from torchlinop.kronecker.uses import Use

_T: Any = torch.Tensor
#: functions that may return the transpose of a matrix, or some of its rows
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
            return _call(func, args, kwargs)
        if func is F.multi_head_attention_forward:
            return self._look_inside(func, args, kwargs)
        rule = RULES.get(func)
        found = None if rule is None else rule(self.find, *args, **kwargs)
        result = _call(func, args, kwargs)
        if found is not None:
            uses = found if isinstance(found, tuple) else (found,)
            for use in uses:
                use.record(_name(func), result)
            self.uses.extend(uses)
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
            part._is_view()  # rows by their numbers are copied
            and part.shape[1:] == whole.shape[1:]
            and part.stride() == whole.stride()
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


def _call(func: Callable, args: tuple, kwargs: dict) -> Any:
    """Call a function, a normalization such that its first derivative is cheap."""
    rule = NORMALIZATIONS.get(func)
    if rule is not None:
        result = rule(*args, **kwargs)
        if result is not NotImplemented:
            return result
    return func(*args, **kwargs)


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

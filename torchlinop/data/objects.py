"""Tensors in objects of any kind: finding them, and moving them in a copy.

Looked into are mappings, lists and tuples, what torch's pytrees know, and the attributes
of everything else (dataclasses, slots, the user's own classes).
"""

from __future__ import annotations

import contextlib
import copy
import operator
import sys
import types
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_PLAIN = (bool, int, float, complex, str, bytes, np.generic, type(None))
_FOREIGN = (type, nn.Module, types.ModuleType, types.FunctionType, weakref.ref)
_ENTRIES = (list, tuple, deque)


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors in an object, and its NumPy arrays as tensors to be watched."""
    if type(value) is Tensor:
        return [value]
    found = [_shared(x) if isinstance(x, np.ndarray) else x for x in leaves(value)]
    return [x for x in found if isinstance(x, Tensor)]


def plain_values(value: Any) -> list[Any]:
    """Return the numbers and strings in an object."""
    if type(value) is tuple and all(type(v) is Tensor for v in value):
        return []
    return [x for x in leaves(value) if isinstance(x, _PLAIN)]


def leaves(value: Any) -> Iterator[Any]:
    """Yield all that an object consists of and that is not looked into."""
    return _leaves(value, set())


def _leaves(value: Any, above: set[int]) -> Iterator[Any]:
    parts = _parts(value)
    if parts is None:
        yield value
    elif id(value) not in above:  # an object may hold itself
        above.add(id(value))
        for part in parts:
            yield from _leaves(part, above)
        above.remove(id(value))


def _parts(value: Any) -> Iterable[Any] | None:
    """Return what an object consists of, or None where it is not looked into."""
    if isinstance(value, (Tensor, np.ndarray, *_PLAIN, *_FOREIGN)):
        return None
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, _ENTRIES):
        return value
    if type(value) in pytree.SUPPORTED_NODES:
        return pytree.SUPPORTED_NODES[type(value)].flatten_fn(value)[0]
    attributes = _attributes(value)
    return attributes.values() if attributes else None


def _attributes(value: Any) -> dict[str, Any]:
    """Return the attributes of an object of the user's own, or of another library's."""
    if _is_pythons(type(value)):
        return {}
    found = dict(getattr(value, "__dict__", {}))
    for cls in type(value).__mro__:
        slots = vars(cls).get("__slots__", ())
        for slot in [slots] if isinstance(slots, str) else slots:
            private = slot.startswith("__") and not slot.endswith("__")
            name = f"_{cls.__name__.lstrip('_')}{slot}" if private else slot
            if name in ("__dict__", "__weakref__"):
                continue
            with contextlib.suppress(AttributeError):  # an empty slot
                found[name] = object.__getattribute__(value, name)
    return found


def _is_pythons(kind: type) -> bool:
    """Whether a class, with all above it, is Python's own."""
    roots = (cls.__module__.partition(".")[0] for cls in kind.__mro__)
    return all(root in sys.stdlib_module_names for root in roots)


# --------------------------------------------------------------------------- moving


def moved(value: Any, device: torch.device) -> Any:
    """Return a copy of the structure of an object, with its tensors on ``device``.

    An object that has a method ``to`` is asked to move itself, on a copy since that
    may well be in place. Tensors made in inference mode are cloned: autograd cannot save
    them.
    """

    def to_device(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if device.type == "cuda" and _may_be_pinned(leaf):
            leaf = leaf.pin_memory()  # else the host waits for the copy
        here = leaf.to(device, non_blocking=True)
        return here.clone() if here.is_inference() else here

    if isinstance(value, Tensor):
        return to_device(value)
    return _Rebuild(to_device, device).of(value)


class _Rebuild:
    """A copy of all containers, in which every leaf is replaced.

    Parameters
    ----------
    replace
        From a leaf to what takes its place.
    device
        Where objects with a method ``to`` are sent, or None to treat them like others.
    """

    def __init__(
        self, replace: Callable[[Any], Any], device: torch.device | None = None
    ) -> None:
        self._replace = replace
        self._device = device
        self._done: dict[int, tuple[Any, Any]] = {}  # keeps the keys' objects alive

    def of(self, value: Any) -> Any:
        parts = _parts(value)
        if id(value) in self._done:
            return self._done[id(value)][1]
        moves = not isinstance(value, (Tensor, *_FOREIGN)) and callable(
            getattr(type(value), "to", None)
        )
        if self._device is not None and moves and (parts is None or tensors_of(value)):
            return self._sent(value, self._device)
        if parts is None:
            return self._replace(value)
        return self._copied(value) if tensors_of(value) else value

    def _sent(self, value: Any, device: torch.device) -> Any:
        private = _Rebuild(lambda leaf: leaf).of(value)
        there = private.to(device)
        there = private if there is None else there
        if any(t.is_inference() for t in tensors_of(there)):
            there = _Rebuild(_without_inference).of(there)
        self._done[id(value)] = value, there
        return there

    def _copied(self, value: Any) -> Any:
        kind = type(value)
        if isinstance(value, tuple):
            entries = [self.of(part) for part in value]
            if hasattr(value, "_make"):
                return value._make(entries)
            return tuple(entries) if kind is tuple else kind(entries)
        if isinstance(value, Mapping) and not isinstance(value, MutableMapping):
            return {key: self.of(part) for key, part in value.items()}
        is_entries = isinstance(value, (list, deque, MutableMapping))
        if not is_entries and kind in pytree.SUPPORTED_NODES:
            node = pytree.SUPPORTED_NODES[kind]
            parts, context = node.flatten_fn(value)
            return node.unflatten_fn([self.of(part) for part in parts], context)
        try:
            new = copy.copy(value)
        except Exception as error:
            raise TypeError(
                f"The data holds a {kind.__name__}, which cannot be copied ({error}). "
                "Give it __copy__, or yield its tensors in a dict or a list."
            ) from error
        self._done[id(value)] = value, new
        if isinstance(new, MutableMapping):
            for key in list(new):
                new[key] = self.of(new[key])
        elif isinstance(new, (list, deque)):
            for index, part in enumerate(new):
                new[index] = self.of(part)
        else:
            for name, part in _attributes(new).items():
                replaced = self.of(part)
                if replaced is not part:
                    object.__setattr__(new, name, replaced)  # it may be frozen
        return new


def _may_be_pinned(tensor: Tensor) -> bool:
    return (
        tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and type(tensor) is Tensor
        and not tensor.is_nested
    )


def _without_inference(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf


# ------------------------------------------------------------------- what stays hidden


def hiding(value: Any) -> Iterator[type]:
    """Yield the types of objects in which no tensor is found, though one may be there."""
    if isinstance(value, (Tensor, np.ndarray, *_PLAIN, *_FOREIGN)):
        return
    if isinstance(value, Mapping) and tensors_of(value):
        return
    if isinstance(value, (dict, *_ENTRIES)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from hiding(part)
        return
    known = type(value).__module__ == "torch" or _is_pythons(type(value))
    if not known and not tensors_of(value):
        yield type(value)


def warn_of_hiding(kind: type) -> None:
    """Say that changes in objects of this type are not noticed."""
    warnings.warn(
        f"The data holds objects of type {kind.__name__}, in which no tensors are found. "
        "They are passed to the model"
        + (", after .to(device)" if hasattr(kind, "to") else " as they are")
        + "; changes inside of them are not noticed: call refresh() after one.",
        UserWarning,
        stacklevel=2,
    )


class Snapshot:
    """The items of a list and what they consist of, to notice that a part was replaced."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = list(items)
        self._open = [item for item in self._items if not _is_fixed(item)]
        self._parts = self._parts_now()

    def holds(self, items: Iterable[Any]) -> bool:
        """Whether these are the same items, made of the same parts."""
        now = list(items)
        if len(now) != len(self._items) or not all(map(operator.is_, now, self._items)):
            return False
        if not self._open:
            return True
        parts = self._parts_now()
        return len(parts) == len(self._parts) and all(map(is_same, parts, self._parts))

    def _parts_now(self) -> list[Any]:
        return [part for item in self._open for part in leaves(item)]


def _is_fixed(item: Any) -> bool:
    """Whether nothing in an item can be replaced."""
    return type(item) is tuple and all(type(part) is Tensor for part in item)


def is_same(a: Any, b: Any) -> bool:
    """Whether two values are one object, or equal numbers or strings."""
    return a is b or (type(a) is type(b) and isinstance(a, _PLAIN) and bool(a == b))


def _shared(array: np.ndarray) -> Tensor | None:
    """Return a NumPy array in the data as a tensor, to be watched."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it may be read-only; it is only read
            return torch.from_numpy(array)
    except (TypeError, ValueError):
        return None

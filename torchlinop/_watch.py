"""Noticing that something a kept result depends on has changed.

A linearization is stale as soon as a parameter, a buffer or a data tensor changed. Each
product asks; the answer has to be cheap, so three kinds of evidence are combined:

* where a tensor lives and PyTorch's version counter of it, which every in-place
  operation increments;
* for tensors on the CPU, which may be changed behind that counter (``p.data.mul_(2)``, a
  NumPy array that shares the memory), the bits themselves, or a checksum of many of
  them: one read of the tensor;
* for modules, which object sits in each slot, and the training flag where it matters.

On a GPU the bits are not read, because that would stall the stream in every product;
after a change through ``.data`` there, the owner calls ``refresh()``.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

#: lanes of the checksum; a prime, so that rows of a matrix fall into different lanes
_LANES = 1021
#: tensors up to this many bytes are compared as they are
_EXACT_BYTES = 1 << 16
_VERSION = operator.attrgetter("_version")


class Watch:
    """A set of tensors and modules whose changes are noticed.

    Parameters
    ----------
    tensors
        Watched for changes of place, version and, on the CPU, content.
    modules
        Watched for replaced parameters, buffers and children; the parameters and buffers
        are watched as tensors too.
    flags
        Modules whose ``training`` attribute changes what they compute.
    facts
        Functions whose values are compared.
    """

    def __init__(
        self,
        tensors: Iterable[Tensor],
        *,
        modules: Iterable[nn.Module] = (),
        flags: Iterable[nn.Module] = (),
        facts: Iterable[Callable[[], object]] = (),
    ) -> None:
        self._slots: list[Mapping[Any, Any]] = []
        self._entries: list[tuple[Callable[[Any], object], Any, object]] = []
        watched = {id(t): t for t in tensors}
        for module in modules:
            for child in module.modules():
                if isinstance(child, torch.jit.ScriptModule):  # it has no slots
                    watched |= {id(t): t for t in (*child.parameters(), *child.buffers())}
                    continue
                for slots in (
                    child._parameters,
                    child._buffers,
                    child._modules,
                    child._forward_hooks,
                    child._forward_pre_hooks,
                ):
                    self._slots.append(slots)
                    for name, value in slots.items():
                        self._entries.append((slots.get, name, value))
                        if isinstance(value, Tensor):
                            watched[id(value)] = value
        for tensor in watched.values():
            for name, part in _parts_of_wrapper(tensor).items():
                self._entries.append((functools.partial(getattr, tensor), name, part))
        everything = [part for t in watched.values() for part in _with_parts(t)]
        # those made in inference mode have no version
        self._versioned = [t for t in everything if not t.is_inference()]
        self._placed = [t for t in everything if _is_plain(t)]
        self._flags = list(flags)
        self._facts = list(facts)
        self._state = self._look()
        contents = [_content_of(t) for t in self._placed]
        self._bits = [c for c in contents if isinstance(c, memoryview)]
        self._copies = [bytearray(bits) for bits in self._bits]
        self._digests = [c for c in contents if callable(c)]
        self._sums = [digest() for digest in self._digests]

    def changed(self) -> bool:
        """Whether anything differs from when this watch was set up."""
        for get, name, value in self._entries:
            if get(name) is not value:
                return True
        return (
            self._look() != self._state
            or self._copies != self._bits  # bytearrays compare memory without a copy of it
            or [digest() for digest in self._digests] != self._sums
        )

    def _look(self) -> list[object]:
        """Return what differs after a change, but for content. Costs in every product."""
        return [
            *map(len, self._slots),
            *map(_VERSION, self._versioned),
            *map(Tensor.data_ptr, self._placed),
            *[m.training for m in self._flags],
            *[fact() for fact in self._facts],
        ]


#: names of the methods that give what a sparse tensor consists of
_SPARSE_PARTS = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}


def _with_parts(tensor: Tensor) -> list[Tensor]:
    """Return a tensor and, where it has no memory of its own, those that it is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        parts = [*_parts_of_wrapper(tensor).values()]
    elif tensor.is_nested:
        parts = [tensor.values()]
    else:
        names = _SPARSE_PARTS.get(tensor.layout, ())
        parts = [getattr(tensor, name)() for name in names]
    return [tensor, *(p for part in parts for p in _with_parts(part))]


def _parts_of_wrapper(tensor: Tensor) -> dict[str, Tensor]:
    """Return what a wrapper is made of, for instance a DTensor of its local part."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return {}
    names, _ = tensor.__tensor_flatten__()
    parts = {name: getattr(tensor, name) for name in names}
    return {name: part for name, part in parts.items() if isinstance(part, Tensor)}


def _is_plain(tensor: Tensor) -> bool:
    """Whether the tensor has memory of its own, with strides."""
    return (
        tensor.layout == torch.strided
        and not tensor.is_nested
        and not hasattr(tensor, "__tensor_flatten__")
    )


def _content_of(tensor: Tensor) -> memoryview | Callable[[], bytes] | None:
    """Return the tensor's bits, or a function that digests them, or None on a GPU."""
    if tensor.device.type != "cpu" or tensor.numel() == 0 or tensor.data_ptr() == 0:
        return None
    flat = tensor.detach().as_subclass(Tensor)
    if flat.is_conj() or flat.is_neg() or not _dense(flat):
        return lambda: _bytes(flat)
    bits = _memory(flat)
    if bits.size <= _EXACT_BYTES:
        return memoryview(bits.data)
    start = -bits.ctypes.data % 8  # to the first aligned word
    words = bits[start : start + (bits.size - start) // 8 * 8].view(np.uint64)
    ends = bits[:start], bits[start + words.size * 8 :]
    whole = words.size // _LANES * _LANES
    lanes = words[:whole].reshape(-1, _LANES)
    rest = words[whole:]
    # in a sum of 64-bit words an even number of flipped sign bits cancels
    signed = lanes.view(np.float64) if tensor.dtype == torch.float64 else None

    loose = [part for part in (rest, *ends) if part.size]

    def digest() -> bytes:
        total: bytes = np.add.reduce(lanes, axis=0).tobytes()
        for part in loose:
            total += part.tobytes()
        if signed is not None:
            with np.errstate(all="ignore"):
                total += np.add.reduce(signed, axis=0).tobytes()
        return total

    return digest


def _bytes(tensor: Tensor) -> bytes:
    plain = tensor.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return _memory(plain).tobytes()


def _memory(tensor: Tensor) -> np.ndarray:
    """View the memory that the elements of a dense tensor fill.

    Not by ``Tensor.numpy``, after which the storage could never be resized again.
    """
    view = torch.empty(0, dtype=torch.uint8, device="cpu")
    start, size = tensor.storage_offset() * tensor.itemsize, tensor.nbytes
    view.set_(tensor.untyped_storage(), start, (size,), (1,))
    return np.from_dlpack(view)


def _dense(tensor: Tensor) -> bool:
    """Whether the elements fill one block of memory, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True

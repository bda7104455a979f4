"""Linearizations on the host: what a graph saves goes there, for those too large to stay.

A product copies all that one graph has saved to the device at once, so that it takes the
device's memory for that time only.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from torchlinop.autodiff.columns import LinearRows, Rows
from torchlinop.autodiff.experience import Experience, Pace
from torchlinop.autodiff.linearize import saved_elsewhere


class HostMemory:
    """What one graph has saved, on the host.

    Parameters
    ----------
    device
        Where it is computed and used.
    stay
        Tensors that live on the device anyway, such as the parameters.

    Attributes
    ----------
    nbytes : int
        Bytes on the host.
    """

    def __init__(self, device: torch.device, stay: Sequence[Tensor]) -> None:
        self._device = device
        self._stay = {t.untyped_storage().data_ptr() for t in stay}
        #: memory on the host, and while the graph is recorded what it is a copy of
        self._copies: list[Tensor] = []
        self._originals: list[Tensor] = []
        self._places: dict[tuple[int, int], int] = {}
        #: which belong to the graph: a failed attempt to record one has left others
        self._saved: list[weakref.ref[_Saved]] = []
        self._lock = threading.Lock()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Copy to the host what graphs save that are recorded in this context."""
        with saved_elsewhere(), saved_tensors_hooks(self._pack, _unpack):
            yield
        used = {saved.place for saved in self._living()}
        for place in range(len(self._copies)):
            if place not in used:
                self._copies[place] = self._copies[place][:0].clone()
        for saved in self._living():
            saved.view = None
        self._originals.clear()
        self._places.clear()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Have a copy on the device, where the graph can be used by this thread."""
        with self._lock:
            here = [copy.to(self._device, non_blocking=True) for copy in self._copies]
            try:
                for saved in self._living():
                    saved.view = saved.of(here[saved.place])
                yield
            finally:
                for saved in self._living():
                    saved.view = None

    @property
    def nbytes(self) -> int:
        """Bytes on the host; of page-locked memory torch takes powers of two."""
        sizes = [copy.nbytes for copy in self._copies if copy.nbytes]
        if self._device.type == "cuda":
            sizes = [1 << (size - 1).bit_length() for size in sizes]
        return sum(sizes)

    def _living(self) -> list[_Saved]:
        return [saved for ref in self._saved if (saved := ref()) is not None]

    def _pack(self, tensor: Tensor) -> Tensor | _Saved:
        plain = type(tensor) is Tensor and tensor.layout == torch.strided
        if not plain or tensor.device != self._device or not tensor.numel():
            return tensor
        tensor = tensor.resolve_conj().resolve_neg()
        memory = tensor.untyped_storage()
        if memory.data_ptr() in self._stay:
            return tensor
        key = memory.data_ptr(), tensor._version
        place = self._places.setdefault(key, len(self._copies))
        if place == len(self._copies):
            self._originals.append(tensor)  # so that its address is not used again
            self._copies.append(_on_host(tensor))
        saved = _Saved(tensor, place)
        self._saved.append(weakref.ref(saved))
        return saved


class _Saved:
    """A tensor of a graph, as a place in memory."""

    def __init__(self, tensor: Tensor, place: int) -> None:
        self.place = place
        self._dtype = tensor.dtype
        self._shape = tensor.storage_offset(), tensor.shape, tensor.stride()
        #: while it is on the device
        self.view: Tensor | None = tensor

    def of(self, memory: Tensor) -> Tensor:
        """Return the tensor in a copy of its memory."""
        view = torch.empty(0, dtype=self._dtype, device=memory.device)
        return view.set_(memory.untyped_storage(), *self._shape)


def _unpack(saved: Tensor | _Saved) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    assert saved.view is not None
    return saved.view


def _on_host(tensor: Tensor) -> Tensor:
    """Copy the memory of a tensor to the host, as bytes."""
    memory = tensor.untyped_storage()
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    flat.set_(memory, 0, (memory.nbytes(),), (1,))
    pinned = tensor.device.type == "cuda"
    copy = torch.empty(len(flat), dtype=torch.uint8, device="cpu", pin_memory=pinned)
    return copy.copy_(flat, non_blocking=pinned)


class HostedRows(Rows):
    """A linear function of rows whose linearization is on the host.

    It is never replayed: that would keep what it reads on the device.

    Parameters
    ----------
    rows
        Recorded in ``memory.recording()``.
    memory
        What its graph has saved.
    """

    def __init__(self, rows: LinearRows, memory: HostMemory) -> None:
        self._rows, self._memory = rows, memory
        self.pace = Pace()
        self.calls = 0

    @staticmethod
    def of(
        linearize: Callable[[], LinearRows], device: torch.device, stay: Sequence[Tensor]
    ) -> HostedRows:
        """Linearize onto the host."""
        memory = HostMemory(device, stay)
        with memory.recording():
            rows = linearize()
        return HostedRows(rows, memory)

    @property
    def nbytes(self) -> int:
        """What it takes on the device, while it is not used."""
        return self._rows.nbytes

    @property
    def host_bytes(self) -> int:
        """What it takes on the host, and on the device during a product."""
        return self._memory.nbytes

    @property
    def row_bytes(self) -> int:
        """A measure of the memory that each row of a block takes."""
        return self._rows.nbytes + self._memory.nbytes

    def row(self, v: Tensor, experience: Experience, remaining: int = 0) -> Tensor:
        """Apply the function to a contiguous ``(dim,)``."""
        self.calls += 1
        with self._memory.on_device():
            return self._rows(v)

    def block(self, rows: Tensor) -> Tensor:
        """Apply the function to ``(K, dim)`` in one vectorized pass."""
        with self._memory.on_device():
            return self._rows.block(rows)

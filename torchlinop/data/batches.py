"""One item of the data: its tensors, its size, its way to the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torchlinop.data.checks import require_number, require_pair
from torchlinop.data.objects import moved, tensors_of


@dataclass(frozen=True)
class Batch:
    """One ``(X, y)`` of the data."""

    position: int
    X: Any
    y: Any
    size: int
    #: its tensors as the data yielded them, before they were moved
    sources: tuple[Tensor, ...]
    #: whether it is made of several
    joined: bool = False

    def to(self, device: torch.device) -> Batch:
        """Return a copy on a device; the user's objects stay as they are."""
        if all(
            type(part) is Tensor and part.device == device and not part.is_inference()
            for part in (self.X, self.y)
        ):
            return self
        X, y = moved((self.X, self.y), device)
        return replace(self, X=X, y=y)

    def leave(self) -> None:
        """Let go of the data, where only its place and size will be asked for."""
        for name, nothing in (("X", None), ("y", None), ("sources", ())):
            object.__setattr__(self, name, nothing)


def as_batch(position: int, item: Any, batch_size: Callable[[Any], int]) -> Batch:
    """Return an item of the data as a batch, where it is."""
    X, y = require_pair(position, item)
    size = require_number(batch_size(X), X)
    return Batch(position, X, y, size, (*tensors_of(X), *tensors_of(y)))


def joined(batches: Sequence[Batch]) -> Batch | None:
    """Return several batches, on one device, as one; None where that is not obvious."""
    X = _concatenated([batch.X for batch in batches])
    y = _concatenated([batch.y for batch in batches])
    if X is None or y is None:
        return None
    return Batch(batches[0].position, X, y, sum(b.size for b in batches), (), joined=True)


def _concatenated(parts: Sequence[Any]) -> Tensor | None:
    """Concatenate plain tensors of one kind."""
    for part in parts:
        if type(part) is not Tensor or part.layout != torch.strided or part.is_nested:
            return None
        if part.ndim == 0 or part.requires_grad:
            return None
    kinds = {(part.dtype, part.device, part.shape[1:]) for part in parts}
    return torch.cat(list(parts)) if len(kinds) == 1 else None


def leading_dimension(X: Any) -> int:
    """Return the number of samples in an ``X`` if nothing else is said.

    That is ``X.num_graphs`` where there is one (a torch_geometric ``Batch``), and the
    first dimension of the first tensor otherwise.
    """
    graphs = None if isinstance(X, Tensor) else getattr(X, "num_graphs", None)
    if isinstance(graphs, int):
        return graphs
    tensors = tensors_of(X)
    for tensor in tensors:
        if tensor.ndim > 0:
            return len(tensor) if tensor.is_nested else tensor.shape[0]
    if tensors:
        return 1
    raise TypeError(
        f"The number of samples in an X of type {type(X).__name__} is not known: it "
        "holds no tensor. Pass batch_size=, a function from X to that number."
    )

"""Iterating over a data set: checks, devices, sizes, progress."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, RandomSampler
from tqdm import tqdm

from torchlinop._typing import Data


@dataclass(frozen=True)
class Batch:
    """One ``(X, y)`` of the data, on the operator's device."""

    position: int
    X: Any
    y: Any
    size: int
    #: its tensors as the data yielded them, before they were moved
    sources: tuple[Tensor, ...]


class DataChangedError(RuntimeError):
    """The data yields something else than in an earlier pass."""


class DataSource:
    """A re-iterable of ``(X, y)`` as batches on one device, the same in every pass.

    Parameters
    ----------
    data
        A list of ``(X, y)``, a DataLoader, or any other re-iterable. ``X`` is passed to
        the model as it is: a tensor, or a dict or list that holds tensors.
    device
        Where the batches are needed.
    batch_size
        Number of samples in an ``X``. By default the first dimension of the first tensor
        found in it.
    ordered
        Whether the order of the samples matters to the caller.
    progressbar
        Show progress over the batches of every pass.

    Raises
    ------
    TypeError
        ``data`` is no re-iterable of pairs.
    """

    def __init__(
        self,
        data: Data,
        device: torch.device,
        *,
        batch_size: Callable[[Any], int] | None = None,
        ordered: bool = False,
        progressbar: bool = False,
    ) -> None:
        _check_reiterable(data)
        self._data = data
        self._device = device
        self._batch_size = batch_size or _leading_dimension
        self._ordered = ordered
        self._progressbar = progressbar
        self._digests: list[int] = []
        self.shuffles = False

    def survey(self, measure: Callable[[Batch], float]) -> float:
        """Pass over the data once and add up ``measure(batch)``.

        Records what later passes are checked against. Tensors stay where they are.
        """
        total, digests = 0.0, []
        for index, item in enumerate(self._data):
            batch = self._batch(index, item)
            total += measure(batch)
            digests.append(_digest(batch))
        if not digests:
            raise ValueError(
                "data is empty: it yielded no (X, y). If it is a generator or an "
                "iterator that was used before, pass a list or a DataLoader."
            )
        self._digests = digests
        first = self._batch(0, next(iter(self._data)))
        self.shuffles = _is_shuffled(self._data) or _digest(first) != digests[0]
        if self.shuffles and self._ordered:
            raise ValueError(
                "The data comes in another order in every pass (it is shuffled), but "
                "this operator's rows or samples follow the order. Pass a list of "
                "batches, or a DataLoader with shuffle=False."
            )
        return total

    def lasting_tensors(self) -> list[Tensor]:
        """Tensors that are the same objects in every pass: those of a list of batches."""
        if not isinstance(self._data, (list, tuple)):
            return []
        batches = (self._batch(i, item) for i, item in enumerate(self._data))
        return [tensor for batch in batches for tensor in batch.sources]

    @property
    def num_batches(self) -> int:
        """Number of batches, once surveyed."""
        return len(self._digests)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches, on the device; notice data that changed between passes."""
        items: Iterable = self._data
        if self._progressbar:
            items = tqdm(items, total=self.num_batches or None, desc="batches")
        count = 0
        for index, item in enumerate(items):
            batch = self._batch(index, item)
            if not self.shuffles and (
                index >= self.num_batches or _digest(batch) != self._digests[index]
            ):
                raise DataChangedError(
                    f"Batch {index} of the data is not the one that an earlier pass "
                    "yielded. Use data that repeats itself: no random augmentation, no "
                    "one-shot iterator."
                )
            count += 1
            X, y = pytree.tree_map_only(Tensor, self._move, (batch.X, batch.y))
            yield replace(batch, X=X, y=y)
        if count != self.num_batches:
            raise DataChangedError(
                f"The data yielded {count} batches in this pass and {self.num_batches} "
                "in an earlier one. Use data that repeats itself, such as a list or a "
                "DataLoader."
            )

    def _move(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)

    def _batch(self, index: int, item: Any) -> Batch:
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            got = type(item).__name__
            if isinstance(item, (tuple, list)):
                got += f" of length {len(item)}"
            raise TypeError(
                f"Every item of data has to be a pair (X, y), item {index} is a {got}. "
                "For one batch write data=[(X, y)]."
            )
        X, y = item
        leaves = pytree.tree_leaves((dict(X) if isinstance(X, Mapping) else X, y))
        sources = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
        return Batch(index, X, y, int(self._batch_size(X)), sources)


def _check_reiterable(data: Any) -> None:
    if not hasattr(data, "__iter__"):
        raise TypeError(
            "data has to be a re-iterable of (X, y), such as a list or a DataLoader, "
            f"got {type(data).__name__}."
        )
    if isinstance(data, (Tensor, Mapping)):
        raise TypeError(
            f"data has to be a re-iterable of pairs (X, y), got {type(data).__name__}. "
            "For one batch write data=[(X, y)]."
        )
    if hasattr(data, "__next__"):
        raise TypeError(
            f"data is a {type(data).__name__}, which can be read only once; every "
            "product reads all data. Pass list(data), or a DataLoader."
        )


def _is_shuffled(data: Data) -> bool:
    return isinstance(data, DataLoader) and isinstance(data.sampler, RandomSampler)


def _leading_dimension(X: Any) -> int:
    for leaf in pytree.tree_leaves(dict(X) if isinstance(X, Mapping) else X):
        if isinstance(leaf, Tensor) and leaf.ndim > 0:
            return leaf.shape[0]
    if isinstance(X, Tensor):
        return 1
    raise TypeError(
        f"The number of samples in an X of type {type(X).__name__} is not known: it "
        "holds no tensor. Pass batch_size=, a function from X to that number."
    )


def _digest(batch: Batch) -> int:
    """Return a number that tells batches apart by shapes and leading entries."""
    digest = 0
    for tensor in batch.sources:
        digest = zlib.crc32(repr((tuple(tensor.shape), tensor.dtype)).encode(), digest)
        head = (
            tensor.detach()
            .reshape(-1)[:256]
            .cpu()
            .clone(memory_format=torch.contiguous_format)
        )
        digest = zlib.crc32(head.view(torch.uint8).numpy().tobytes(), digest)
    return digest

"""Iterating over a data set: checks, devices, sizes, progress."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    RandomSampler,
    Subset,
    TensorDataset,
)
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


@dataclass(frozen=True)
class Survey:
    """What a pass over the data has found."""

    digests: tuple[int, ...]
    shuffles: bool


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
        progressbar: bool = False,
    ) -> None:
        _check_reiterable(data)
        self._data = data
        self._device = device
        self._batch_size = batch_size or _leading_dimension
        self._progressbar = progressbar
        self._survey = Survey((), False)

    def survey(self, look: Callable[[Batch], None], *, check: bool) -> Survey:
        """Pass over the data once and ``look`` at every batch.

        Records what later passes are checked against. Tensors stay where they are.
        """
        digests = []
        with torch.random.fork_rng(devices=[]):  # a DataLoader draws a seed
            for index, item in enumerate(self._data):
                batch = self._batch(index, item)
                look(batch)
                digests.append(_digest(batch))
        if not digests:
            raise ValueError(
                "data is empty: it yielded no (X, y). If it is a generator or an "
                "iterator that was used before, pass a list or a DataLoader."
            )
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(1)  # data that draws its order shows it
            first = self._batch(0, next(iter(self._data)))
        shuffles = _is_shuffled(self._data) or _digest(first) != digests[0]
        return Survey(tuple(digests), shuffles)

    def accept(self, survey: Survey) -> None:
        """Check later passes against this survey."""
        self._survey = survey

    @property
    def shuffles(self) -> bool:
        """Whether every pass has an order of its own."""
        return self._survey.shuffles

    def require_order(self) -> None:
        """Refuse data that shuffles."""
        if self.shuffles:
            raise ValueError(
                "The data comes in another order in every pass (it is shuffled), but "
                "this operator's rows or samples follow the order. Pass a list of "
                "batches, or a DataLoader with shuffle=False."
            )

    def moved(self, batch: Batch) -> Batch:
        """Return a batch with its tensors on the device."""
        X, y = pytree.tree_map_only(Tensor, self._move, (batch.X, batch.y))
        return replace(batch, X=X, y=y)

    def lasting_tensors(self) -> list[Tensor]:
        """Tensors that every pass reads: those of a list, or behind a DataLoader."""
        if isinstance(self._data, DataLoader):
            return list(_dataset_tensors(self._data.dataset))
        if not self.lasts:
            return []
        batches = (self._batch(i, item) for i, item in enumerate(self._data))
        return [tensor for batch in batches for tensor in batch.sources]

    @property
    def lasts(self) -> bool:
        """Whether every pass yields the same objects."""
        return isinstance(self._data, (list, tuple))

    def identity(self) -> object:
        """Return what is compared to notice that entries of a list were replaced."""
        if not self.lasts:
            return None
        objects: list[Any] = list(self._data)
        for item in self._data:
            if type(item) is not tuple:
                objects += item
            for part in item:
                if type(part) is Tensor:
                    continue
                if isinstance(part, Mapping):
                    objects += part.values()
                elif isinstance(part, (list, tuple)):
                    objects += part
        return _SameObjects(objects)

    @property
    def num_batches(self) -> int:
        """Number of batches, once surveyed."""
        return len(self._survey.digests)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches, on the device; notice data that changed between passes."""
        with torch.random.fork_rng(devices=[]):
            yield from self._pass()

    def _pass(self) -> Iterator[Batch]:
        items: Iterable = self._data
        if self._progressbar:
            items = tqdm(items, total=self.num_batches or None, desc="batches")
        count = 0
        for index, item in enumerate(items):
            batch = self._batch(index, item)
            if not self.shuffles and (
                index >= self.num_batches or _digest(batch) != self._survey.digests[index]
            ):
                raise DataChangedError(
                    f"Batch {index} of the data is not the one that an earlier pass "
                    "yielded. Use data that repeats itself: no random augmentation, no "
                    "one-shot iterator."
                )
            count += 1
            yield self.moved(batch)
        if count != self.num_batches:
            raise DataChangedError(
                f"The data yielded {count} batches in this pass and {self.num_batches} "
                "in an earlier one. Use data that repeats itself, such as a list or a "
                "DataLoader."
            )

    def _move(self, tensor: Tensor) -> Tensor:
        moved = tensor.to(self._device, non_blocking=True)
        return moved.clone() if moved.is_inference() else moved

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
        leaves = [_shared(a) if isinstance(a, np.ndarray) else a for a in leaves]
        sources = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
        return Batch(index, X, y, int(self._batch_size(X)), sources)


class _SameObjects:
    """Equal to another list of the very same objects."""

    def __init__(self, objects: list[Any]) -> None:
        self._objects = objects

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _SameObjects)
            and len(self._objects) == len(other._objects)
            and all(a is b for a, b in zip(self._objects, other._objects, strict=True))
        )

    __hash__ = None  # type: ignore[assignment]


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


def _shared(array: np.ndarray) -> Tensor | None:
    """Return a NumPy array in the data as a tensor, to be watched."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it may be read-only; it is only read
            return torch.from_numpy(array)
    except (TypeError, ValueError):
        return None


def _dataset_tensors(dataset: Any) -> Iterator[Tensor]:
    """Yield the tensors that the usual wrappers of data sets hold."""
    if isinstance(dataset, TensorDataset):
        yield from dataset.tensors
    elif isinstance(dataset, Subset):
        yield from _dataset_tensors(dataset.dataset)
    elif isinstance(dataset, ConcatDataset):
        for part in dataset.datasets:
            yield from _dataset_tensors(part)
    elif isinstance(dataset, (list, tuple)):
        for leaf in pytree.tree_leaves(list(dataset)):
            if isinstance(leaf, Tensor):
                yield leaf


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
        if tensor.layout != torch.strided:
            continue
        head = (
            tensor.detach()
            .reshape(-1)[:256]
            .cpu()
            .clone(memory_format=torch.contiguous_format)
        )
        digest = zlib.crc32(head.view(torch.uint8).numpy().tobytes(), digest)
    return digest

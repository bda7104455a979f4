"""Worker processes of a DataLoader that are kept from pass to pass."""

from __future__ import annotations

import itertools
import os
import random
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from torchlinop.data.objects import is_same

#: of a loader, for another one of the same data set
_OPTIONS = (
    "num_workers",
    "timeout",
    "multiprocessing_context",
    "prefetch_factor",
    "in_order",  # not in older versions
)


def reads_indices(data: Any) -> bool:
    """Whether passes are those of torch's own DataLoader over indices."""
    return (
        isinstance(data, DataLoader)
        and type(data).__iter__ is DataLoader.__iter__
        and type(data)._get_iterator is DataLoader._get_iterator
        and not isinstance(data.dataset, IterableDataset)
    )


def index_sampler(loader: DataLoader) -> Iterable[Any]:
    """Return what draws the indices of each batch."""
    return loader.sampler if loader.batch_sampler is None else loader.batch_sampler


def options_of(loader: DataLoader) -> dict[str, Any]:
    """Return how a loader reads, whatever its order."""
    return {name: getattr(loader, name) for name in _OPTIONS if hasattr(loader, name)}


class KeptWorkers:
    """A DataLoader's passes, read by worker processes that last.

    The user's loader is only asked for its indices. Its workers are started by a loader of
    our own, and start their random numbers anew in each pass, as new ones would.

    Parameters
    ----------
    loader
        The user's.
    device
        Where the batches will be needed: on the way to a GPU they lie in pinned memory.
    """

    def __init__(self, loader: DataLoader, device: torch.device) -> None:
        self._loader = loader
        self._device = device
        #: at most one that no pass is using
        self._idle: list[_Reader] = []
        # outlives a reference cycle, in which torch's end of workers takes seconds
        weakref.finalize(self, _stop, self._idle)

    @staticmethod
    def of(data: Any, device: torch.device) -> KeptWorkers | None:
        """Return the kept workers of a DataLoader, None where there are none.

        That is so where new workers prepare themselves for a pass: by ``worker_init_fn``,
        or for an ``IterableDataset``.
        """
        if (
            reads_indices(data)
            and data.num_workers > 0
            and (data.worker_init_fn is None or data.persistent_workers)
        ):
            return KeptWorkers(data, device)
        return None

    def __reduce__(self) -> Any:
        """Pickle without processes."""
        return KeptWorkers, (self._loader, self._device)

    def __iter__(self) -> Iterator[Any]:
        """Yield the items of a pass.

        The workers are kept where it ends or is abandoned; not after an error.
        """
        reader = self._taken()
        try:
            yield from reader.loader
        except GeneratorExit:
            pass
        except BaseException:
            reader.stop()
            raise
        if self._idle:  # another pass was quicker
            reader.stop()
        else:
            self._idle.append(reader)

    def stop(self) -> None:
        """End the workers; the next pass starts new ones, from the data set as it is."""
        _stop(self._idle)

    def _taken(self) -> _Reader:
        facts = [os.getpid(), *_facts(self._loader)]
        if self._idle:
            reader = self._idle.pop()
            if reader.is_usable(facts):
                return reader
            reader.stop()
        return _Reader(self._own_loader(), facts)

    def _own_loader(self) -> DataLoader:
        loader = self._loader
        many = loader.batch_sampler is not None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the user's has given the same ones
            return DataLoader(
                _Reading(loader.dataset, loader.collate_fn, many),
                batch_size=None,
                sampler=_Marked(loader),
                collate_fn=_as_it_is,
                worker_init_fn=loader.worker_init_fn,
                persistent_workers=True,
                pin_memory=loader.pin_memory or self._device.type == "cuda",
                generator=torch.Generator("cpu"),  # for a number that nobody uses
                **options_of(loader),
            )


class _Reader(NamedTuple):
    """A loader with workers of its own, and what they were started with."""

    loader: DataLoader
    facts: list[Any]

    def is_usable(self, facts: list[Any]) -> bool:
        """Whether there are workers, and new ones would read the same."""
        return (
            len(facts) == len(self.facts)
            and all(map(is_same, facts, self.facts))
            # Ctrl-C in a terminal ends them, too
            and all(worker.is_alive() for worker in self._workers())
        )

    def stop(self) -> None:
        """End the workers, in the process that has started them."""
        if self.facts[0] != os.getpid():
            _INHERITED.append(self)  # else its end would be that of the workers
        elif self._workers():
            self._iterator._shutdown_workers()

    @property
    def _iterator(self) -> Any:
        return self.loader._iterator

    def _workers(self) -> list[Any]:
        return [] if self._iterator is None else self._iterator._workers


def _stop(readers: list[_Reader]) -> None:
    while readers:
        readers.pop().stop()


#: readers of the process from which this one was forked
_INHERITED: list[_Reader] = []


class _Marked:
    """The indices of a loader, marked with the pass and where its random numbers start."""

    def __init__(self, loader: DataLoader) -> None:
        self._loader = loader
        self._passes = itertools.count()

    def __iter__(self) -> Iterator[tuple[int, int, Any]]:
        number = next(self._passes)
        # on the CPU and from this generator, as the loader itself would draw it
        seed = torch.empty((), dtype=torch.int64, device="cpu")
        start = int(seed.random_(generator=self._loader.generator))
        for index in index_sampler(self._loader):
            yield number, start, index

    def __len__(self) -> int:
        return len(index_sampler(self._loader))  # type: ignore[arg-type]


class _Reading(Dataset):
    """The items of a pass, made in a worker."""

    def __init__(self, dataset: Any, collate: Callable[[Any], Any], many: bool) -> None:
        self._dataset = dataset
        self._collate = collate
        self._many = many
        self._pass: int | None = None

    def __getitem__(self, marked: tuple[int, int, Any]) -> Any:
        number, start, index = marked
        if number != self._pass:
            self._pass = number
            worker = get_worker_info()
            seed = start + (0 if worker is None else worker.id)
            random.seed(seed)
            torch.manual_seed(seed)
            np.random.seed([seed & 0xFFFFFFFF, seed >> 32])
        if not self._many:
            return self._collate(self._dataset[index])
        at_once = getattr(self._dataset, "__getitems__", None)
        samples = at_once(index) if at_once else [self._dataset[i] for i in index]
        return self._collate(samples)


def _as_it_is(item: Any) -> Any:
    return item


def _facts(value: Any, above: tuple[Any, ...] = ()) -> Iterator[Any]:
    """Yield what workers have a copy of: attributes of a loader and of its data sets."""
    for part in vars(value).values():
        yield part
        if isinstance(part, Dataset) and not any(part is other for other in above):
            yield from _facts(part, (*above, part))  # a data set may hold itself

"""Passes over a data set: all batches, on one device, the same in every pass."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

from torchlinop._progress import Bar
from torchlinop._typing import Data
from torchlinop.data.batches import Batch, as_batch, leading_dimension
from torchlinop.data.checks import require_reiterable
from torchlinop.data.digests import Content, content, leading
from torchlinop.data.objects import Snapshot, hiding, tensors_of, warn_of_hiding
from torchlinop.data.repeats import Repeats, compare, index_order, invariant_total
from torchlinop.data.seeds import seeded_pass
from torchlinop.data.transfer import transferred
from torchlinop.data.workers import KeptWorkers


class DataChangedError(RuntimeError):
    """The data yields something else than in an earlier pass."""


@dataclass(frozen=True)
class Survey:
    """What a pass over the data found, and later passes are checked against.

    Attributes
    ----------
    digests
        Of the leading entries of each batch.
    repeats
        How the data repeats itself.
    total
        Numbers that are the same for any order, where the order changes.
    """

    digests: tuple[int, ...] = ()
    repeats: Repeats = field(default_factory=lambda: Repeats(shuffles=False))
    total: tuple[int, int] | None = None

    def require_order(self) -> None:
        """Refuse data that comes in another order in every pass."""
        if self.repeats.shuffles:
            raise ValueError(
                "The data comes in another order in every pass (it is shuffled), but "
                "this operator's rows or samples follow the order. Pass a list of "
                "batches, or a DataLoader with shuffle=False."
            )


class DataSource:
    """A re-iterable of ``(X, y)`` as batches on one device, the same in every pass.

    Every pass starts from the same random state, so that data which draws its order from
    the global generators, or from those of a DataLoader, repeats it. These generators are
    the user's own again whenever an item has been read.

    Parameters
    ----------
    data
        A list of ``(X, y)``, a DataLoader, or any other re-iterable. ``X`` is passed to
        the model as it is, in a copy whose tensors are on ``device``: a tensor, or any
        object that holds tensors.
    device
        Where the batches are needed.
    batch_size
        Number of samples in an ``X``. By default ``X.num_graphs`` if there is such a
        number, and the first dimension of the first tensor in ``X`` otherwise.
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
        require_reiterable(data)
        self._data = data
        self._device = device
        self._batch_size = batch_size or leading_dimension
        self._progressbar = progressbar
        self._survey = Survey()
        self._snapshot: Snapshot | None = None
        self._hiding: set[type] = set()
        self._workers = KeptWorkers.of(data, device)

    def survey(self, look: Callable[[Batch], None], *, check: bool) -> Survey:
        """Pass over the data, ``look`` at every batch, and say what is there.

        Tensors stay where they are. Nothing is assigned: see :meth:`accept`.

        Parameters
        ----------
        look
            Called once with every batch.
        check
            Read the data a second time, from another random state, and refuse data that
            is random. Without, data that changes its order is recognised by the indices
            that a DataLoader draws, or by its first batch.

        Raises
        ------
        ValueError
            The data is random.
        """
        self.rest()  # new workers copy the data set as it is now
        try:
            return self._look_at_all(look, check=check)
        except BaseException:
            self.rest()
            raise

    def _look_at_all(self, look: Callable[[Batch], None], *, check: bool) -> Survey:
        check = check and not self.lasts
        shuffles = False if self.lasts else index_order(self._data, check=check)
        digests: list[int] = []
        contents: list[Content] = []
        for batch in self._batches(self._data, 0):
            look(batch)
            self._warn_of_hiding(batch)
            digests.append(leading(batch))
            if check:
                contents.append(content(batch))
        if not digests:
            return Survey()
        if check:
            repeats = compare(self._data, contents, shuffles, self._contents)
            total = invariant_total(contents, repeats)
            return Survey(tuple(digests), repeats, total)
        if shuffles is None:
            with closing(self._batches(self._data, 1)) as batches:
                first = next(batches, None)
            shuffles = first is None or leading(first) != digests[0]
        return Survey(tuple(digests), Repeats(shuffles))

    def accept(self, survey: Survey) -> None:
        """Check later passes against a survey."""
        self._survey = survey

    def require_order(self) -> None:
        """Refuse data that comes in another order in every pass.

        Raises
        ------
        ValueError
            It does, in the accepted survey.
        """
        self._survey.require_order()

    @property
    def shuffles(self) -> bool:
        """Whether the order changes from pass to pass."""
        return self._survey.repeats.shuffles

    @property
    def num_batches(self) -> int:
        """Number of batches, once surveyed."""
        return len(self._survey.digests)

    @property
    def lasts(self) -> bool:
        """Whether every pass yields the same objects."""
        own = getattr(type(self._data), "__iter__", None)
        return own is list.__iter__ or own is tuple.__iter__

    def lasting_tensors(self) -> list[Tensor]:
        """Tensors that every pass reads: those of a list, or behind a DataLoader."""
        if isinstance(self._data, DataLoader):
            return list(_dataset_tensors(self._data.dataset))
        return tensors_of(self._data) if self.lasts else []

    def identity(self) -> object:
        """Return an object that is another one when parts of a list were replaced."""
        if self.lasts and not (self._snapshot and self._snapshot.holds(self._data)):
            self._snapshot = Snapshot(self._data)
        return self._snapshot

    def rest(self) -> None:
        """End the worker processes that wait for the next pass."""
        if self._workers is not None:
            self._workers.stop()

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches, on the device; notice data that changed between passes.

        Raises
        ------
        DataChangedError
            Something else came than in the pass of the accepted survey. If the order
            changes, that shows at the end of a pass.
        """
        return transferred(self._unchanged(), self._device)

    def _unchanged(self) -> Iterator[Batch]:
        """Yield the batches of an accepted survey, where they are."""
        survey = self._survey
        contents: list[Content] = []
        number = 0
        for batch in self._batches(self._data, 0, progressbar=self._progressbar):
            number += 1
            if self.lasts:
                pass  # it is watched
            elif not survey.repeats.shuffles:
                _require_digest(batch, survey.digests)
            elif survey.total is not None:
                contents.append(content(batch))
            yield batch
        if number != len(survey.digests):
            raise DataChangedError(
                f"The data yielded {number} batches in this pass and "
                f"{len(survey.digests)} in an earlier one. Use data that repeats itself, "
                "such as a list or a DataLoader."
            )
        if invariant_total(contents, survey.repeats) != survey.total:
            raise DataChangedError(
                "The data yielded other samples in this pass than in an earlier one, not "
                "only another order. Use data that repeats itself: no random "
                "augmentation, no random sampling."
            )

    def _batches(
        self, data: Iterable[Any], seed: int, *, progressbar: bool = False
    ) -> Generator[Batch]:
        reader = self._workers if data is self._data else None
        items = data if self.lasts else seeded_pass(data, seed, reader=reader)
        if progressbar:
            items = Bar(items, total=self.num_batches or None, desc="batches")
        for position, item in enumerate(items):
            yield as_batch(position, item, self._batch_size)

    def _contents(self, data: Iterable[Any], seed: int) -> Iterator[Content]:
        return map(content, self._batches(data, seed))

    def _warn_of_hiding(self, batch: Batch) -> None:
        for kind in hiding((batch.X, batch.y)):
            if kind not in self._hiding:
                self._hiding.add(kind)
                warn_of_hiding(kind)


def _require_digest(batch: Batch, digests: tuple[int, ...]) -> None:
    position = batch.position
    if position >= len(digests) or leading(batch) != digests[position]:
        raise DataChangedError(
            f"Batch {position} of the data is not the one that an earlier pass yielded. "
            "Use data that repeats itself: no random augmentation, no one-shot iterator."
        )


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
        yield from tensors_of(dataset)

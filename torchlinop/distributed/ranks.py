"""The processes whose shares of the data make one matrix: where contributions add up."""

from __future__ import annotations

import math
import weakref
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from torchlinop._spread import whole
from torchlinop.distributed.checksums import checksum
from torchlinop.distributed.line import Line

Found = TypeVar("Found")


class Ranks(ABC):
    """Processes that compute one matrix, each with a share of the data.

    Attributes
    ----------
    alone : bool
        Whether there is one process only.
    rank : int
        Of this process among them.
    members : tuple of int
        What the whole program numbers them by.
    """

    alone: bool
    rank: int
    members: tuple[int, ...]

    @abstractmethod
    def sum(
        self, part: Callable[[], Tensor], x: Tensor, shape: tuple[int, ...], what: str
    ) -> Tensor:
        """Add up what ``part`` returns on every rank: the same bits everywhere.

        Parameters
        ----------
        part
            Computes this rank's contribution. What it raises is raised on every rank.
        x
            What it is computed from, the same on every rank; the result has its dtype and
            device.
        shape
            Of the contribution.
        what
            What is being done, the same on every rank, as part of a sentence.

        Raises
        ------
        LostRankError
            A rank has ended.
        ValueError
            The ranks do not compute the same.
        """

    @abstractmethod
    def whole(self, tensors: Sequence[Tensor], what: str) -> list[Tensor]:
        """Return all of tensors that are spread over the processes (``DTensor``)."""

    @abstractmethod
    def together(self, find: Callable[[], Found], what: str) -> list[Found]:
        """Return what ``find`` returns on every rank, by rank.

        What it raises is raised on every rank.
        """

    def on_each(self, make: Callable[[], Found], what: str) -> Found:
        """Return what ``make`` returns here; what it raises is raised on every rank."""
        made: list[Found] = []
        self.together(lambda: made.append(make()), what)
        return made[0]


class Alone(Ranks):
    """One process that has all of the data."""

    alone, rank = True, 0
    members = ()  # whatever it is

    def sum(
        self, part: Callable[[], Tensor], x: Tensor, shape: tuple[int, ...], what: str
    ) -> Tensor:
        """Return the only contribution."""
        return part()

    def whole(self, tensors: Sequence[Tensor], what: str) -> list[Tensor]:
        """Return the tensors."""
        return [whole(tensor) for tensor in tensors]

    def together(self, find: Callable[[], Found], what: str) -> list[Found]:
        """Return the only finding."""
        return [find()]


class ProcessRanks(Ranks):
    """The ranks of a process group. Calls are collective: every rank makes the same ones.

    Each begins with a few numbers by which the ranks see whether they do the same,
    since torch.distributed ends processes that do not.

    Parameters
    ----------
    group
        A process group that this process belongs to.
    """

    alone = False

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.line = Line(group)
        self.rank = self.line.rank
        self.members = tuple(dist.get_process_group_ranks(group))
        #: whether a driver decides what the ranks do
        self.driven = False
        #: whether this rank does what the driver has told all to do: 2 at once, 1 so far
        self._told = 0
        self._talking = False

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "What belongs to a process group cannot be pickled or copied: build it on "
            "every rank."
        )

    def sum(
        self, part: Callable[[], Tensor], x: Tensor, shape: tuple[int, ...], what: str
    ) -> Tensor:
        """Add up contributions: one all-reduce of them and a sign whether all is well."""
        what = f"{what} for a result of shape {tuple(shape)}"
        with self._conversation(what):
            self._require_same(what, x)
            total = x.new_empty(math.prod(shape) + 1)
            error: BaseException | None = None
            try:
                with self.line.interrupts.allowed():
                    total[:-1] = part().reshape(-1)
                total[-1] = 0
            except BaseException as raised:  # an interrupt, too, has to be told
                error = raised
                total.zero_()
                total[-1] = 1
            self.line.all_reduce(total, what)
            if total[-1] != 0:
                self.line.raise_together(error, what)
            return total[:-1].view(shape)

    def whole(self, tensors: Sequence[Tensor], what: str) -> list[Tensor]:
        """Gather tensors, once all ranks are there."""
        with self._conversation(what):
            self._told = min(self._told, 1)
            self._require_same(what, None)
            return [self.line.whole(tensor, what) for tensor in tensors]

    def together(self, find: Callable[[], Found], what: str) -> list[Found]:
        """Gather findings."""
        with self._conversation(what):
            self._told = min(self._told, 1)
            self._require_same(what, None)
            error: BaseException | None = None
            found: Found | None = None
            try:
                with self.line.interrupts.allowed():
                    found = find()
            except BaseException as raised:
                error = raised
            told = self.line.gather((error is None, found), what)
            if not all(well for well, _ in told):
                self.line.raise_together(error, what)
            return [finding for _, finding in told]

    @contextmanager
    def _conversation(self, what: str) -> Iterator[None]:
        if self.driven and not self._told:
            raise RuntimeError(
                f"A driver decides what the ranks do, but rank {self.line.rank} was "
                f"{what} by itself. Inside of the driver use the operators that it gave, "
                "on rank 0; do the rest before or after it."
            )
        with self.line.lock, self.line.interrupts.held():
            if self._talking:
                raise RuntimeError(
                    f"Rank {self.line.rank} was {what} for its part in something else. An "
                    "operator with process_group= cannot be a part of what each rank "
                    "computes by itself, such as its columns."
                )
            self._talking = True
            try:
                yield
            finally:
                self._talking = False

    @contextmanager
    def told(self) -> Iterator[None]:
        """Do what the driver has told every rank to do."""
        self._told = 2
        try:
            yield
        finally:
            self._told = 0

    def _require_same(self, what: str, x: Tensor | None) -> None:
        """Refuse ranks that do something else, or multiply another vector."""
        if self._told == 2:  # with the vector that has just been sent
            self._told = 1
            return
        device = self.line.device if x is None else x.device
        key = torch.tensor(zlib.crc32(what.encode()) << 30, device=device)
        if x is not None:
            key = key + checksum(x)
        # zero exactly if the ranks have the same key, but for an accident
        weight = self.line.size - 1 if self.line.rank == 0 else -1
        difference = key * weight
        self.line.all_reduce(difference, what)
        if difference != 0:
            self._refuse(what, int(key))

    def _refuse(self, what: str, key: int) -> NoReturn:
        told = self.line.gather((what, key), what)
        whats = [said for said, _ in told]
        if len(set(whats)) > 1:
            listing = "; ".join(f"rank {r} was {said}" for r, said in enumerate(whats))
            raise ValueError(
                f"The ranks do not do the same: {listing}. Run the same program on every "
                "rank, or let rank 0 decide: torchlinop.distributed.driver."
            )
        others = [r for r, (_, its) in enumerate(told) if its != told[0][1]]
        raise ValueError(
            f"The ranks were {what}, but rank {others[0]} has another vector than rank 0. "
            "Pass the same on every rank, or let rank 0 decide: "
            "torchlinop.distributed.driver."
        )


ALONE = Alone()
#: one for each group, since its ranks talk about one thing at a time
_RANKS: weakref.WeakKeyDictionary[Any, ProcessRanks] = weakref.WeakKeyDictionary()


def ranks_of(process_group: Any) -> Ranks:
    """Return the ranks of what a user gave as a process group.

    Raises
    ------
    TypeError
        It is none.
    RuntimeError
        It does not exist, or this process does not belong to it.
    """
    if isinstance(process_group, str) and process_group == "alone":
        return ALONE
    return process_ranks(process_group)


def process_ranks(group: Any) -> ProcessRanks:
    """Return the ranks of a process group."""
    if not dist.is_available():
        raise RuntimeError("This build of PyTorch has no torch.distributed.")
    if group is None or not dist.is_initialized():
        raise RuntimeError(
            "The process group is not initialized. Call "
            "torch.distributed.init_process_group() first, and start the program by "
            "torchrun; without process_group, one process has all of the data."
        )
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise RuntimeError(
            f"Process {dist.get_rank()} does not belong to the process group. Build the "
            "operator on the group's ranks only."
        )
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "process_group has to be a process group of torch.distributed, such as "
            f"torch.distributed.group.WORLD, got {type(group).__name__}."
        )
    if dist.get_rank(group) < 0:
        raise RuntimeError("The process group has been destroyed.")
    found = _RANKS.get(group)
    if found is None:
        found = _RANKS[group] = ProcessRanks(group)
    return found

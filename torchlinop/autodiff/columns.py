"""Applying a linearization to vectors in whichever way has been seen to be cheapest.

One by one, by replaying the kernels, or in blocks: what is faster depends on the model
and the machine, so it is measured while products are computed that are needed anyway.
"""

from __future__ import annotations

import math
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from torchlinop.autodiff.experience import Experience, Pace
from torchlinop.autodiff.replay import Replay, Unchecked, pays, record
from torchlinop.autodiff.transposing import as_rows, write_columns

#: calls of a function before it may be recorded: the first ones are slower than the rest
WARM_UP = 3
#: replays after which one that is no faster is dropped; less if it is slower than by noise
_TRIALS, _SLOWER = 12, 1.15
#: a replay that takes more than this part of the function's time is not worth its memory
_PAYS = 0.97
#: bytes of columns that are made rows at once
COPIED = 64 << 20


class RowFunction(Protocol):
    """A linear function of a row ``(dim,)``, or of rows ``(K, dim)`` if batched."""

    def __call__(self, v: Tensor, /, *, batched: bool = False) -> Tensor:
        """Map ``(dim,)`` to a fresh ``(dim_out,)``, or ``(K, dim)`` to ``(K, dim_out)``."""


class Rows(ABC):
    """A linear function of rows, applied to the columns of matrices.

    Attributes
    ----------
    pace
        What its products took.
    """

    pace: Pace

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """What it holds on the device."""

    @property
    def row_bytes(self) -> int:
        """A measure of the memory that each row of a block takes."""
        return self.nbytes

    @abstractmethod
    def row(self, v: Tensor, experience: Experience, remaining: int = 0) -> Tensor:
        """Apply the function to a contiguous ``(dim,)``.

        ``remaining``: how many calls are to come, this one included, where that is known.
        """

    @abstractmethod
    def block(self, rows: Tensor) -> Tensor:
        """Apply the function to ``(K, dim)`` in one vectorized pass."""

    def apply(
        self,
        X: Tensor,
        out: Tensor,
        experience: Experience,
        *,
        add: bool = False,
        kept: bool = True,
    ) -> None:
        """Apply the function to the columns of ``X``, few of them at a time.

        Parameters
        ----------
        X
            Shape ``(dim, K)``.
        out
            Shape ``(dim_out, K)``; is written to.
        experience
            Of the operator.
        add
            Whether results are added to what is in ``out``.
        kept
            Whether there will be other calls than these.
        """
        if not (remaining := X.shape[1]):
            return
        width = self._width(X, experience)
        for columns, target in zip(X.split(width, 1), out.split(width, 1), strict=True):
            # without names, which would hold them while the next ones are computed
            write_columns(
                self.products(as_rows(columns), experience, 0 if kept else remaining),
                target,
                add=add,
            )
            remaining -= columns.shape[1]

    def _width(self, X: Tensor, experience: Experience) -> int:
        """How many columns are copied to rows at once."""
        if X.is_cuda:
            return experience.block_size(self.row_bytes, X.device)
        return max(1, COPIED // max(1, len(X) * X.element_size()))

    def products(
        self, rows: Tensor, experience: Experience, remaining: int = 0
    ) -> list[Tensor]:
        """Apply the function to the rows of ``(K, dim)``, one by one or in blocks.

        ``remaining``: as in :meth:`row`. Returns fresh rows ``(dim_out,)``.
        """
        results: list[Tensor] = []
        taken = self.row_bytes + 2 * rows[:1].nbytes
        while left := len(rows) - len(results):
            done, size = len(results), 1
            if left > 1:
                limit = experience.block_size(taken, rows.device)
                size = math.ceil(left / math.ceil(left / limit))
            start = time.perf_counter()
            if size > 1 and (rows.is_cuda or self.pace.prefers_blocks(experience)):
                block = self._try_block(rows[done : done + size], experience)
                if block is None:
                    continue
                results += block.unbind(0)
            else:
                size = 1
                results.append(self.row(rows[done], experience, remaining))
            self.pace.note(time.perf_counter() - start, size, experience)
            remaining = max(0, remaining - size)
        return results

    def _try_block(self, rows: Tensor, experience: Experience) -> Tensor | None:
        """Multiply a block; None, and a smaller limit from now on, if that fails."""
        try:
            with warnings.catch_warnings():
                # torch falls back to a loop for operations without a batching rule
                warnings.filterwarnings("ignore", message="There is a performance drop")
                return self.block(rows)
        except torch.OutOfMemoryError:
            experience.limit = len(rows) // 2
        except (RuntimeError, NotImplementedError):
            experience.limit = 1
        return None


class LinearRows(Rows):
    """A linear function of rows, applied in the cheapest way.

    Parameters
    ----------
    function
        Not to refer to this object: what it holds is to be freed with it.
    nbytes
        What the linearization behind ``function`` holds: a measure of the memory that
        each row of a block takes.
    nodes
        Size of its graph.

    Attributes
    ----------
    nbytes : int
        What it keeps alive.
    calls : int
        Number of single products.
    replay_bytes : int
        What the replay holds beside the linearization.
    """

    def __init__(self, function: RowFunction, *, nbytes: int, nodes: int) -> None:
        self._function = function
        self._nbytes = nbytes
        self._nodes = nodes
        self._run: Callable[[Tensor], Tensor] | None = None  # once that is settled
        self._replay: Unchecked | Replay | None = None  # while it is on trial
        self._trials, self._least = 0, math.inf
        self._seconds = math.inf  # the least that a product took
        self.pace = Pace()
        self.calls = 0
        self.replay_bytes = 0

    @property
    def nbytes(self) -> int:
        """What is kept alive, in bytes."""
        return self._nbytes + self.replay_bytes

    def __call__(self, v: Tensor) -> Tensor:
        """Apply the function to ``(dim,)`` as it is."""
        return self._function(v)

    def row(self, v: Tensor, experience: Experience, remaining: int = 0) -> Tensor:
        """Apply the function to a contiguous ``(dim,)``."""
        self.calls += 1
        run, replay = self._run, self._replay  # other threads may change them
        if run is not None:
            return run(v)
        if isinstance(replay, Replay):
            return self._try_replay(replay, v, experience)
        if replay is not None or self._is_worth_recording(experience, remaining):
            if replay is None:
                result, replay = record(self._function, v)
            else:
                result, replay = replay.compared(self._function, v)
            if self._run is not None:  # another thread has been faster
                return result
            if replay is None or replay.nbytes - self.replay_bytes > experience.room():
                self._settle(self._function)
                self.replay_bytes = 0
            else:
                self._replay, self.replay_bytes = replay, replay.nbytes
            return result
        start = time.perf_counter()
        result = self._function(v)
        self._seconds = min(self._seconds, time.perf_counter() - start)
        return result

    def _is_worth_recording(self, experience: Experience, remaining: int) -> bool:
        """Whether the time that a replay is likely to save is more than it takes."""
        if self.calls <= WARM_UP or self._seconds == math.inf:
            return False
        if experience.replays_pay is False:
            self._settle(self._function)
            return False
        products = remaining or max(experience.expected, self.calls)
        return pays(self._nodes, self._seconds, products)

    def _try_replay(self, replay: Replay, v: Tensor, experience: Experience) -> Tensor:
        """Replay, and decide after a few times whether that is faster."""
        start = time.perf_counter()
        result = replay.run(v)
        seconds = time.perf_counter() - start
        self._trials += 1
        self._least = min(self._least, seconds)
        hopeless = self._trials >= WARM_UP and self._least > _SLOWER * self._seconds
        if self._least <= _PAYS * self._seconds:
            experience.replays_pay = True
            self._settle(replay.run)
        elif hopeless or self._trials >= _TRIALS:
            experience.replays_pay = False
            self._settle(self._function)
            self.replay_bytes = 0
        return result

    def _settle(self, run: Callable[[Tensor], Tensor]) -> None:
        self._run, self._replay = run, None

    def block(self, rows: Tensor) -> Tensor:
        """Apply the function to ``(K, dim)`` in one vectorized pass."""
        return self._function(rows, batched=True)


class PassingRows:
    """A linear function of rows of which nothing is kept.

    Parameters
    ----------
    once
        Applies the function to one row, at the least cost for that.
    linearize
        Makes what applies it to several.
    """

    nbytes = calls = replay_bytes = 0

    def __init__(
        self,
        once: Callable[[Tensor], Tensor],
        linearize: Callable[[], LinearRows | PassingRows],
    ) -> None:
        self._once = once
        self._linearize = linearize

    def row(self, v: Tensor, experience: Experience) -> Tensor:
        """Apply the function to a contiguous ``(dim,)``."""
        return self._once(v)

    def apply(
        self, X: Tensor, out: Tensor, experience: Experience, *, add: bool = False
    ) -> None:
        """Apply the function to the columns of ``X``, as :meth:`Rows.apply`."""
        if X.shape[1] > 1:
            self._linearized().apply(X, out, experience, add=add, kept=False)
        elif X.shape[1]:
            write_columns(self.products(as_rows(X), experience), out, add=add)

    def products(self, rows: Tensor, experience: Experience) -> list[Tensor]:
        """Apply the function to rows ``(K, dim)``; return rows ``(dim_out,)``."""
        if len(rows) == 1:
            return [self._once(rows[0])]
        return self._linearized().products(rows, experience, len(rows))

    def _linearized(self) -> LinearRows:
        rows = self._linearize()
        assert isinstance(rows, LinearRows)
        return rows

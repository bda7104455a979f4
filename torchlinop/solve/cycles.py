"""Solves that go on after the process was killed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from torchlinop._checkpoint import Run, State, placed
from torchlinop._files import StoredFileError
from torchlinop.solve.restart import Callback, Correction
from torchlinop.solve.system import System


class Cycles:
    """The iterations of a solve, each of which is remembered.

    Around them everything is computed anew, which costs a product for each: what they are
    asked for is the same. Those that an earlier process has ended are not run again, and
    the next one goes on from its state.

    Parameters
    ----------
    iterate
        An :class:`~torchlinop.solve.restart.Iteration` that takes a run as its last
        argument.
    run
        Where to remember.
    system
        Of equations; its count of products goes on from that of the earlier process.
    """

    def __init__(
        self, iterate: Callable[..., Correction], run: Run, system: System
    ) -> None:
        self._iterate, self._run, self._system = iterate, run, system
        state = run.state or {"ended": [], "current": None, "num_matvecs": 0}
        #: as dicts, and how many of them have been asked for
        self._ended, self._next = state["ended"], 0
        self._current: State | None = state["current"]
        system.num_matvecs = state["num_matvecs"]

    def __call__(
        self,
        system: System,
        B: Tensor,
        tolerances: np.ndarray,
        maxiter: int,
        callback: Callback | None,
    ) -> Correction:
        """Iterate, or return what that gave before."""
        if self._next < len(self._ended):
            found = Correction(**placed(self._ended[self._next], B.device))
            self._next += 1
            _require_columns(found.solution.shape[1], B)
            return found
        state, self._current = self._current, None
        if state is not None:
            _require_columns(state["columns"], B)
            state = state["iteration"]
        width = B.shape[1]
        run = self._run.part(
            state, lambda part: self._whole({"columns": width, "iteration": part})
        )
        found = self._iterate(system, B, tolerances, maxiter, callback, run)
        short = found.iterations.max(initial=0) >= maxiter
        if found.reason or not short:  # else there may be more of it another time
            self._ended.append(found._asdict())
            self._next += 1
            self._run.save(self._whole(None))
        return found

    def _whole(self, current: State | None) -> State:
        return {
            "ended": self._ended,
            "current": current,
            "num_matvecs": self._system.num_matvecs,
        }


def _require_columns(count: int, B: Tensor) -> None:
    """Refuse the state of other columns: where rounding has chosen others to solve for."""
    if count != B.shape[1]:
        raise StoredFileError(
            f"The checkpoint has {count} columns where there are {B.shape[1]} now: this "
            "machine rounds differently. Delete it to begin anew."
        )

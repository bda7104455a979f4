"""Numbers ``z^H f(A) z`` of random vectors by quadrature, and what they may be wrong by."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from torchlinop._operator import TorchLinearOperator
from torchlinop.estimate.arguments import evaluated
from torchlinop.estimate.estimates import mean_and_stderr
from torchlinop.estimate.probes import ProbeSource
from torchlinop.estimate.recurrence import Quadrature, Recurrence

#: the part of the standard error that a quadrature may be wrong by
_SHARE = 0.1
#: largest quotient of two changes with which the rest of their series is estimated
_SLOWEST = 0.9

#: from eigenvalues to numbers
Function: TypeAlias = Callable[[np.ndarray], np.ndarray]


class Quadratures:
    """Quadratures of random vectors, evaluated.

    Of a matrix without negative eigenvalues and a function that is ``log(x - limit)``, or
    whose derivatives have the same signs, they lie in the middle of two bounds.
    """

    def __init__(
        self,
        A: TorchLinearOperator,
        f: Function,
        source: ProbeSource,
        limit: float | None,
    ) -> None:
        self.operator, self._f, self._source = A, f, source
        self._limit = limit
        self._samples: np.ndarray = np.zeros(0)
        #: by how much each may be wrong, where that is known
        self._widths: np.ndarray = np.zeros(0)
        self._change = 0.0
        self.num_matvecs = 0

    @property
    def count(self) -> int:
        """Number of random vectors."""
        return len(self._samples)

    def steps_needed(
        self, count: int, limit: int, rtol: float | None, each: Callable[[int], object]
    ) -> int:
        """Use some vectors, with as many steps as it takes; return how many these are."""
        recurrence = Recurrence(self.operator, self._source.rows(count))
        most = min(self.operator.shape[0], limit // count)
        steps, samples = 0, np.zeros(0)
        changes: list[float] = []
        for steps in _schedule(most):
            recurrence.advance(steps - recurrence.steps, each)
            before = samples
            samples, self._widths = self._evaluate(recurrence)
            self._samples, self.num_matvecs = samples, count * steps
            if self._limit is None:
                if not len(before):
                    continue
                changes.append(float(abs((samples - before).mean())))
                self._change = changes[-1]
            value, error = mean_and_stderr(samples)
            expected = error * math.sqrt(count * steps / max(limit, count * steps))
            if rtol is not None:
                expected = max(expected, rtol * abs(value))
            least = 10 * recurrence.eps * np.abs(samples).max()
            if self._change + self._widths.mean() <= max(_SHARE * expected, least):
                break
        else:
            if self._limit is None:
                self._change = _change_and_rest(changes)
        if steps == self.operator.shape[0]:
            self._change = 0.0  # these quadratures are exact
        return steps

    def grow(self, count: int, steps: int, each: Callable[[int], object]) -> None:
        """Use more vectors."""
        recurrence = Recurrence(self.operator, self._source.rows(count))
        recurrence.advance(steps, each)
        samples, widths = self._evaluate(recurrence)
        self._samples = np.append(self._samples, samples)
        self._widths = np.append(self._widths, widths)
        self.num_matvecs += count * steps

    def _evaluate(self, recurrence: Recurrence) -> tuple[np.ndarray, np.ndarray]:
        """Numbers, and what they may be wrong by (zero where nothing is known of that)."""
        squared = recurrence.squared_norms.double().cpu().numpy()
        upper = squared * self._integral(recurrence.quadrature())
        if self._limit is None:
            return upper, np.zeros(upper.shape)
        lower = squared * self._integral(recurrence.radau(0.0, self._limit))
        return (upper + lower) / 2, np.abs(upper - lower) / 2

    def _integral(self, quadrature: Quadrature) -> np.ndarray:
        nodes, weights, _ = quadrature
        values = evaluated(self._f, nodes)
        if values.shape != nodes.shape or not np.isfinite(values[weights > 0]).all():
            raise ValueError(
                "f has to map an array of Ritz values to finite numbers of the same shape; "
                f"of shape {nodes.shape}, between {nodes.min():.3e} and {nodes.max():.3e}, "
                f"it made shape {values.shape}."
            )
        integral: np.ndarray = (weights * np.where(weights > 0, values, 0)).sum(axis=1)
        return integral

    def estimate(self) -> tuple[float, float]:
        """Mean, and its standard error with what the quadratures may be wrong by."""
        if not self.count:
            return 0.0, math.inf
        value, error = mean_and_stderr(self._samples)
        return value, math.hypot(error, self._change + float(self._widths.mean()))


def _change_and_rest(changes: list[float]) -> float:
    """The last change and those that would follow, where each is a part of the one before.

    The numbers of steps grow by a factor, so it is a geometric series also where the error
    falls with a power of the steps only.
    """
    if not changes:
        return math.inf
    before = changes[-2] if len(changes) > 1 else 0.0
    ratio = min(changes[-1] / before, _SLOWEST) if before else _SLOWEST
    return changes[-1] / (1 - ratio)


def _schedule(most: int) -> list[int]:
    """Numbers of steps at which to look, up to the most; at least three if possible."""
    steps, schedule = 4 if most > 8 else max(most // 3, 1), []
    while math.ceil(1.3 * steps) <= most:
        schedule.append(steps)
        steps = math.ceil(1.3 * steps)
    return [*schedule, most] if schedule[-1:] != [most] else schedule

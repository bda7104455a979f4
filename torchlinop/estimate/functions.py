r"""Traces of functions of a matrix, by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from torchlinop._operator import TorchLinearOperator
from torchlinop.estimate.arguments import (
    at_least_zero,
    evaluated,
    positive_count,
    square_operator,
    target,
)
from torchlinop.estimate.estimates import Estimate, mean_and_stderr
from torchlinop.estimate.probes import Probes, ProbeSource, block_size
from torchlinop.estimate.progress import progress_bar
from torchlinop.estimate.recurrence import Recurrence
from torchlinop.estimate.sampling import Interrupted

#: relative standard error that is aimed at where nothing is said
_RTOL = 0.01
#: random vectors of the first block, from which it is learned how many steps it takes
_FIRST = 8
#: the part of the standard error that a quadrature may be wrong by
_SHARE = 0.1
#: largest quotient of two changes with which the rest of their series is estimated
_SLOWEST = 0.9
#: most vectors, as a multiple of ``N``, where there is no other limit
_MOST = 4

Function = Callable[[np.ndarray], np.ndarray]


def function_trace(
    A: Any,
    f: Function,
    *,
    num_matvecs: int | None = None,
    rtol: float | None = None,
    num_steps: int | None = None,
    probes: Probes = "rademacher",
    seed: int = 0,
    progress: bool = False,
) -> Estimate:
    r"""Estimate :math:`\mathrm{tr} f(A) = \sum_i f(\lambda_i)` of a symmetric matrix.

    The mean over random vectors of :math:`z^H f(A) z`, each by a Gauss quadrature from
    Lanczos' recurrence.

    Parameters
    ----------
    A
        Symmetric or Hermitian operator or matrix, shape ``(N, N)``.
    f
        From eigenvalues, a float64 array of any shape, to an array of the same shape.
        The smoother it is on the spectrum, the fewer steps it takes.
    num_matvecs
        Most vectors to multiply, in all steps together.
    rtol
        Relative standard error at which to stop; 0.01 if neither is given.
    num_steps
        Products for each random vector. By default as many as it takes for the quadrature
        to change by less than a tenth of the standard error.
    probes
        Distribution of the random vectors: ``"rademacher"``, ``"gaussian"`` or
        ``"sphere"``.
    seed
        Of the random vectors, the same on every device.
    progress
        Whether to show a progress bar.

    Returns
    -------
    Estimate
        Its standard error has the last change of the quadratures added; where they have
        not settled, those that would follow as well.

    Raises
    ------
    ValueError
        ``A`` is not square or not symmetric, an argument is out of range, or ``f`` is not
        finite at a Ritz value.
    TypeError
        ``f`` does not take NumPy arrays.
    numpy.linalg.LinAlgError
        A product is not finite.
    Interrupted
        On Ctrl-C, with the estimate so far.

    References
    ----------
    Ubaru, Chen and Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature",
    SIAM J. Matrix Anal. Appl. 38 (2017), https://doi.org/10.1137/16M1104974

    Examples
    --------
    >>> import numpy as np, torch
    >>> from torchlinop import estimate
    >>> A = torch.diag(torch.linspace(1, 2, 100, dtype=torch.float64))
    >>> t = estimate.function_trace(A, np.exp, num_matvecs=200)
    >>> abs(t.value - A.diagonal().exp().sum().item()) < 1e-6
    True
    """
    A = square_operator(A, "function_trace")
    if num_steps is not None:
        num_steps = min(positive_count("num_steps", num_steps), A.shape[0])
    return _function_trace(
        A, f, num_matvecs, rtol, num_steps, ProbeSource(A, probes, seed), seed, progress
    )


def logdet(A: Any, *, damping: float = 0.0, **options: Any) -> Estimate:
    r"""Estimate :math:`\log\det(A + \delta I)` of a positive semi-definite matrix.

    Parameters
    ----------
    A
        Symmetric or Hermitian operator or matrix, shape ``(N, N)``.
    damping
        :math:`\delta \ge 0`, large enough to make the matrix positive definite. Without it,
        small eigenvalues decide, and they take many steps.
    **options
        Keyword arguments of :func:`function_trace`.

    Returns
    -------
    Estimate

    Raises
    ------
    ValueError
        As :func:`function_trace`, or a Ritz value of :math:`A + \delta I` is not positive:
        the logarithm is not defined.

    Examples
    --------
    >>> import math, torch
    >>> from torchlinop import estimate
    >>> t = estimate.logdet(torch.eye(50), damping=1.0, num_matvecs=4)
    >>> round(t.value / math.log(2), 3)
    50.0
    """
    damping = at_least_zero("damping", damping)

    def log(theta: np.ndarray) -> np.ndarray:
        return np.log(_positive(theta, damping))

    return function_trace(A, log, **options)


def effective_dimension(A: Any, *, damping: float, **options: Any) -> Estimate:
    r"""Estimate :math:`\mathrm{tr}\, A (A + \delta I)^{-1}`, how many directions matter.

    Eigenvalues far above the damping count as one, those far below as nothing.

    Parameters
    ----------
    A
        Positive semi-definite operator or matrix, shape ``(N, N)``.
    damping
        :math:`\delta > 0`.
    **options
        Keyword arguments of :func:`function_trace`.

    Returns
    -------
    Estimate

    Raises
    ------
    ValueError
        As :func:`function_trace`, or a Ritz value of :math:`A + \delta I` is not positive.

    Examples
    --------
    >>> import torch
    >>> from torchlinop import estimate
    >>> t = estimate.effective_dimension(torch.eye(50), damping=1.0, num_matvecs=4)
    >>> round(t.value, 3)
    25.0
    """
    damping = at_least_zero("damping", damping)
    if not damping:
        raise ValueError(
            "damping has to be positive: without it the effective dimension is the rank."
        )

    def share(theta: np.ndarray) -> np.ndarray:
        return theta / _positive(theta, damping)

    return function_trace(A, share, **options)


def _positive(theta: np.ndarray, damping: float) -> np.ndarray:
    """Return ``theta + damping``; refuse what is not positive."""
    lowest = float(theta.min())
    if not lowest + damping > 0:
        raise ValueError(
            f"The smallest Ritz value is {lowest:.3e}, so A + {damping:g} I is not "
            f"positive definite. Take damping > {max(-lowest, 0):.3e}, or the GGN in place "
            "of a Hessian."
        )
    return theta + damping


def _function_trace(
    A: TorchLinearOperator,
    f: Function,
    num_matvecs: int | None,
    rtol: float | None,
    num_steps: int | None,
    source: ProbeSource,
    seed: int,
    progress: bool,
) -> Estimate:
    """Find how many steps it takes with a first block; then take more vectors."""
    rtol = target(rtol)
    if num_matvecs is None and rtol is None:
        rtol = _RTOL
    n = A.shape[0]
    limit = _MOST * n * (num_steps or n)
    if num_matvecs is not None:
        limit = positive_count("num_matvecs", num_matvecs)
        if limit < 2 * (num_steps or 1):
            raise ValueError(
                f"num_matvecs={limit} is not enough for two random vectors of "
                f"{num_steps or 1} products each."
            )
    first = min(_FIRST, block_size(A), max(2, limit // (num_steps or 25)))
    quadratures = _Quadratures(A, f, source)
    with progress_bar(progress, num_matvecs) as bar:
        try:
            steps = num_steps or quadratures.steps_needed(first, limit, rtol, bar.update)
            while True:
                value, error = quadratures.estimate()
                spent = quadratures.num_matvecs
                if quadratures.count >= 2 and (
                    spent + steps > limit
                    or (rtol is not None and error <= rtol * abs(value))
                ):
                    return Estimate(value, error, spent, "lanczos quadrature", seed)
                more = min(block_size(A), first, (limit - spent) // steps)
                quadratures.grow(more, steps, bar.update)
        except KeyboardInterrupt as interrupt:
            if not quadratures.count:
                raise
            so_far = *quadratures.estimate(), quadratures.num_matvecs
            raise Interrupted(Estimate(*so_far, "lanczos quadrature", seed)) from interrupt


class _Quadratures:
    """Quadratures of random vectors, evaluated."""

    def __init__(self, A: TorchLinearOperator, f: Function, source: ProbeSource) -> None:
        self._A, self._f, self._source = A, f, source
        self._samples: np.ndarray = np.zeros(0)
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
        recurrence = Recurrence(self._A, self._source.rows(count))
        most = min(self._A.shape[0], limit // count)
        steps, samples = 0, np.zeros(0)
        changes: list[float] = []
        for steps in _schedule(most):
            recurrence.advance(steps - recurrence.steps, each)
            before, samples = samples, self._evaluate(recurrence)
            self._samples, self.num_matvecs = samples, count * steps
            if not len(before):
                continue
            changes.append(abs(float((samples - before).mean())))
            self._change = changes[-1]
            value, error = mean_and_stderr(samples)
            expected = error * math.sqrt(count * steps / max(limit, count * steps))
            if rtol is not None:
                expected = max(expected, rtol * abs(value))
            least = 10 * recurrence.eps * np.abs(samples).max()
            if self._change <= max(_SHARE * expected, least):
                break
        else:
            self._change = _change_and_rest(changes)
        if steps == self._A.shape[0]:
            self._change = 0.0  # these quadratures are exact
        return steps

    def grow(self, count: int, steps: int, each: Callable[[int], object]) -> None:
        """Use more vectors."""
        recurrence = Recurrence(self._A, self._source.rows(count))
        recurrence.advance(steps, each)
        self._samples = np.append(self._samples, self._evaluate(recurrence))
        self.num_matvecs += count * steps

    def _evaluate(self, recurrence: Recurrence) -> np.ndarray:
        nodes, weights, _ = recurrence.quadrature()
        values = evaluated(self._f, nodes)
        if values.shape != nodes.shape or not np.isfinite(values[weights > 0]).all():
            raise ValueError(
                "f has to map an array of Ritz values to finite numbers of the same shape; "
                f"of shape {nodes.shape}, between {nodes.min():.3e} and {nodes.max():.3e}, "
                f"it made shape {values.shape}."
            )
        squared = recurrence.squared_norms.double().cpu().numpy()
        return squared * (weights * np.where(weights > 0, values, 0)).sum(axis=1)

    def estimate(self) -> tuple[float, float]:
        """Mean, and its standard error with what the quadratures may be wrong by."""
        if not self.count:
            return 0.0, math.inf
        value, error = mean_and_stderr(self._samples)
        return value, math.hypot(error, self._change)


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

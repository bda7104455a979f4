"""From samples to an estimate: how many there have to be, and what an interrupt keeps."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from torchlinop.estimate.arguments import positive_count, target
from torchlinop.estimate.estimates import Estimate
from torchlinop.estimate.progress import progress_bar

#: relative standard error that is aimed at where nothing is said
_RTOL = 0.01
#: products with which a search for a relative error begins, at least
_FIRST = 16


class Interrupted(KeyboardInterrupt):
    """A run was interrupted (Ctrl-C); what it had found until then is kept.

    Attributes
    ----------
    result : Estimate, Eigenpairs or SpectralDensity
    """

    def __init__(self, result: Any) -> None:
        super().__init__(f"interrupted; so far, in .result of this error: {result}")
        self.result = result

    def __reduce__(self) -> tuple:
        return type(self), (self.result,)


class Sampler(Protocol):
    """An estimator that can always take more samples."""

    #: its name
    method: str
    #: fewest products that give an estimate
    least: int
    #: products of the exact answer
    exact_matvecs: int

    @property
    def num_matvecs(self) -> int:
        """Number of vectors that have been multiplied."""

    def grow(self, num_matvecs: int) -> None:
        """Spend at most this number of products in all, those so far included."""

    def estimate(self) -> tuple[Any, Any]:
        """Return the value and its standard error."""

    def exact(self) -> Any:
        """Return the exact value."""


def sampled(
    sampler: Sampler,
    num_matvecs: int | None,
    rtol: float | None,
    seed: int,
    progress: bool,
) -> Estimate:
    """Take samples up to a number of products or a relative standard error."""
    rtol = target(rtol)
    if num_matvecs is None and rtol is None:
        rtol = _RTOL
    limit = sampler.exact_matvecs
    if num_matvecs is not None:
        limit = positive_count("num_matvecs", num_matvecs)
        if limit < sampler.least:
            raise ValueError(
                f"{sampler.method} needs at least {sampler.least} products, got "
                f"num_matvecs={limit}."
            )
        if limit > sampler.exact_matvecs:
            raise ValueError(
                f"num_matvecs={limit} is more than the {sampler.exact_matvecs} products "
                "that the exact answer takes. Pass fewer, or use the dense matrix."
            )
    wanted = limit
    if rtol is not None:
        wanted = min(limit, max(_FIRST, sampler.least))

    def result(value: Any, error: Any, method: str) -> Estimate:
        return Estimate(value, error, sampler.num_matvecs, method, seed)

    seen: list[tuple[int, float]] = []  # numbers of products, errors
    with progress_bar(progress, limit) as bar:
        try:
            while True:
                if num_matvecs is None and wanted >= limit:
                    value = sampler.exact()
                    return result(value, _nothing(value), "exact")
                before = sampler.num_matvecs
                sampler.grow(wanted)
                bar.update(sampler.num_matvecs - before)
                value, error = sampler.estimate()
                missing = 0.0 if rtol is None else size(error) / (rtol * size(value) or 1.0)
                if wanted >= limit or missing <= 1:
                    return result(value, error, sampler.method)
                seen.append((sampler.num_matvecs, missing))
                factor = min(2.0, max(1.1, 1.05 * missing ** (1 / _power(seen[-2:]))))
                wanted = min(limit, math.ceil(factor * wanted))
        except KeyboardInterrupt as interrupt:
            if not sampler.num_matvecs:
                raise
            raise Interrupted(result(*sampler.estimate(), sampler.method)) from interrupt


def _nothing(value: Any) -> Any:
    """The standard error of an exact value."""
    return torch.zeros_like(value.real) if isinstance(value, Tensor) else 0.0


def _power(seen: list[tuple[int, float]]) -> float:
    """With which power of the number of products errors fall: the root, or faster."""
    (few, large), (many, small) = seen[0], seen[-1]
    if many <= few or not 0 < small < large < math.inf:
        return 0.5
    return min(max(math.log(large / small) / math.log(many / few), 0.5), 2.0)


def size(x: Any) -> float:
    """Absolute value of a number, 2-norm of a vector."""
    return x.abs().square().sum().sqrt().item() if isinstance(x, Tensor) else abs(x)

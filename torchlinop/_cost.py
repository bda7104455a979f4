"""What a run will cost, from shapes and a few measured products."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
import torch.profiler
from torch import Tensor

from torchlinop._convergence import users_frame
from torchlinop._memory import available_memory
from torchlinop._operator import TorchLinearOperator, aslinearoperator
from torchlinop.estimate.arguments import not_empty, positive_count
from torchlinop.estimate.probes import ProbeSource

#: most products that are measured, and seconds after which no further one is begun
_PRODUCTS, _SECONDS = 6, 2.0


@dataclass(frozen=True)
class Cost:
    """What products with an operator cost.

    Attributes
    ----------
    num_matvecs, columns : int
        What was asked for: how many vectors, and how many at once.
    seconds_first, seconds_each : float
        Of the first product and of those after it, with ``columns`` vectors each. The first
        records what the others replay.
    bytes_kept : int
        What stays allocated after the products, beyond what was before: 0 if the operator
        was in use before. On a CPU as the system counts it, to some MB.
    bytes_peak : int
        The most that is allocated during a product, beyond what was before.
    bytes_free : int
        What was free on the device.
    """

    num_matvecs: int
    columns: int
    seconds_first: float
    seconds_each: float
    bytes_kept: int
    bytes_peak: int
    bytes_free: int

    @property
    def seconds(self) -> float:
        """Of all products together."""
        count = math.ceil(self.num_matvecs / self.columns)
        return self.seconds_first + (count - 1) * self.seconds_each

    @property
    def fits(self) -> bool:
        """Whether the peak is below what was free."""
        return self.bytes_peak <= self.bytes_free

    def __str__(self) -> str:
        vectors = "vectors" if self.num_matvecs > 1 else "vector"
        blocks = f" in blocks of {self.columns}" if self.columns > 1 else ""
        return (
            f"{self.num_matvecs} {vectors}{blocks}: {_time(self.seconds)} (the first "
            f"product {_time(self.seconds_first)}, then {_time(self.seconds_each)} each); "
            f"{_size(self.bytes_kept)} kept, {_size(self.bytes_peak)} at the peak, "
            f"{_size(self.bytes_free)} free"
        )


def cost(A: Any, *, num_matvecs: int = 100, columns: int = 1) -> Cost:
    """Measure a few products and say what a run will cost.

    Nothing is refused: where a block of vectors does not fit into memory, one vector is
    measured and multiplied up, with a warning.

    Parameters
    ----------
    A
        An operator or a matrix, shape ``(M, N)``.
    num_matvecs
        Vectors that the run will multiply; ``eigsh`` for a few eigenvalues takes some
        hundred.
    columns
        How many at once.

    Returns
    -------
    Cost
        Prints as a line.

    Raises
    ------
    ValueError
        A count is not positive, or the matrix has no entries.

    Warns
    -----
    UserWarning
        A product does not fit into the memory that is free.

    Examples
    --------
    >>> import torch, torchlinop
    >>> cost = torchlinop.cost(torch.eye(100), num_matvecs=50)
    >>> cost.fits, cost.seconds < 10
    (True, True)
    >>> print(cost)  # doctest: +ELLIPSIS
    50 vectors: ... (the first product ..., then ... each); ... kept, ... free
    """
    A = not_empty(aslinearoperator(A), "cost")
    num_matvecs = positive_count("num_matvecs", num_matvecs)
    columns = positive_count("columns", columns)
    free = int(available_memory(A.device))
    needed = 2 * columns * sum(A.shape) * A.torch_dtype.itemsize
    width = columns if needed <= free else 1
    try:
        first, each, kept, peak = _measured(A, width)
    except (torch.OutOfMemoryError, MemoryError):
        first = each = math.nan
        kept, peak = 0, free + 1
    factor = columns // width
    result = Cost(
        num_matvecs=num_matvecs,
        columns=columns,
        seconds_first=first + (factor - 1) * each,
        seconds_each=factor * each,
        bytes_kept=kept,
        bytes_peak=max(peak, needed if width < columns else 0),
        bytes_free=free,
    )
    if not result.fits:
        warnings.warn(
            f"A product with {columns} vectors takes {_size(result.bytes_peak)} or more, "
            f"and {_size(free)} are free on {A.device}. Multiply fewer vectors at once "
            "(columns), cut the data into smaller batches, or build the operator with "
            "cache=False or a memory_budget.",
            UserWarning,
            stacklevel=users_frame(),
        )
    return result


def _measured(A: TorchLinearOperator, width: int) -> tuple[float, float, int, int]:
    """Seconds of the first product and of the fastest later one, bytes kept and at peak."""
    x = ProbeSource(A, "rademacher", 0).rows(width).T
    first, kept, peak = _with_memory(A, x)
    if first > _SECONDS:
        return first, first, kept, peak
    _, more, most = _with_memory(A, x)
    times: list[float] = []
    while len(times) < _PRODUCTS and sum(times) < _SECONDS:
        times.append(_seconds(A, x))
    return first, min(times), kept + more, max(peak, kept + most)


def _seconds(A: TorchLinearOperator, x: Tensor) -> float:
    start = perf_counter()
    A @ x
    if A.device.type == "cuda":
        torch.cuda.synchronize(A.device)
    return perf_counter() - start


def _with_memory(A: TorchLinearOperator, x: Tensor) -> tuple[float, int, int]:
    """Seconds of a product, bytes of tensors that it leaves on the device, and at most.

    Torch reports each allocation to its profiler: what the process has in memory, or the
    peak that belongs to the user, would say less.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        seconds = _seconds(A, x)
    events = [
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]"
        and (event.device_type().name == "CUDA") == (A.device.type == "cuda")
    ]
    current = most = 0
    for _, nbytes in sorted(events):
        current += nbytes
        most = max(most, current)
    return seconds, max(current, 0), most


def _time(seconds: float) -> str:
    if math.isnan(seconds):
        return "unknown time"
    if seconds < 1e-3:
        return f"{1e6 * seconds:.0f} us"
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _size(count: int) -> str:
    if count < 1e6:
        return f"{count / 1e3:.0f} kB"
    return f"{count / 1e6:.0f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"

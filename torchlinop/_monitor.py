"""Watch a run of any solver: count, show, stop in time, and keep what there is.

Every product of every operator passes one door, where a monitor stands while its ``with``
block lasts. It knows nothing of the solver.
"""

from __future__ import annotations

import datetime
import os
import threading
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from torchlinop._checkpoint import Checkpoint, Run, State, begun
from torchlinop._interchange import as_tensor
from torchlinop._memory import free_memory
from torchlinop._observers import OBSERVERS
from torchlinop._operator import TorchLinearOperator
from torchlinop._pairs import Pairs, too_long
from torchlinop._progress import Bar
from torchlinop._runlog import RunLog
from torchlinop._typing import Array
from torchlinop.estimate.arguments import positive_count

#: vectors that are kept where nobody says how many, with a right-hand side and many
#: unknowns, and at least; their share of the default memory budget
_MOST_VECTORS, _FEW_VECTORS, _LEAST_VECTORS = 256, 32, 16
_MEMORY_SHARE = 0.25

_BAR = "{desc}: {n_fmt}{of} products [{elapsed}{left}, {rate_inv_fmt}]{postfix}"


class RunStopped(BaseException):
    """A run has used up its budget; the ``with`` block of its monitor ends here.

    Not an ``Exception``, so that solvers which catch those are stopped as well.
    """


def monitor(
    A: TorchLinearOperator,
    *,
    max_products: int | None = None,
    max_seconds: float | None = None,
    progress: bool = False,
    b: Array | None = None,
    max_vectors: int | None = None,
    checkpoint: Checkpoint | str | os.PathLike[str] | None = None,
) -> Monitor:
    """Watch the products with ``A`` while a ``with`` block lasts.

    Counted are the products with this object and with its adjoint, in every thread: those
    that a solver of any package asks for, and those inside of sums, multiples and inverses
    that are made of it. Monitors may be nested.

    When a budget is used up, the next product ends the ``with`` block; so does Ctrl-C. The
    log then says why (``log.stopped``), and ``log.eigenpairs()`` or ``log.solution()``
    give what the products so far are good for.

    Parameters
    ----------
    A
        One of our operators, the one that is handed to the solver or a part of it.
    max_products
        Most products, an integer (a block of vectors is one product).
    max_seconds
        Most seconds since the block was entered. A product that is running is not
        interrupted.
    progress
        Show a bar: products, seconds each, and what is left of the budget.
    b
        The right-hand side of the system ``A x = b`` that is solved, shape ``(M,)``. Needed
        only where more vectors come than are kept: the best iterate is then kept, too.
    max_vectors
        How many vectors are kept, each with its product; 0 keeps none. By default 256, or
        as many as fit into an eighth of the free memory of the device. When there are more,
        they are merged into half as many, at most 64: Ritz vectors from both ends of the
        spectrum. Where that would take long (256 vectors of more than 12,000 entries), the
        older half is forgotten; and with ``b`` 32 are kept, which is as good.
    checkpoint
        A file, or a :class:`~torchlinop.Checkpoint`, to which the vectors and their
        products are written, also at the end. Where there is one, the log begins with what
        it holds, and any solver goes on from its best vectors: ``log.v0()``, ``log.x0(b)``.

    Returns
    -------
    Monitor
        A context manager; ``as log`` gives the :class:`RunLog`.

    Raises
    ------
    TypeError
        ``A`` is not one of our operators.
    ValueError
        A budget is not positive, ``b`` does not fit, or a checkpoint is to hold no vectors.
    StoredFileError
        When the block is entered: the checkpoint is of another matrix, or truncated.

    Notes
    -----
    A product costs two microseconds more, and the copies of two vectors. Vectors are merged
    when the log is asked for what they are good for, or when 64 MiB of them wait. On a GPU
    the seconds of a product are those of its launch; their sum is right where the solver
    reads a number after each product.

    Examples
    --------
    >>> import numpy as np, torch, torchlinop
    >>> from scipy.sparse.linalg import eigsh
    >>> A = torchlinop.DiagonalLinearOperator(torch.arange(200.0, dtype=torch.float64))
    >>> with torchlinop.monitor(A, max_products=60) as log:
    ...     values, vectors = eigsh(A, k=9, tol=1e-14, v0=np.ones(200))
    >>> log.stopped, log.num_products
    ('max_products', 60)
    >>> values, vectors = log.eigenpairs(2)
    >>> values.round(decimals=1)
    tensor([198., 199.], dtype=torch.float64)
    """
    if not isinstance(A, TorchLinearOperator):
        raise TypeError(
            f"monitor watches the products of our operators, got {type(A).__name__}. Write "
            "A = torchlinop.aslinearoperator(A), and hand that A to the solver."
        )
    if max_products is not None:
        max_products = positive_count("max_products", max_products)
    if max_seconds is not None and not max_seconds > 0:
        raise ValueError(f"max_seconds has to be positive, got {max_seconds!r}.")
    if max_vectors:
        max_vectors = positive_count("max_vectors", max_vectors)
        if max_vectors < _LEAST_VECTORS:
            raise ValueError(
                f"max_vectors has to be 0 or at least {_LEAST_VECTORS}, got {max_vectors}."
            )
    rhs = None if b is None else _right_hand_side(b, A)
    file = Checkpoint.of(checkpoint)
    if file is not None and max_vectors == 0:
        raise ValueError("A checkpoint holds vectors: max_vectors must not be 0.")
    return Monitor(A, max_products, max_seconds, progress, rhs, max_vectors, file)


class Monitor:
    """What :func:`monitor` returns."""

    def __init__(
        self,
        A: TorchLinearOperator,
        max_products: int | None,
        max_seconds: float | None,
        progress: bool,
        b: Tensor | None,
        max_vectors: int | None,
        checkpoint: Checkpoint | None,
    ) -> None:
        self._A, self._mirror, self._b = A, A._adjoint(), b
        self._shapes = (A.shape, A.shape[::-1])
        self._real = not A.torch_dtype.is_complex
        self._max_products = max_products
        self._max_seconds = max_seconds
        self._progress = progress
        self._max_vectors = max_vectors
        self._checkpoint = checkpoint
        self._run = Run()
        self._earlier = 0.0  # seconds that the log of another process has
        self._lock = threading.Lock()
        self._started = 0
        self._bar: Any = None
        self._log: RunLog | None = None
        self._pairs: Pairs | None = None
        self._products: list[tuple[float, float, int, bool]] = []
        self._begin = 0.0

    def __enter__(self) -> RunLog:
        if self._log is not None:
            raise RuntimeError(
                "This monitor was used before: call torchlinop.monitor again."
            )
        A = self._A
        most = self._max_vectors
        if most is None:
            most = _default_vectors(A, solving=self._b is not None)
        self._pairs = Pairs(A.shape[1], most, self._b) if most else None
        self._log = RunLog(
            operator=repr(A),
            shape=A.shape,
            began=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            max_products=self._max_products,
            max_seconds=self._max_seconds,
        )
        self._log._pairs, self._products = self._pairs, self._log.products
        self._run = begun(
            self._checkpoint, "monitor", {"A": A}, {}, {"b": self._b if most else None}
        )
        if self._run.state is not None and self._pairs is not None:
            self._go_on(self._run.state, self._pairs)
        if self._progress:
            self._bar = _bar(type(A).__name__, self._max_products)
        self._begin = perf_counter()
        OBSERVERS.append(self)
        return self._log

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        OBSERVERS.remove(self)
        log = self._log
        assert log is not None
        log.elapsed = perf_counter() - self._begin + self._earlier
        if self._products and self._checkpoint is not None:
            self._save()
        if self._bar is not None:
            self._bar.close()
        if isinstance(error, KeyboardInterrupt) and not log.stopped:
            log.stopped = "interrupt"
            return True
        return bool(log.stopped) and _came_from(error, self)

    def observe(
        self, operator: Any, multiply: Callable[[Tensor], Tensor], x: Tensor
    ) -> Tensor:
        """Count a product with the operator or its adjoint; pass over all others."""
        adjoint = operator is not self._A
        if adjoint and operator is not self._mirror:
            # adjoints are made anew by each call; the adjoint of one is the operator itself
            if operator.shape not in self._shapes:
                return multiply(x)
            origin = operator._adjoint()
            adjoint = origin is self._A
            if not adjoint and origin is not self._mirror:
                return multiply(x)
        self._admit()
        start = perf_counter()
        y = multiply(x)
        seconds = perf_counter() - start
        columns = x.shape[1]
        if x.is_complex() and self._real:  # multiplied by parts
            columns *= 2
        with self._lock:
            products = self._products
            begin = start - self._begin + self._earlier
            products.append((begin, seconds, columns, adjoint))
            if self._pairs is not None and not adjoint:
                self._pairs.append(x, y, len(products))
                if self._run.due():
                    self._save()
            if self._bar is not None:
                self._show()
        return y

    def _go_on(self, state: State, pairs: Pairs) -> None:
        """Begin the log with what another process has seen."""
        pairs.go_on(state["pairs"], self._A.device)
        self._products += [tuple(product) for product in state["products"]]
        if self._products:
            begin, seconds, *_ = self._products[-1]
            self._earlier = begin + seconds

    def _save(self) -> None:
        if self._pairs is not None:
            self._run.save({"pairs": self._pairs.state(), "products": self._products})

    def _admit(self) -> None:
        """Stop here if a budget is used up."""
        log = self._log
        assert log is not None
        with self._lock:
            if self._max_products is not None and self._started >= self._max_products:
                log.stopped = "max_products"
            elif (
                self._max_seconds is not None
                and perf_counter() - self._begin >= self._max_seconds
            ):
                log.stopped = log.stopped or "max_seconds"
            else:
                self._started += 1
                return
        raise RunStopped(self, f"stopped by {log.stopped}")

    def _show(self) -> None:
        if self._bar.update() and self._max_seconds is not None:
            left = max(self._max_seconds - (perf_counter() - self._begin), 0)
            self._bar.set_postfix_str(f"{left:.0f} s left", refresh=False)


def _came_from(error: BaseException | None, source: Monitor) -> bool:
    """Whether an error is our stop, or what somebody made of it."""
    seen = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, RunStopped) and error.args[0] is source:
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def _default_vectors(A: TorchLinearOperator, *, solving: bool) -> int:
    most = _MOST_VECTORS
    if solving and too_long(sum(A.shape), most):
        most = _FEW_VECTORS
    bytes_each = sum(A.shape) * A.torch_dtype.itemsize
    fitting = int(_MEMORY_SHARE * free_memory(A.device) / max(bytes_each, 1))
    return min(most, fitting) if fitting >= _LEAST_VECTORS else 0


def _right_hand_side(b: Array, A: TorchLinearOperator) -> Tensor:
    tensor = as_tensor(b, A.device).detach()
    if tensor.numel() != A.shape[0] or tensor.ndim > 2:
        raise ValueError(
            f"b has to have shape ({A.shape[0]},) for a {A.shape[0]} x {A.shape[1]} "
            f"operator, got {tuple(tensor.shape)}."
        )
    tensor = tensor.reshape(-1, 1).to(copy=True)
    if not torch.isfinite(tensor).all():
        raise ValueError("b has NaN or infinite entries.")
    return tensor


class _Bar(Bar):
    """A bar that says how much of the budget is left, where there is one."""

    @property
    def format_dict(self) -> dict[str, Any]:
        """What the format of the bar may refer to."""
        known: dict[str, Any] = super().format_dict
        total, rate, n = known["total"], known["rate"], known["n"]
        known["of"] = f" of {total}" if total else ""
        rate = rate or (n / known["elapsed"] if n and known["elapsed"] else None)
        known["left"] = (
            f", {Bar.format_interval((total - n) / rate)} left" if total and rate else ""
        )
        return known


def _bar(name: str, total: int | None) -> Any:
    return _Bar(desc=name, total=total, unit="product", bar_format=_BAR)

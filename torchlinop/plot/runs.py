"""Runs of solvers and of training."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np

from torchlinop._pairs import Which
from torchlinop._runlog import RunLog
from torchlinop._typing import Array
from torchlinop.estimate import Tracker
from torchlinop.plot.axes import axes_or_new, finished, on_host, require


def convergence(
    log: RunLog,
    *,
    k: int = 6,
    which: Which = "LM",
    b: Array | None = None,
    ax: Any = None,
) -> Any:
    """Draw residuals over the products of a monitored run.

    Parameters
    ----------
    log
        Of :func:`torchlinop.monitor`.
    k, which, b
        Of which Ritz pairs, or of which right-hand side; see
        :meth:`torchlinop.RunLog.convergence`.
    ax
        Where to draw.
    """
    require(RunLog, log, "the with block of monitor(A)")
    curve = log.convergence(k, which=which, b=b)
    ax = axes_or_new(ax)
    if curve.what == "solution":
        ax.semilogy(curve.products, curve.residual_norms[:, 0], marker=".", markersize=4)
        ax.set_ylabel("relative residual of the best iterate")
    else:
        tiny = 1e-17 * max(float(np.nanmax(np.abs(curve.values))), 1e-300)
        styles = itertools.cycle(("-", "--", "-.", ":"))
        markers = itertools.cycle("osv^D*x")
        for j in range(curve.values.shape[1])[::-1]:
            norms = np.maximum(curve.residual_norms[:, j], tiny)
            style = {"linestyle": next(styles), "marker": next(markers), "markersize": 4}
            name = f"{curve.values[-1, j]:.4g}"
            ax.semilogy(curve.products, norms, markevery=0.1, label=name, **style)
        ax.set_ylabel("residual of the Ritz pair")
    if log.stopped:
        ax.set_title(f"stopped by {log.stopped}", fontsize="medium")
    ax.set_xlabel("products")
    return finished(ax, legend=curve.what == "eigenvalues", title="Ritz value")


def sharpness(
    values: Array | Tracker,
    *,
    steps: Iterable[float] | None = None,
    learning_rate: Array | None = None,
    ax: Any = None,
) -> Any:
    """Draw the largest eigenvalues along training, with the edge of stability.

    Parameters
    ----------
    values
        Shape ``(T,)`` or ``(T, k)``; or a :class:`torchlinop.estimate.Tracker`, whose
        history is drawn.
    steps
        Shape ``(T,)``; by default 0, 1, 2, ...
    learning_rate
        Of gradient descent, a number or shape ``(T,)``: above ``2 / learning_rate`` a
        quadratic diverges.
    ax
        Where to draw.
    """
    if isinstance(values, Tracker):
        values = np.array([step.eigenvalues for step in values.history])
    rows = on_host(values)
    rows = rows[:, None] if rows.ndim == 1 else -np.sort(-rows, axis=-1)
    if rows.ndim != 2 or not rows.size:
        raise ValueError(f"values have to have shape (T,) or (T, k), got {rows.shape}.")
    times = np.arange(len(rows)) if steps is None else np.asarray(list(steps))
    if times.shape != (len(rows),):
        raise ValueError(f"There are {len(rows)} values and steps of shape {times.shape}.")
    ax = axes_or_new(ax)
    (line,) = ax.plot(times, rows[:, 0], label="sharpness", linewidth=1.8)
    for j in range(1, rows.shape[1]):
        name = "next eigenvalues" if j == 1 else None
        ax.plot(times, rows[:, j], color=line.get_color(), alpha=0.5, lw=1, label=name)
    if learning_rate is not None:
        edge = np.broadcast_to(2 / np.asarray(learning_rate, dtype=float), times.shape)
        ink = ax.xaxis.label.get_color()
        ax.plot(times, edge, color=ink, linestyle="--", label="2 / learning rate")
    ax.set_xlabel("step")
    ax.set_ylabel("eigenvalue")
    return finished(ax, legend=learning_rate is not None or rows.shape[1] > 1)

"""A summary as a picture."""

from __future__ import annotations

from typing import Any

import torch

from torchlinop._summary import Summary, summary
from torchlinop.plot.axes import pyplot
from torchlinop.plot.spectra import density, eigenvalues, log_density


def overview(A: Any, *, figure: Any = None) -> Any:
    """Draw a summary: eigenvalues at the ends, density, log density, and the numbers.

    Parameters
    ----------
    A
        A symmetric operator or matrix, which :func:`torchlinop.summary` looks at for a
        minute or less; or a :class:`~torchlinop.Summary`.
    figure
        Where to draw: an empty figure of Matplotlib; by default a new one.

    Returns
    -------
    numpy.ndarray of matplotlib.axes.Axes
        Shape ``(2, 2)``.
    """
    found = A if isinstance(A, Summary) else summary(A)
    if figure is None:
        figure = pyplot().figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    low = found.bottom.eigenvalues
    ends = torch.cat([low[low < 0], found.top.eigenvalues])
    eigenvalues(ends, ax=axes[0, 0])
    axes[0, 0].set_title("largest and lowest eigenvalues", fontsize="medium")
    density(found.density, ax=axes[0, 1])
    axes[0, 1].set_title("all eigenvalues", fontsize="medium")
    log_density(found.density, ax=axes[1, 0])
    axes[1, 0].set_title("by size", fontsize="medium")
    _write(axes[1, 1], str(found))
    return axes


def _write(ax: Any, text: str) -> None:
    """Fill the Axes with lines of text."""
    ax.axis("off")
    lines = [line.strip() for line in text.splitlines()]
    lines[:1] = lines[0].replace(">: ", ">\n").split("\n")
    # as wide as the Axes: 0.6 of its size is the width of a letter
    points = 72 * 0.41 * ax.figure.get_figwidth()
    size = min(9.0, points / (0.62 * max(len(line) for line in lines)))
    ax.text(
        0,
        1,
        "\n".join(lines),
        transform=ax.transAxes,
        va="top",
        family="monospace",
        fontsize=size,
        linespacing=1.7,
    )

"""Matrices as images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from torchlinop._operator import TorchLinearOperator
from torchlinop.plot.axes import axes_or_new, on_host

#: largest matrix that is drawn entry by entry
_LARGEST = 20_000


def matrix(
    A: Any, *, ax: Any = None, decades: float = 6.0, blocks: Sequence[int] = ()
) -> Any:
    """Draw the sizes of the entries of a matrix on a logarithmic scale.

    Parameters
    ----------
    A
        An operator, of which the dense matrix is computed, or an array ``(M, N)``.
    ax
        Where to draw.
    decades
        How far below the largest entry the scale reaches.
    blocks
        Sizes of the blocks between which lines are drawn, for instance
        ``H.space.sizes`` for one block for each parameter.
    """
    dense = A.to_dense() if isinstance(A, TorchLinearOperator) else A
    sizes = np.abs(on_host(dense))
    if sizes.ndim != 2 or not sizes.size or max(sizes.shape) > _LARGEST:
        raise ValueError(
            f"matrix draws up to {_LARGEST} rows and columns, got shape {sizes.shape}."
        )
    if sum(blocks) not in (0, *sizes.shape):
        raise ValueError(f"blocks add up to {sum(blocks)}, the matrix is {sizes.shape}.")
    ax = axes_or_new(ax, size=(5.5, 4.5))
    largest = np.nanmax(sizes) or 1.0
    with np.errstate(divide="ignore"):
        logs = np.maximum(np.log10(sizes / largest), -decades)
    # rows of one height: averages of few pixels would hide single entries
    image = ax.imshow(
        logs,
        cmap="viridis",
        vmin=-decades,
        vmax=0,
        interpolation="nearest" if max(sizes.shape) < 400 else "antialiased",
    )
    for edge in np.cumsum(blocks)[:-1] - 0.5 if len(blocks) else ():
        for draw in (ax.axhline, ax.axvline):
            draw(edge, color="white", linewidth=0.7)
    bar = ax.figure.colorbar(image, ax=ax)
    bar.set_label(f"log10 of the size, relative to {largest:.2g}")
    ax.set_xlabel("column")
    ax.set_ylabel("row")
    return ax

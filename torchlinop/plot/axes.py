"""What all pictures share."""

from __future__ import annotations

from typing import Any

import numpy as np

from torchlinop._interchange import as_tensor
from torchlinop._typing import Array

#: transparency of what lies behind the curves
BAND = 0.3


def pyplot() -> Any:
    """Matplotlib, imported when something is drawn."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "Pictures need Matplotlib: pip install 'torchlinop[plot]'."
        ) from error
    return plt


def axes_or_new(ax: Any, size: tuple[float, float] = (6.4, 4.2)) -> Any:
    """Return ``ax``, or the Axes of a new figure."""
    if ax is not None:
        return ax
    return pyplot().subplots(figsize=size, layout="constrained")[1]


def finished(ax: Any, *, legend: bool, title: str | None = None) -> Any:
    """Add a grid and perhaps a legend."""
    ax.grid(True, alpha=0.3, linewidth=0.5)
    if legend:
        ax.legend(fontsize="small", title=title, framealpha=0.5)
    return ax


def require(kind: type, value: Any, source: str) -> None:
    """Refuse what is no ``kind``; ``source`` is the call that makes one."""
    if not isinstance(value, kind):
        raise TypeError(
            f"What is drawn has to be a {kind.__name__}, which {source} gives, got "
            f"{type(value).__name__}."
        )


def on_host(array: Array) -> np.ndarray:
    """Return any array as a NumPy array of real or complex numbers."""
    host: np.ndarray = as_tensor(array).detach().cpu().resolve_conj().numpy()
    return host

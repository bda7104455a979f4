"""A progress bar of products."""

from __future__ import annotations

from torchlinop._progress import Bar, NoBar


def progress_bar(show: bool, total: int | None) -> Bar | NoBar:
    """Return a bar, or what does nothing, to count products with."""
    return Bar(total=total, unit="product", leave=False) if show else NoBar()

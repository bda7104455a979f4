"""A progress bar of products."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm


def progress_bar(show: bool, total: int | None) -> Any:
    """Return a tqdm bar, hidden unless it is to be shown."""
    return tqdm(total=total, unit="product", disable=not show, leave=False)

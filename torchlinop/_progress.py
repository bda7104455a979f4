"""Progress bars without a thread of their own."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm


class Bar(tqdm):
    """A bar of tqdm that does not start its monitor, a thread that outlives the bar."""

    monitor_interval = 0


class NoBar:
    """What stands for a bar that is not shown."""

    def __enter__(self) -> NoBar:
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def update(self, count: int = 1) -> None:
        """Count nothing."""

"""What is said when an iteration ends before it should."""

from __future__ import annotations

import sys


class ConvergenceWarning(UserWarning):
    """An iteration ended before it reached the tolerance."""


def users_frame() -> int:
    """Return the ``stacklevel`` of the first frame outside this package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").startswith("torchlinop"):
        frame, level = frame.f_back, level + 1
    return level

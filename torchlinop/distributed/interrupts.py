"""Ctrl-C while several processes talk to one another."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class HeldInterrupts:
    """Keeps the first Ctrl-C until a collective call is over, so that no rank is missing.

    A second one is not kept. Outside of the main thread, where Python raises nothing,
    this does nothing.
    """

    def __init__(self) -> None:
        self._noted: tuple[Any, ...] | None = None
        self._previous: Any = None

    def _note(self, *signal_and_frame: Any) -> None:
        if self._noted is not None:
            self._previous(*signal_and_frame)
        self._noted = signal_and_frame

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep an interrupt until the end of this context."""
        previous = signal.getsignal(signal.SIGINT)
        main = threading.current_thread() is threading.main_thread()
        if not main or not callable(previous) or self._previous is not None:
            yield  # nothing would be raised, or it is kept already
            return
        self._previous = previous
        try:
            signal.signal(signal.SIGINT, self._note)
            yield
        finally:
            signal.signal(signal.SIGINT, previous)
            self._previous = None
            noted, self._noted = self._noted, None
            if noted is not None:
                previous(*noted)

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Within :meth:`held`: raise an interrupt at once, where it can be told."""
        if self._previous is None:
            yield
            return
        try:
            signal.signal(signal.SIGINT, self._previous)
            noted, self._noted = self._noted, None
            if noted is not None:
                self._previous(*noted)
            yield
        finally:
            signal.signal(signal.SIGINT, self._note)

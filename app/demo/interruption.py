"""Stopping on a signal, at points where stopping is safe.

A handler that raises may do so in the middle of an import or of starting a process, and leave a lock held or a child
that nobody knows. So a signal is only noted, and asked for between steps and in every wait.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

STOPPING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Interrupted(BaseException):
    """A signal asked to stop. Not an Exception: it is no failure of a step."""


class Interruption:
    """Notes stopping signals while entered. For the main thread."""

    def __init__(self) -> None:
        self._asked = False
        self._raises = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        if self._raises:
            self._raises = False
            raise Interrupted

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self._asked:
            raise Interrupted

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal end the block where it is: for long work that neither imports nor starts anything."""
        self._raises = True
        try:
            self.check()
            yield
        finally:
            self._raises = False
        self.check()

    def __enter__(self) -> Interruption:
        ours = [n for n in STOPPING_SIGNALS if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]  # nohup
        self._before = {number: signal.signal(number, self._on_signal) for number in ours}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

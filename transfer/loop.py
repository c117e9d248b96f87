"""A thread that must live: it calls one function again and again until it is stopped, and outlives what that raises.

A poller, a caretaker, a renewer that dies of what nobody foresaw goes unnoticed until it is missed: the daemon answers,
and nothing is polled, filled or renewed any more. So each of them is a `Loop`: named, so that a stack dump tells who it
is; owned by whoever started it, who stops it; and counted, so that what it survived is seen in a metric.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

AFTER_FAILURE_S = 1.0  # between a turn that failed and the next: what fails at once must not spin

_log = logging.getLogger("hotspare.loop")


class Loop:
    """Calls `turn` in a thread of its own: again after as many seconds as it returned, with None once it is woken.

    The first turn is taken after `first_after_s`.
    """

    def __init__(self, name: str, turn: Callable[[], float | None], first_after_s: float = 0.0) -> None:
        self.name = name
        self.failures = 0
        """Turns that ended in an exception, each logged; the loop went on after all of them."""
        self._turn = turn
        self._first_after_s = first_after_s
        self._is_stopped = False
        self._woken = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin. Raises RuntimeError where the system has no thread to give."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def is_stopped(self) -> bool:
        """Whether it was told to stop: a turn that takes long asks now and then."""
        return self._is_stopped

    def wake(self) -> None:
        """Take the next turn now, or once more after the one under way."""
        self._woken.set()

    def stop(self, timeout_s: float | None = None) -> bool:
        """Take no further turn, and wait for the one under way; whether it has ended. Harmless before `start`."""
        self._is_stopped = True
        self._woken.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        self._woken.wait(self._first_after_s)
        while not self._is_stopped:
            self._woken.clear()
            if self._is_stopped:  # told so between the question above and the clearing
                return
            self._woken.wait(self._take_turn())

    def _take_turn(self) -> float | None:
        try:
            return self._turn()
        except Exception:  # whatever it is, the next turn is due all the same
            self.failures += 1
            _log.exception("%s failed in an unforeseen way, and goes on", self.name)
            return AFTER_FAILURE_S

"""A node that is told to stop has stopped within seconds, whatever it is in the middle of.

Most of what it waits for ends when it is told to (`Context.hurry`). Some of it cannot be told: a reservation of
hundreds of gigabytes, the transfer engine's first word to a host that does not answer, a disk that hangs. Ending the
process in the middle of those costs nothing that a crash would not, and crashes cost nothing (docs/design.md).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue

from shm import inventory
from shm.layout import SegmentName

STOP_S = 2.5  # from the signal; an orchestrator's patience is 10 s and more, and a person's 3

_log = logging.getLogger("hotspare.daemon")


class StopDeadline:
    """Counts from `tell`, in a thread of its own."""

    def __init__(self, name: SegmentName, last_words: Callable[[], None]) -> None:
        """`last_words` is called before the process is ended."""
        self.hurry: Callable[[], None] = lambda: None
        """Has what can be told to end do so. Called once, as soon as the node is told to stop."""
        self._name = name
        self._last_words = last_words
        self._told: SimpleQueue[float] = SimpleQueue()
        self._is_over = threading.Event()
        threading.Thread(target=self._run, name="hotspare-stop", daemon=True).start()

    def tell(self) -> None:
        """It is to stop. For signal handlers too: a SimpleQueue may be put to in the middle of anything."""
        self._told.put(time.monotonic())

    def stand_down(self) -> None:
        """It has stopped."""
        self._is_over.set()

    def _run(self) -> None:
        end = self._told.get() + STOP_S
        try:
            self.hurry()
        except Exception:
            _log.exception("not everything could be told to stop")
        if not self._is_over.wait(max(0.0, end - time.monotonic())):
            self._end()

    def _end(self) -> None:
        at_work = ", ".join(sorted(t.name for t in threading.enumerate() if t.name.startswith("hotspare-re")))
        _log.warning("stopping without waiting any longer for what is under way (%s)", at_work or "in a library")
        try:
            inventory.give_up(self._name.object_name)
        except Exception:
            _log.exception("the unsealed segment stays: the next daemon, or `hotspare rm`, reclaims it")
        self._last_words()
        logging.shutdown()
        os._exit(0)

"""Stops processes at any moment, for any time, and wakes them at any later one, in a thread of its own."""

from __future__ import annotations

import math
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

from tests.processes import pause

PAUSE_S_MIN, PAUSE_S_MAX = 0.05, 15.0  # some are shorter than anything waits, some longer than a transfer's timeout
GAP_S = 1.0  # between the beginnings of two pauses, on average
CLOSE_S = 0.3  # after an operation began: then something is under way


class Pauser:
    """Of the processes that `pids` names now. `paused` is told each pause's name and seconds."""

    def __init__(
        self, chance: random.Random, pids: Callable[[], Mapping[str, int]], paused: Callable[[str, float], None]
    ) -> None:
        self._chance = chance
        self._pids = pids
        self._paused = paused
        self._asleep: dict[str, tuple[float, int]] = {}
        """Name → when it is to be woken, and its process."""
        self._asleep_max = chance.randint(1, max(1, len(pids())))
        self._spared: set[str] = set()
        self._next_s = time.monotonic()
        self._is_over = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="pauser", daemon=True)
        self._thread.start()

    def is_asleep(self, name: str) -> bool:
        with self._changed:
            return name in self._asleep

    def soon(self) -> None:
        """An operation began: let the next pause fall into it."""
        with self._changed:
            self._next_s = min(self._next_s, time.monotonic() + self._chance.uniform(0, CLOSE_S))
            self._changed.notify_all()

    @contextmanager
    def spare(self, name: str, *, wake: bool) -> Iterator[None]:
        """Leave one alone for a while: it is woken first, or stays as it is and is forgotten."""
        with self._changed:
            self._spared.add(name)
            _, pid = self._asleep.pop(name, (0.0, 0))
            if pid and wake:
                _wake(pid)
        try:
            yield
        finally:
            with self._changed:
                self._spared.discard(name)

    def close(self) -> None:
        """Wake all, and begin no more."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        self._thread.join()
        for _, pid in self._asleep.values():
            _wake(pid)
        self._asleep.clear()

    def _run(self) -> None:
        with self._changed:
            while not self._is_over:
                now = time.monotonic()
                self._wake_those_due(now)
                if self._next_s <= now:
                    self._begin(now)
                due = min([self._next_s, *(until_s for until_s, _ in self._asleep.values())])
                self._changed.wait(max(0.001, due - time.monotonic()))

    def _wake_those_due(self, now: float) -> None:
        for name, (until_s, pid) in list(self._asleep.items()):
            if until_s <= now:
                del self._asleep[name]
                _wake(pid)

    def _begin(self, now: float) -> None:
        self._next_s = now + self._chance.expovariate(1 / GAP_S)
        pids = self._pids()
        awake = sorted(set(pids) - set(self._asleep) - self._spared)
        if not awake or len(self._asleep) >= self._asleep_max:
            return
        name = self._chance.choice(awake)
        seconds = math.exp(self._chance.uniform(math.log(PAUSE_S_MIN), math.log(PAUSE_S_MAX)))
        with suppress(FileNotFoundError, ProcessLookupError):  # it ended just now
            pause(pids[name])
            self._asleep[name] = now + seconds, pids[name]
            self._paused(name, seconds)


def _wake(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)

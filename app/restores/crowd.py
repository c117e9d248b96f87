"""Asking many nodes at once, and waiting for all of them no longer than for one: the silent cost no other's news."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from typing import TypeVar

THREADS_MAX = 32  # a question to a silent node takes one for two seconds
WAIT_S = 2.5  # for all of them; each is given two

Said = TypeVar("Said")


class Crowd:
    """Threads that ask. What is asked must end by itself. Thread-safe."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(THREADS_MAX, "hotspare-crowd")

    def ask(self, questions: Iterable[Callable[[], Said]], wait_s: float = WAIT_S) -> Iterator[Said]:
        """What comes back within `wait_s`, as it does. Of the others those that have not begun are dropped.

        Raises what a question does.
        """
        with suppress(RuntimeError):  # it is being stopped: what was not asked has no answer
            asked = [self._pool.submit(question) for question in questions]
            try:
                for each in as_completed(asked, wait_s):
                    yield each.result()
            except TimeoutError:
                return
            finally:
                for each in asked:
                    each.cancel()

    def stop(self) -> None:
        """Ask no more. Questions under way are not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)

"""A clock for tests that wait for nothing: it stands still until somebody moves it."""

from __future__ import annotations


class Clock:
    """Seconds of a clock that does not begin at 0. Set `now_s`."""

    def __init__(self) -> None:
        self.now_s = 1003.5

    def __call__(self) -> float:
        return self.now_s

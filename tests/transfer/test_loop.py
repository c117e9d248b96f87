from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from transfer import loop as loop_module
from transfer.loop import Loop


@pytest.fixture
def started() -> Iterator[Callable[..., Loop]]:
    """`started(turn)` → a loop of that function, stopped at the end of the test."""
    made: list[Loop] = []

    def make(turn: Callable[[], float | None]) -> Loop:
        made.append(Loop("hotspare-tried", turn))
        made[-1].start()
        return made[-1]

    yield make
    for each in made:
        each.stop()


def test_it_takes_turns_until_it_is_stopped(started: Callable[..., Loop], wait_until: Callable[..., Any]) -> None:
    turns: list[str] = []
    loop = started(lambda: turns.append(threading.current_thread().name) or 0.001)
    wait_until(lambda: len(turns) > 3)
    assert loop.stop()
    seen = len(turns)
    assert set(turns) == {"hotspare-tried"}
    assert not loop.is_alive
    assert len(turns) == seen


def test_an_unforeseen_error_is_logged_and_counted_and_ends_nothing(
    started: Callable[..., Loop],
    wait_until: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(loop_module, "AFTER_FAILURE_S", 0.001)
    turns: list[int] = []

    def turn() -> float:
        turns.append(len(turns))
        if len(turns) <= 3:
            raise RuntimeError(f"nobody foresaw {len(turns)}")
        return 0.001

    loop = started(turn)
    wait_until(lambda: len(turns) > 5)
    assert loop.failures == 3
    assert loop.is_alive
    assert all(f"nobody foresaw {number}" in caplog.text for number in (1, 2, 3))


def test_without_a_time_it_waits_until_it_is_woken(
    started: Callable[..., Loop], wait_until: Callable[..., Any]
) -> None:
    turns: list[int] = []
    loop = started(lambda: turns.append(3) or None)  # type: ignore[func-returns-value]
    wait_until(lambda: len(turns) == 1)
    loop.wake()
    wait_until(lambda: len(turns) == 2)


def test_what_wakes_it_during_a_turn_gives_it_another(
    started: Callable[..., Loop], wait_until: Callable[..., Any]
) -> None:
    turns: list[int] = []
    loop: list[Loop] = []
    may_begin = threading.Event()

    def turn() -> None:
        may_begin.wait(33)
        turns.append(3)
        if len(turns) == 1:
            loop[0].wake()

    loop.append(started(turn))
    may_begin.set()
    wait_until(lambda: len(turns) == 2)


def test_stopping_waits_for_the_turn_under_way_no_longer_than_it_is_told(started: Callable[..., Loop]) -> None:
    began, may_end = threading.Event(), threading.Event()

    def turn() -> None:
        began.set()
        may_end.wait(33)

    loop = started(turn)
    assert began.wait(33)
    assert not loop.stop(0.01)
    may_end.set()
    assert loop.stop()


def test_one_that_never_began_is_stopped_already() -> None:
    assert Loop("hotspare-tried", lambda: None).stop()

"""How many copies may be under way: states of a window and what happens to it."""

from __future__ import annotations

import pytest

from transfer.engine.window import COPIES_MAX, COPIES_MIN, PROMPT_S, SMALL_NBYTES, SMALL_PER_COPY, Window

LARGE = 8 << 20
PROMPTLY, LATE = PROMPT_S / 2, PROMPT_S * 2


def let_in(window: Window, nbytes: int = LARGE) -> int:
    """How many get in until it is full."""
    count = 0
    while window.enter(nbytes):
        count += 1
    return count


@pytest.mark.parametrize(
    ("nbytes", "count"),
    [
        (LARGE, COPIES_MIN),
        (SMALL_NBYTES + 1, COPIES_MIN),
        (SMALL_NBYTES, COPIES_MIN * SMALL_PER_COPY),
        (1, COPIES_MIN * SMALL_PER_COPY),
    ],
)
def test_so_many_are_let_in_at_first(nbytes: int, count: int) -> None:
    assert let_in(Window(), nbytes) == count


def test_who_leaves_makes_room_for_one_like_it() -> None:
    window = Window()
    let_in(window)
    window.leave(LARGE)
    assert let_in(window) == 1
    window.leave(LARGE)
    assert let_in(window, 1) == SMALL_PER_COPY


def test_what_arrives_promptly_opens_it_by_one_up_to_the_limit() -> None:
    window = Window()
    for number in range(1, COPIES_MAX):
        window.arrived(LARGE, PROMPTLY)
        assert window.copies == min(COPIES_MIN + number, COPIES_MAX)
    assert let_in(window) == COPIES_MAX


@pytest.mark.parametrize("what", ["late", "lost"])
def test_what_is_late_or_lost_narrows_it_at_once(what: str) -> None:
    window = Window()
    for _ in range(COPIES_MAX):
        window.arrived(LARGE, PROMPTLY)
    if what == "late":
        window.arrived(LARGE, LATE)
    else:
        window.narrow()
    assert window.copies == COPIES_MIN


@pytest.mark.parametrize("seconds", [PROMPTLY, LATE])
def test_small_copies_say_nothing_of_the_speed(seconds: float) -> None:
    window = Window()
    window.arrived(LARGE, PROMPTLY)
    window.arrived(SMALL_NBYTES, seconds)
    assert window.copies == COPIES_MIN + 1


def test_none_is_let_in_while_more_are_under_way_than_a_narrowed_one_has_room_for() -> None:
    window = Window()
    for _ in range(COPIES_MAX):
        window.arrived(LARGE, PROMPTLY)
    let_in(window)
    window.narrow()
    for _ in range(COPIES_MAX - COPIES_MIN):
        window.leave(LARGE)
        assert not window.enter(LARGE)
    window.leave(LARGE)
    assert window.enter(LARGE)

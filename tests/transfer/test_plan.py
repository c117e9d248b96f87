"""Batches and calls against a byte-level simulation: whatever is joined and cut, every byte goes where it should."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfer import plan
from transfer.engine import Copy
from transfer.plan import Batch, Limits, Queue, Want, coalesce, in_pieces, sliced, split

AT_SOURCE = 1 << 20  # where the source's addresses start; destinations start at 0
Waiting = list[tuple[Want, int]]


def moved(copies: list[Copy]) -> dict[int, int]:
    """Destination byte → source byte; no destination byte is written twice."""
    bytes_of: dict[int, int] = {}
    for destination, source, nbytes in copies:
        for i in range(nbytes):
            assert destination + i not in bytes_of
            bytes_of[destination + i] = source + i
    return bytes_of


@st.composite
def problems(draw: st.DrawFn) -> tuple[Waiting, Limits]:
    """Blocks that wait for one source, and how large a batch is."""
    waiting, address = [], AT_SOURCE
    for row, nbytes in enumerate(draw(st.lists(st.integers(1, 33), min_size=1, max_size=12))):
        address += draw(st.sampled_from([0, 0, 5]))
        waiting.append((Want(row, nbytes, None), address))
        address += nbytes
    return draw(st.permutations(waiting)), Limits(draw(st.integers(1, 9)), draw(st.integers(1, 77)))


@st.composite
def copies(draw: st.DrawFn) -> list[Copy]:
    """Copies that often touch, on one side or on both."""
    made, destination, source = [], 0, AT_SOURCE
    for nbytes in draw(st.lists(st.integers(1, 33), max_size=12)):
        destination += draw(st.sampled_from([0, 0, 7]))
        source += draw(st.sampled_from([0, 0, 5]))
        made.append(Copy(destination, source, nbytes))
        destination, source = destination + nbytes, source + nbytes
    return made


def cut(waiting: Waiting, limits: Limits, again: frozenset[int] = frozenset()) -> list[Batch]:
    queue = Queue()
    for want, address in waiting:
        queue.put(want, address, is_again=want.row in again)
    assert queue.nbytes == sum(want.nbytes for want, _ in waiting)
    made = []
    while queue:
        made.append(queue.cut("a", limits))
    assert queue.nbytes == 0
    return made


@given(problems())
def test_every_block_that_waits_is_cut_once_in_the_order_of_the_source(problem: tuple[Waiting, Limits]) -> None:
    waiting, limits = problem
    rows = [want.row for batch in cut(waiting, limits) for want in batch.wants]
    assert rows == [want.row for want, _ in sorted(waiting, key=lambda pair: pair[1])]
    assert all(batch.nbytes == sum(want.nbytes for want in batch.wants) for batch in cut(waiting, limits))


@given(problems())
def test_a_batch_says_where_each_of_its_blocks_lies(problem: tuple[Waiting, Limits]) -> None:
    waiting, limits = problem
    told = [pair for batch in cut(waiting, limits) for pair in zip(batch.wants, batch.addresses, strict=True)]
    assert sorted(told) == sorted(waiting)


@given(copies())
def test_joining_ranges_never_changes_which_byte_goes_where(wanted: list[Copy]) -> None:
    assert moved(coalesce(wanted)) == moved(wanted)


@given(copies(), st.integers(1, 9))
def test_slicing_bounds_every_item_and_moves_the_same_bytes(wanted: list[Copy], most: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "ITEM_NBYTES_MAX", most)
        items = sliced(wanted)
    assert all(0 < item.nbytes <= most for item in items)
    assert moved(items) == moved(wanted)


@given(problems())
def test_batches_keep_their_limits_unless_a_single_block_is_larger(problem: tuple[Waiting, Limits]) -> None:
    waiting, limits = problem
    for batch in cut(waiting, limits):
        if len(batch.wants) > 1:
            assert batch.nbytes <= limits.nbytes
            assert len(batch.wants) <= limits.items


@given(problems(), st.frozensets(st.integers(0, 11)))
def test_blocks_that_come_again_go_last_and_each_alone(problem: tuple[Waiting, Limits], again: frozenset[int]) -> None:
    waiting, limits = problem
    made = cut(waiting, limits, again)
    first = [batch for batch in made if not again.intersection(want.row for want in batch.wants)]
    assert made[: len(first)] == first
    assert all(len(batch.wants) == 1 for batch in made[len(first) :])


@given(copies(), st.integers(1, 9), st.integers(1, 77))
def test_calls_keep_the_limits_and_move_the_same_bytes(wanted: list[Copy], items: int, nbytes: int) -> None:
    calls = split(wanted, Limits(items, nbytes))
    assert all(0 < len(call) <= items for call in calls)
    assert all(0 < sum(copy.nbytes for copy in call) <= nbytes for call in calls)
    assert moved([copy for call in calls for copy in call]) == moved(wanted)


def test_ranges_join_only_where_they_touch_on_both_sides() -> None:
    assert coalesce([Copy(0, 100, 10), Copy(10, 110, 5), Copy(15, 200, 5), Copy(30, 205, 5)]) == [
        Copy(0, 100, 15),
        Copy(15, 200, 5),
        Copy(30, 205, 5),
    ]
    assert coalesce([Copy(10, 110, 5), Copy(0, 100, 10)]) == [Copy(10, 110, 5), Copy(0, 100, 10)]


def test_who_is_sent_away_waits_no_longer() -> None:
    queue = Queue()
    for row in range(3):
        queue.put(Want(row, 33, None), 77 * row)
    assert sorted(queue.clear()) == [0, 1, 2]
    assert (len(queue), queue.nbytes) == (0, 0)


def test_nothing_to_move_makes_no_call() -> None:
    assert split((), Limits()) == []
    assert split((Copy(3, 33, 0),), Limits()) == []


def test_pieces_keep_the_order_and_are_no_larger_than_was_said_but_for_one_block() -> None:
    wants = [Want(row, nbytes, None) for row, nbytes in enumerate((3, 4, 9, 1, 1, 33, 2))]
    assert [[want.row for want in piece] for piece in in_pieces(wants, 10)] == [[0, 1], [2, 3], [4], [5], [6]]
    assert in_pieces([], 10) == []

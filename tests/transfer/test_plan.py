"""Batches against a byte-level simulation: whatever is joined and cut, every byte goes where it was asked to go."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from transfer.engine import Copy
from transfer.plan import Batch, Limits, Piece, Queue, Want, coalesce, split

AT_SOURCE = 1 << 20  # where the source's addresses start; destinations start at 0
Waiting = list[tuple[Want, int]]


def want(row: int, nbytes: int, destination: int) -> Want:
    return Want(row, nbytes, (Piece(destination, 0, nbytes),), None)


def moved(copies: tuple[Copy, ...] | list[Copy]) -> dict[int, int]:
    """Destination byte → source byte; no destination byte is written twice."""
    bytes_of: dict[int, int] = {}
    for destination, source, nbytes in copies:
        for i in range(nbytes):
            assert destination + i not in bytes_of
            bytes_of[destination + i] = source + i
    return bytes_of


@st.composite
def problems(draw: st.DrawFn) -> tuple[Waiting, Limits]:
    """Blocks that wait for one source, cut into pieces that lie anywhere, often touching; and how large a batch is."""
    waiting, destination, address = [], 0, AT_SOURCE
    for row, nbytes in enumerate(draw(st.lists(st.integers(1, 33), min_size=1, max_size=12))):
        cuts = sorted(draw(st.sets(st.integers(1, 32), max_size=3)))
        edges = [0, *(c for c in cuts if c < nbytes), nbytes]
        pieces = []
        for start, end in itertools.pairwise(edges):
            destination += draw(st.sampled_from([0, 0, 7]))
            pieces.append(Piece(destination, start, end - start))
            destination += end - start
        address += draw(st.sampled_from([0, 0, 5]))
        waiting.append((Want(row, nbytes, tuple(pieces), None), address))
        address += nbytes
    return draw(st.permutations(waiting)), Limits(draw(st.integers(1, 9)), draw(st.integers(1, 77)))


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
def test_joining_ranges_never_changes_which_byte_goes_where(problem: tuple[Waiting, Limits]) -> None:
    waiting, limits = problem
    address_of = {want.row: address for want, address in waiting}
    for batch in cut(waiting, limits):
        expected: dict[int, int] = {}
        for w in batch.wants:
            for piece in w.pieces:
                for i in range(piece.nbytes):
                    expected[piece.destination + i] = address_of[w.row] + piece.offset + i
        assert moved(batch.copies) == expected


@given(problems())
def test_batches_keep_their_limits_unless_a_single_block_is_larger(problem: tuple[Waiting, Limits]) -> None:
    waiting, limits = problem
    for batch in cut(waiting, limits):
        if len(batch.wants) > 1:
            assert batch.nbytes <= limits.nbytes
            assert sum(len(w.pieces) for w in batch.wants) <= limits.items


@given(problems(), st.frozensets(st.integers(0, 11)))
def test_blocks_that_come_again_go_last_and_each_alone(problem: tuple[Waiting, Limits], again: frozenset[int]) -> None:
    waiting, limits = problem
    made = cut(waiting, limits, again)
    first = [batch for batch in made if not again.intersection(want.row for want in batch.wants)]
    assert made[: len(first)] == first
    assert all(len(batch.wants) == 1 for batch in made[len(first) :])


@given(problems())
def test_calls_keep_the_limits_whatever_the_batch_and_move_the_same_bytes(problem: tuple[Waiting, Limits]) -> None:
    waiting, limits = problem
    for batch in cut(waiting, limits):
        calls = split(batch.copies, limits)
        assert all(0 < len(call) <= limits.items for call in calls)
        assert all(0 < sum(copy.nbytes for copy in call) <= limits.nbytes for call in calls)
        assert moved([copy for call in calls for copy in call]) == moved(batch.copies)


def test_ranges_join_only_where_they_touch_on_both_sides() -> None:
    assert coalesce([Copy(0, 100, 10), Copy(10, 110, 5), Copy(15, 200, 5), Copy(30, 205, 5)]) == [
        Copy(0, 100, 15),
        Copy(15, 200, 5),
        Copy(30, 205, 5),
    ]
    assert coalesce([Copy(10, 110, 5), Copy(0, 100, 10)]) == [Copy(10, 110, 5), Copy(0, 100, 10)]


def test_neighbouring_blocks_become_one_copy() -> None:
    waiting = [(want(row, 3333, 5_000_000 + 3333 * row), 90_000 + 3333 * row) for row in range(7)]
    (batch,) = cut(waiting[::-1], Limits())
    assert batch.copies == (Copy(5_000_000, 90_000, 7 * 3333),)
    assert [w.row for w in batch.wants] == list(range(7))


def test_who_is_sent_away_waits_no_longer() -> None:
    queue = Queue()
    for row in range(3):
        queue.put(want(row, 33, 40 * row), 77 * row)
    assert sorted(queue.clear()) == [0, 1, 2]
    assert (len(queue), queue.nbytes) == (0, 0)


def test_nothing_to_move_makes_no_call() -> None:
    assert split((), Limits()) == []
    assert split((Copy(3, 33, 0),), Limits()) == []

"""The planner against a byte-level simulation: whatever it joins and cuts, every byte goes where it was asked to go."""

from __future__ import annotations

import itertools
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from transfer.engine import Copy
from transfer.plan import Batch, Limits, Offer, Piece, RestorePlan, Want, coalesce, plan, split

SOURCE_SPAN = 1 << 20  # sources' addresses start at multiples of it, destinations at 0


def want(row: int, nbytes: int, destination: int, checksum: bytes | None = None) -> Want:
    return Want(row, nbytes, (Piece(destination, 0, nbytes),), checksum)


def moved(copies: tuple[Copy, ...] | list[Copy]) -> dict[int, int]:
    """Destination byte → source byte; no destination byte is written twice."""
    bytes_of: dict[int, int] = {}
    for destination, source, nbytes in copies:
        for i in range(nbytes):
            assert destination + i not in bytes_of
            bytes_of[destination + i] = source + i
    return bytes_of


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Want], dict[int, list[Offer]], dict[str, Limits]]:
    """Blocks cut into pieces that lie anywhere, often touching; offered by some of four sources, or by none."""
    sizes = draw(st.lists(st.integers(1, 33), min_size=1, max_size=12))
    names = ["a", "b", "c", "d"]
    wants, offers, destination = [], {}, 0
    address = {name: SOURCE_SPAN * (i + 1) for i, name in enumerate(names)}
    for row, nbytes in enumerate(sizes):
        cuts = sorted(draw(st.sets(st.integers(1, 32), max_size=3)))
        edges = [0, *(c for c in cuts if c < nbytes), nbytes]
        pieces = []
        for start, end in itertools.pairwise(edges):
            destination += draw(st.sampled_from([0, 0, 7]))
            pieces.append(Piece(destination, start, end - start))
            destination += end - start
        wants.append(Want(row, nbytes, tuple(pieces), None))
        offering = draw(st.lists(st.sampled_from(names), unique=True, max_size=4))
        offers[row] = []
        for name in offering:
            address[name] += draw(st.sampled_from([0, 0, 5]))
            offers[row].append(Offer(name, address[name]))
            address[name] += nbytes
    limits = {name: Limits(draw(st.integers(1, 9)), draw(st.integers(1, 77))) for name in names[:3]}
    return draw(st.permutations(wants)), offers, limits


def all_batches(planned: RestorePlan) -> list[Batch]:
    return [batch for batches in planned.batches.values() for batch in batches]


@given(problems())
def test_every_offered_block_is_served_once_by_a_source_that_offers_it(
    problem: tuple[list[Want], dict[int, list[Offer]], dict[str, Limits]],
) -> None:
    wants, offers, limits = problem
    planned = plan(wants, offers, limits)
    served = Counter(w.row for batch in all_batches(planned) for w in batch.wants)
    assert set(served.values()) <= {1}
    assert set(served) == {w.row for w in wants if offers[w.row]}
    assert sorted(planned.unserved) == sorted(w.row for w in wants if not offers[w.row])
    for source, batches in planned.batches.items():
        for batch in batches:
            assert batch.source == source
            assert all(source in {o.source for o in offers[w.row]} for w in batch.wants)
            assert batch.nbytes == sum(w.nbytes for w in batch.wants)


@given(problems())
def test_joining_ranges_never_changes_which_byte_goes_where(
    problem: tuple[list[Want], dict[int, list[Offer]], dict[str, Limits]],
) -> None:
    wants, offers, limits = problem
    for batch in all_batches(plan(wants, offers, limits)):
        expected: dict[int, int] = {}
        for w in batch.wants:
            address = next(o.address for o in offers[w.row] if o.source == batch.source)
            for piece in w.pieces:
                for i in range(piece.nbytes):
                    expected[piece.destination + i] = address + piece.offset + i
        assert moved(batch.copies) == expected


@given(problems())
def test_batches_keep_their_limits_unless_a_single_block_is_larger(
    problem: tuple[list[Want], dict[int, list[Offer]], dict[str, Limits]],
) -> None:
    wants, offers, limits = problem
    for batch in all_batches(plan(wants, offers, limits)):
        limit = limits.get(batch.source, Limits())
        if len(batch.wants) > 1:
            assert batch.nbytes <= limit.nbytes
            assert sum(len(w.pieces) for w in batch.wants) <= limit.items


@given(problems())
def test_calls_keep_the_limits_whatever_the_batch_and_move_the_same_bytes(
    problem: tuple[list[Want], dict[int, list[Offer]], dict[str, Limits]],
) -> None:
    wants, offers, limits = problem
    for batch in all_batches(plan(wants, offers, limits)):
        limit = limits.get(batch.source, Limits())
        calls = split(batch.copies, limit)
        assert all(0 < len(call) <= limit.items for call in calls)
        assert all(0 < sum(copy.nbytes for copy in call) <= limit.nbytes for call in calls)
        assert moved([copy for call in calls for copy in call]) == moved(batch.copies)


@given(st.lists(st.integers(1, 333), min_size=1, max_size=40), st.integers(1, 5))
def test_replicas_that_all_have_everything_differ_by_one_block_at_most(sizes: list[int], replicas: int) -> None:
    names = [f"node-{i}" for i in range(replicas)]
    wants = [want(row, nbytes, 1000 * row) for row, nbytes in enumerate(sizes)]
    planned = plan(wants, {w.row: [Offer(name, 7000 * w.row) for name in names] for w in wants}, {})
    load = {name: sum(b.nbytes for b in planned.batches.get(name, ())) for name in names}
    assert sum(load.values()) == sum(sizes)
    assert max(load.values()) - min(load.values()) <= max(sizes)


def test_blocks_with_a_choice_make_up_for_those_without() -> None:
    """Half of the blocks are on `a` and `b`, half on `b` alone, and they come last: `a` takes all that it can."""
    wants = [want(row, 333, 1000 * row) for row in range(20)]
    offers = {w.row: [Offer("a", 1), Offer("b", 1)] if w.row < 10 else [Offer("b", 1)] for w in wants}
    planned = plan(wants, offers, {})
    assert {name: sum(b.nbytes for b in batches) for name, batches in planned.batches.items()} == {
        "a": 3330,
        "b": 3330,
    }


def test_ranges_join_only_where_they_touch_on_both_sides() -> None:
    assert coalesce([Copy(0, 100, 10), Copy(10, 110, 5), Copy(15, 200, 5), Copy(30, 205, 5)]) == [
        Copy(0, 100, 15),
        Copy(15, 200, 5),
        Copy(30, 205, 5),
    ]
    assert coalesce([Copy(10, 110, 5), Copy(0, 100, 10)]) == [Copy(10, 110, 5), Copy(0, 100, 10)]


def test_neighbouring_blocks_become_one_copy() -> None:
    wants = [want(row, 3333, 5_000_000 + 3333 * row) for row in range(7)]
    planned = plan(reversed(wants), {w.row: [Offer("a", 90_000 + 3333 * w.row)] for w in wants}, {})
    (batch,) = planned.batches["a"]
    assert batch.copies == (Copy(5_000_000, 90_000, 7 * 3333),)
    assert [w.row for w in batch.wants] == list(range(7))


def test_nothing_to_move_makes_no_call() -> None:
    assert split((), Limits()) == []
    assert split((Copy(3, 33, 0),), Limits()) == []


def test_a_model_of_deepseeks_size_is_planned_within_the_limits() -> None:
    """14,848 blocks on two replicas each, 44 MB a block: balanced, and no batch above its limit."""
    nbytes = 44_050_944
    wants = [want(row, nbytes, 1 << 40 | row * nbytes) for row in range(14_848)]
    offers = {w.row: [Offer(f"n{w.row % 8}", w.row * nbytes), Offer(f"n{(w.row + 3) % 8}", w.row)] for w in wants}
    planned = plan(wants, offers, {})
    loads = [sum(b.nbytes for b in batches) for batches in planned.batches.values()]
    assert sum(loads) == 14_848 * nbytes
    assert max(loads) <= 1.05 * min(loads)
    assert all(b.nbytes <= Limits().nbytes and len(b.copies) <= Limits().items for b in all_batches(planned))

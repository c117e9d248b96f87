"""The ledger as tables of states and events, and as properties over restores that go wrong in every way at random.

The clock is a number here. Names are those of the tables: `grep held_back` finds what can happen to such a block.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transfer.errors import SomeLost, TransferFailed
from transfer.ledger import LANES_MAX, LOOK_S, NOBODY, OFFER_TRIES_MAX, REASONS_MAX, STEPS, Event, Ledger, Orders, Stage
from transfer.plan import LAST_BATCHES_NBYTES_MIN, Batch, Limits, Offer, Want
from transfer.standing import (
    DOUBT_PAUSE_S,
    GRACE_S,
    LATE_FACTOR,
    PACE_NBYTES_PER_S,
    PATIENCE_S,
    SILENCE_S,
    SOURCE_FAILURES_MAX,
    UNVERIFIED_BATCHES_MAX,
    Party,
    Standing,
)

NBYTES = 333
RIGHT, WRONG = b"r" * 16, b"w" * 16
BROKE = TransferFailed("the wire broke")
LATE = TransferFailed("gave up", timed_out=True)
GONE = TransferFailed("the consumer is given up", is_destination_gone=True)


def want(row: int, nbytes: int = NBYTES, checksum: bytes | None = RIGHT) -> Want:
    return Want(row, nbytes, checksum)


def party(name: str, tier: int = 0, lanes: int = 1, blocks: int = 1) -> Party:
    """A source that takes so many blocks of NBYTES a batch."""
    return Party(name, tier, lanes, Limits(nbytes=blocks * NBYTES))


def ledger_of(has: Mapping[str, Iterable[int]], *parties: Party, wants: Iterable[Want] | None = None) -> Ledger:
    rows = sorted({row for held in has.values() for row in held})
    offers = {row: [Offer(name, row << 30) for name, held in has.items() if row in set(held)] for row in rows}
    known = {p.name: p for p in parties} or {name: party(name) for name in has}
    return Ledger([want(row) for row in rows] if wants is None else wants, offers, known)


def rows_of(batches: Iterable[Batch]) -> list[int]:
    return [w.row for batch in batches for w in batch.wants]


# -- a block: every state, every event -------------------------------------------------------------------------


class Block:
    """A block, number 7, in a ledger of two sources that both have it; taken to a stage, and told an event."""

    def __init__(self) -> None:
        self.ledger = ledger_of({"a": [7], "b": [7]}, party("a", 0), party("b", 1))
        self.batch: Batch | None = None
        self.late: Batch | None = None

    def start(self) -> None:
        moves = self.ledger.next(0.0).move
        (self.batch,) = moves or (self.batch,)

    def move(self) -> None:
        self.start()
        self.ledger.moved(self._batch, {}, 0.0)

    def time_out_then_move(self) -> None:
        self.start()
        self.late = self._batch
        self.ledger.failed(self._batch, LATE, 0.0)
        self.move()

    @property
    def _batch(self) -> Batch:
        assert self.batch is not None
        return self.batch

    def to(self, stage: Stage) -> Block:
        ways: dict[Stage, Callable[[], None]] = {
            Stage.WANTED: lambda: None,
            Stage.UNDER_WAY: self.start,
            Stage.UNVERIFIED: self.move,
            Stage.RIGHT: lambda: (self.move(), self.ledger.verified(7, RIGHT))[1],
            Stage.HELD_BACK: lambda: (self.time_out_then_move(), self.ledger.verified(7, RIGHT))[1],
            Stage.PUBLISHED: lambda: (self.move(), self.ledger.verified(7, RIGHT), self.ledger.published(7))[2],
            Stage.FAILED: self.exhaust,
        }
        ways[stage]()
        assert self.stage is stage
        return self

    def exhaust(self) -> None:
        for _ in "ab":
            self.move()
            self.ledger.verified(7, WRONG)
        self.ledger.next(0.0)

    def tell(self, event: str) -> None:
        batch = self.batch or Batch("a", (want(7),), (7,), NBYTES)
        events: dict[str, Callable[[], object]] = {
            "next": lambda: self.ledger.next(0.0),
            "moved": lambda: self.ledger.moved(batch, {}, 0.0),
            "moved with a checksum": lambda: self.ledger.moved(batch, {7: RIGHT}, 0.0),
            "failed": lambda: self.ledger.failed(batch, BROKE, 0.0),
            "failed for good": lambda: (self.ledger.failed(batch, GONE, 0.0), self.ledger.next(0.0)),
            "timed out": lambda: self.ledger.failed(batch, LATE, 0.0),
            "lost alone": lambda: self.ledger.came_in_part(batch, SomeLost({7: "a bad sector"}, {}), 0.0),
            "verified right": lambda: self.ledger.verified(7, RIGHT),
            "verified wrong": lambda: self.ledger.verified(7, WRONG),
            "refused": lambda: self.ledger.refused(7, "the slot is gone"),
            "published": lambda: self.ledger.published(7),
            "ended": lambda: self.ledger.ended(self.late or batch),
            "cancel": lambda: self.ledger.cancel(),
            "offered": lambda: self.ledger.offered({7: [Offer("c", 7)]}, {7: RIGHT}, {"c": party("c", 1)}),
            "offered as other": lambda: self.ledger.offered({7: [Offer("c", 7)]}, {7: WRONG}, {"c": party("c", 1)}),
        }
        events[event]()

    @property
    def stage(self) -> Stage:
        return self.ledger.stage(7)


IMPOSSIBLE = None
STAGES = (
    Stage.WANTED, Stage.UNDER_WAY, Stage.UNVERIFIED, Stage.RIGHT, Stage.HELD_BACK, Stage.PUBLISHED, Stage.FAILED
)  # fmt: skip
W, U, V, R, H, P, F = STAGES
# fmt: off
BLOCK_TABLE: dict[str, tuple[Stage | None, ...]] = {
    #                         WANTED UNDER_WAY UNVERIFIED RIGHT HELD_BACK PUBLISHED FAILED
    "next":                  (U,     U,        V,         R,    H,        P,        F),
    "moved":                 (None,  V,        None,      None, None,     None,     None),
    "moved with a checksum": (None,  R,        None,      None, None,     None,     None),
    "failed":                (None,  W,        None,      None, None,     None,     None),
    "failed for good":       (None,  F,        None,      None, None,     None,     None),
    "timed out":             (None,  W,        None,      None, None,     None,     None),
    "verified right":        (None,  None,     R,         None, None,     None,     None),
    "verified wrong":        (None,  None,     W,         None, None,     None,     None),
    "refused":               (None,  None,     W,         W,    None,     None,     None),
    "published":             (None,  None,     None,      P,    None,     None,     None),
    "ended":                 (None,  None,     None,      None, V,        None,     None),
    "cancel":                (W,     U,        V,         R,    H,        P,        F),
    "offered":               (W,     U,        V,         R,    H,        P,        W),
    "offered as other":      (W,     U,        V,         R,    H,        P,        F),
}
# fmt: on
CASES = [
    pytest.param(stage, event, after, id=f"{stage.name.lower()}-{event.replace(' ', '_')}")
    for event, row in BLOCK_TABLE.items()
    for stage, after in zip(STAGES, row, strict=True)
]


@pytest.mark.parametrize(("stage", "event", "after"), CASES)
def test_block(stage: Stage, event: str, after: Stage | None) -> None:
    block = Block().to(stage)
    if after is IMPOSSIBLE:
        with pytest.raises((RuntimeError, KeyError, ValueError)):
            block.tell(event)
        assert block.stage is stage, "what cannot happen changes nothing"
        return
    block.tell(event)
    assert block.stage is after


def test_the_table_of_steps_has_no_way_out_of_published_and_one_out_of_failed_and_uses_every_event() -> None:
    assert Stage.PUBLISHED not in {stage for stage, _ in STEPS}
    assert [event for stage, event in STEPS if stage is Stage.FAILED] == [Event.OFFERED]
    assert {event for _, event in STEPS} == set(Event)
    assert {stage for stage, _ in STEPS} | set(STEPS.values()) == set(Stage)


# -- a source: every state, every event ------------------------------------------------------------------------


class Source:
    """A source that has 20 blocks which nobody else has, at some standing, with one batch under way."""

    def __init__(self) -> None:
        self.ledger = ledger_of({"a": range(20)}, party("a", lanes=1))
        self.now = 0.0
        self.batch = self._start()

    def _start(self) -> Batch:
        orders = self.ledger.next(self.now)
        if not orders.move and orders.wait_s is not None:
            self.now += orders.wait_s
            orders = self.ledger.next(self.now)
        (batch,) = orders.move
        return batch

    def to(self, before: str) -> Source:
        for _ in range(FAILURES_BEFORE[before]):
            self.ledger.failed(self.batch, BROKE, self.now)
            self.batch = self._start()
        return self

    @property
    def standing(self) -> Standing:
        return self.ledger.standing("a")


def served(s: Source) -> None:
    s.ledger.moved(s.batch, {w.row: RIGHT for w in s.batch.wants}, 0.0)


def fails(s: Source, after_s: float = 0.0, error: Exception = BROKE) -> None:
    s.ledger.failed(s.batch, error, s.now + after_s)


FAILURES_BEFORE = {"good": 0, "good_after_a_failure": SOURCE_FAILURES_MAX - 1, "doubted": SOURCE_FAILURES_MAX}
SOURCE_TABLE: dict[str, tuple[Callable[[Source], None], tuple[Standing, ...]]] = {
    # event, and what the source is then if it was good, good after a failure, doubted
    "served": (served, (Standing.GOOD, Standing.GOOD, Standing.GOOD)),
    "fails": (fails, (Standing.GOOD, Standing.DOUBTED, Standing.DOUBTED)),
    "fails_after_long": (lambda s: fails(s, PATIENCE_S), (Standing.GOOD, Standing.GIVEN_UP, Standing.GIVEN_UP)),
    "times_out": (lambda s: fails(s, PATIENCE_S * 5, LATE), (Standing.GOOD, Standing.GIVEN_UP, Standing.GIVEN_UP)),
}


@pytest.mark.parametrize("event", SOURCE_TABLE)
@pytest.mark.parametrize("before", FAILURES_BEFORE)
def test_source(before: str, event: str) -> None:
    source = Source().to(before)
    assert source.standing is (Standing.DOUBTED if before == "doubted" else Standing.GOOD)
    tell, after = SOURCE_TABLE[event]
    tell(source)
    assert source.standing is dict(zip(FAILURES_BEFORE, after, strict=True))[before]


def test_a_source_that_brings_some_of_a_batch_serves_and_what_it_lacks_is_tried_once_more_and_alone() -> None:
    ledger = ledger_of({"a": range(6)}, party("a", blocks=3))
    for _ in range(2):
        (batch,) = ledger.next(0.0).move
        lost = batch.wants[1].row
        ledger.came_in_part(batch, SomeLost({lost: "a bad sector"}, {batch.wants[0].row: RIGHT}), 0.0)
        assert ledger.standing("a") is Standing.GOOD
        assert [ledger.stage(w.row) for w in batch.wants] == [Stage.RIGHT, Stage.WANTED, Stage.UNVERIFIED]
    for row in (1, 4):
        (batch,) = ledger.next(0.0).move
        assert rows_of([batch]) == [row]
        ledger.came_in_part(batch, SomeLost({row: "a bad sector"}, {}), 0.0)
    ledger.next(DOUBT_PAUSE_S)
    assert ledger.failures == {1: "a: a bad sector", 4: "a: a bad sector"}


def test_failures_that_are_not_in_a_row_are_not_added_up() -> None:
    source = Source()
    for _ in range(5):
        fails(source)
        source.batch = source._start()
        served(source)
        source.batch = source._start()
    assert source.standing is Standing.GOOD


def test_a_doubted_source_is_not_given_up_while_a_batch_of_it_may_still_come() -> None:
    ledger = ledger_of({"a": range(20)}, party("a", lanes=3))
    first, second, third = ledger.next(0.0).move
    ledger.failed(first, BROKE, 9 * PATIENCE_S)
    ledger.failed(second, BROKE, 9 * PATIENCE_S)
    assert ledger.standing("a") is Standing.DOUBTED
    ledger.moved(third, {}, 0.0)
    assert ledger.standing("a") is Standing.GOOD


def test_a_doubted_source_is_asked_for_one_batch_at_a_time_and_after_a_pause() -> None:
    ledger = ledger_of({"a": range(20)}, party("a", lanes=3))
    for batch in ledger.next(0.0).move:
        ledger.failed(batch, BROKE, 1.0)
    orders = ledger.next(1.0)
    assert (orders.move, orders.wait_s) == ((), pytest.approx(DOUBT_PAUSE_S))
    assert ledger.next(1.0 + DOUBT_PAUSE_S / 2).move == ()
    assert len(ledger.next(1.0 + DOUBT_PAUSE_S).move) == 1
    assert ledger.next(1.0 + DOUBT_PAUSE_S).move == ()


def test_what_waits_for_a_doubted_source_goes_to_others_at_once_and_what_only_it_has_stays() -> None:
    ledger = ledger_of({"a": range(10), "b": range(5)}, party("a", 0, lanes=2), party("b", 1, lanes=9))
    for batch in ledger.next(0.0).move:
        ledger.failed(batch, BROKE, 0.0)
    moves = ledger.next(0.0).move
    assert {batch.source for batch in moves} == {"b"}
    assert sorted(rows_of(moves)) == [0, 1, 2, 3, 4]


def test_what_waits_for_a_source_that_is_given_up_fails_with_the_reason() -> None:
    source = Source().to("doubted")
    fails(source, PATIENCE_S)
    source.ledger.next(source.now + PATIENCE_S)
    assert source.ledger.is_over
    assert source.ledger.failures[19] == f"a: given up after {SOURCE_FAILURES_MAX + 1} failures"
    assert source.ledger.failures[0].startswith("a: the wire broke")


# -- a source that is slow: what becomes of what it has under way, and of what waits for it ----------------------


class Race:
    """`slow` and `other` have the same 20 blocks; `other` has served its batch in a second, and is idle."""

    def __init__(self, other_tier: int = 0, blocks: int = 10, has: Iterable[int] = range(20)) -> None:
        parties = party("slow", 0, blocks=blocks), party("other", other_tier, blocks=blocks)
        self.ledger = ledger_of({"slow": range(20), "other": has}, *parties)
        self.slow, *self.rest = sorted(self.ledger.next(0.0).move, key=lambda batch: batch.source != "slow")
        for batch in self.rest:
            self.ledger.moved(batch, {w.row: RIGHT for w in batch.wants}, 1.0)

    def recalled(self, now: float) -> bool:
        return self.ledger.next(now).recall == (self.slow,)

    def ends(self, error: Exception, now: float) -> list[Batch]:
        self.ledger.failed(self.slow, error, now)
        return list(self.ledger.next(now).move)


CUT = TransferFailed("was recalled", lost=frozenset({0}))


def test_what_is_late_is_recalled_once_and_brought_by_who_is_idle() -> None:
    race = Race()
    assert race.ledger.next(1.0).wait_s == LOOK_S
    late_at = GRACE_S + LATE_FACTOR * 1.0
    assert not race.recalled(late_at - LOOK_S)
    assert race.recalled(late_at + LOOK_S)
    assert not race.recalled(late_at + 9), "each once"
    (batch,) = race.ends(CUT, 3.0)
    assert (batch.source, batch.wants) == ("other", race.slow.wants)
    assert race.ledger.standing("slow") is Standing.DOUBTED


def test_what_will_be_there_sooner_than_another_would_bring_it_is_not_recalled() -> None:
    race = Race()
    race.slow.watch.arrived_nbytes = race.slow.nbytes * 2 // 3
    assert not race.recalled(4.0), "two more seconds"
    assert race.recalled(4.0 + LATE_FACTOR), "it has come no farther"


def test_what_was_recalled_and_comes_all_the_same_is_good() -> None:
    race = Race()
    assert race.recalled(9.0)
    race.ledger.moved(race.slow, {w.row: RIGHT for w in race.slow.wants}, 9.1)
    assert race.ledger.next(9.1).move == ()
    assert race.ledger.standing("slow") is Standing.GOOD


def test_of_a_batch_that_was_recalled_only_what_has_not_come_is_brought_again() -> None:
    race = Race()
    assert race.recalled(9.0)
    here, *lost = [w.row for w in race.slow.wants]
    race.ledger.came_in_part(race.slow, SomeLost(dict.fromkeys(lost, "was recalled"), {here: RIGHT}), 9.0)
    (batch,) = race.ledger.next(9.0).move
    assert (batch.source, rows_of([batch])) == ("other", lost)
    assert race.ledger.standing("slow") is Standing.DOUBTED


def test_late_bytes_of_a_batch_that_would_not_end_hold_its_blocks_back() -> None:
    race = Race()
    assert race.recalled(9.0)
    (batch,) = race.ends(LATE, 9.0)
    race.ledger.moved(batch, {w.row: RIGHT for w in batch.wants}, 10.0)
    assert {race.ledger.stage(w.row) for w in batch.wants} == {Stage.HELD_BACK}


def test_a_source_that_is_farther_takes_over_only_from_one_that_is_silent_or_slower_than_any_disk() -> None:
    for arrives_nbytes_per_s, is_late in ((0, True), (PACE_NBYTES_PER_S / 2, True), (PACE_NBYTES_PER_S * 2, False)):
        race = Race(other_tier=1)
        for second in range(1, int(SILENCE_S) + 9):
            race.slow.watch.arrived_nbytes = int(second * arrives_nbytes_per_s)
            if race.recalled(float(second)):
                assert second >= SILENCE_S
                assert is_late
                break
        else:
            assert not is_late


def test_nothing_is_recalled_that_nobody_else_has() -> None:
    race = Race(has=())
    assert not race.recalled(999.0)


def test_a_source_that_was_recalled_is_not_given_up_and_brings_what_only_it_has() -> None:
    ledger = ledger_of({"slow": [1, 2], "other": [1]}, party("slow", blocks=2), party("other", 1, blocks=2))
    (slow,) = ledger.next(0.0).move
    assert ledger.next(SILENCE_S).recall == (slow,)
    ledger.failed(slow, CUT, SILENCE_S)
    later = SILENCE_S + DOUBT_PAUSE_S
    moves = {batch.source: batch for now in (SILENCE_S, later) for batch in ledger.next(now).move}
    assert {source: rows_of([batch]) for source, batch in moves.items()} == {"other": [1], "slow": [2]}
    assert ledger.next(later + 9 * SILENCE_S).recall == ()
    ledger.moved(moves["slow"], {2: RIGHT}, later + 10 * SILENCE_S)
    assert ledger.standing("slow") is Standing.GOOD


def test_what_fails_because_its_neighbour_was_recalled_has_not_been_tried() -> None:
    """Its connections may have been cut with the other's."""
    ledger = ledger_of({"slow": [1, 2], "other": [1]}, party("slow", lanes=2), party("other", 1))
    one, two = ledger.next(0.0).move
    for _ in range(OFFER_TRIES_MAX + 1):
        if recall := ledger.next(SILENCE_S).recall:
            assert recall == (one,)
            ledger.failed(one, CUT, SILENCE_S)
            ledger.failed(two, BROKE, SILENCE_S)
        else:
            (two, *_) = [b for b in ledger.next(SILENCE_S + DOUBT_PAUSE_S).move if b.source == "slow"]
            ledger.moved(two, {2: RIGHT}, SILENCE_S + 1)
            break
    assert ledger.stage(2) is Stage.RIGHT


def test_who_is_idle_takes_half_of_what_waits_for_another_from_its_end() -> None:
    race = Race(blocks=1)
    moved = [race.slow, *race.rest]
    while True:  # the other ends each of its batches at once
        batches = race.ledger.next(1.0).move
        if not batches:
            break
        for batch in batches:
            assert batch.source == "other"
            race.ledger.moved(batch, {w.row: RIGHT for w in batch.wants}, 1.0)
        moved += batches
    assert sorted(rows_of(moved)) == list(range(20)), "all but what is under way"


def test_who_is_idle_takes_nothing_that_waits_for_a_nearer_one() -> None:
    race = Race(other_tier=1, blocks=1)
    assert race.ledger.next(1.0).move == ()


# -- which source ----------------------------------------------------------------------------------------------


def moves_of(ledger: Ledger, now: float = 0.0) -> dict[Any, list[int]]:
    """Everything that is moved if all goes well, by source."""
    found: dict[Any, list[int]] = {}
    while moves := ledger.next(now).move:
        for batch in moves:
            found.setdefault(batch.source, []).extend(w.row for w in batch.wants)
            ledger.moved(batch, {w.row: w.checksum or RIGHT for w in batch.wants}, 0.0)
    return found


def test_the_nearest_tier_serves_alone() -> None:
    ledger = ledger_of({"far": range(9), "near": range(4)}, party("far", 1), party("near", 0))
    assert {name: sorted(rows) for name, rows in moves_of(ledger).items()} == {
        "near": [0, 1, 2, 3],
        "far": [4, 5, 6, 7, 8],
    }


@given(st.lists(st.integers(1, 333), min_size=1, max_size=40), st.integers(1, 5))
def test_replicas_that_all_have_everything_differ_by_one_block_at_most(sizes: list[int], replicas: int) -> None:
    names = [f"node-{i}" for i in range(replicas)]
    wants = [want(row, nbytes) for row, nbytes in enumerate(sizes)]
    parties = [party(name) for name in names]
    moved = moves_of(ledger_of({name: range(len(sizes)) for name in names}, *parties, wants=wants))
    load = [sum(sizes[row] for row in moved.get(name, ())) for name in names]
    assert sum(load) == sum(sizes)
    assert max(load) - min(load) <= max(sizes)


def test_blocks_with_a_choice_make_up_for_those_without() -> None:
    """Half of the blocks are on `a` and `b`, half on `b` alone, and they come last: `a` takes all that it can."""
    moved = moves_of(ledger_of({"a": range(10), "b": range(20)}))
    assert {name: len(rows) for name, rows in moved.items()} == {"a": 10, "b": 10}


def test_a_model_of_deepseeks_size_is_planned_within_the_limits() -> None:
    """14,848 blocks on two replicas each, 44 MB a block: balanced, and no batch above its limit."""
    nbytes = 44_050_944
    wants = [Want(row, nbytes, None) for row in range(14_848)]
    offers = {w.row: [Offer(f"n{w.row % 8}", w.row * nbytes), Offer(f"n{(w.row + 3) % 8}", w.row)] for w in wants}
    parties = {f"n{i}": Party(f"n{i}", 0, 2, Limits()) for i in range(8)}
    ledger, load = Ledger(wants, offers, parties), Counter[Any]()
    while moves := ledger.next(0.0).move:
        for batch in moves:
            assert batch.nbytes <= Limits().nbytes
            load[batch.source] += batch.nbytes
            ledger.moved(batch, {w.row: RIGHT for w in batch.wants}, 0.0)
    assert load.total() == 14_848 * nbytes
    assert max(load.values()) <= 1.05 * min(load.values())


def test_a_block_whose_source_failed_goes_to_its_next_offer_at_once_and_other_lanes_go_on() -> None:
    ledger = ledger_of({"a": range(9), "b": range(9)}, party("a", 0, lanes=2), party("b", 1))
    first, second = ledger.next(0.0).move
    ledger.failed(first, BROKE, 0.0)
    moves = ledger.next(0.0).move
    assert {batch.source: rows_of([batch]) for batch in moves} == {"a": [2], "b": [0]}
    ledger.moved(second, {}, 0.0)
    assert rows_of(ledger.next(0.0).move) == [3]


def test_a_block_that_comes_again_goes_where_least_is_queued_and_under_way() -> None:
    has = {"a": [0], "b": [0, 1], "c": [0, 1, 2, 3]}
    ledger = ledger_of(has, party("a", 0), party("b", 1), party("c", 1, lanes=3))
    (first, *_) = ledger.next(0.0).move
    ledger.failed(first, BROKE, 0.0)
    assert [batch.source for batch in ledger.next(0.0).move] == []  # b moves one block, c two: 0 waits for b
    assert ledger._blocks[0].source == "b"


def test_a_block_comes_again_alone_from_the_only_source_that_has_it() -> None:
    ledger = ledger_of({"a": range(4)}, party("a", blocks=4))
    (batch,) = ledger.next(0.0).move
    ledger.failed(batch, BROKE, 0.0)
    (again,) = ledger.next(0.0).move
    assert rows_of([again]) == [0]


def test_a_source_that_timed_out_or_gave_wrong_bytes_is_not_asked_for_the_block_again() -> None:
    ledger = ledger_of({"a": [0], "b": [1]})
    a, b = ledger.next(0.0).move
    ledger.failed(a, LATE, 0.0)
    ledger.moved(b, {1: WRONG}, 0.0)
    assert ledger.next(0.0).move == ()
    assert ledger.failures == {0: "a: gave up", 1: f"b: checksum {WRONG.hex()} instead of {RIGHT.hex()}"}


def test_the_first_few_reasons_of_a_block_are_remembered_each_once() -> None:
    names = "abcdefg"
    ledger = ledger_of({name: [0] for name in names}, *(party(name, tier) for tier, name in enumerate(names)))
    for _ in names:
        (batch,) = ledger.next(0.0).move
        ledger.failed(batch, LATE, 0.0)
    ledger.next(0.0)
    assert ledger.failures == {0: "; ".join(f"{name}: gave up" for name in names[:REASONS_MAX])}


def test_a_block_that_nobody_offers_fails_with_a_reason() -> None:
    ledger = ledger_of({"a": [0]}, wants=[want(0), want(1)])
    ledger.next(0.0)
    assert ledger.failures == {1: NOBODY}


# -- how much at a time ----------------------------------------------------------------------------------------


def test_lanes_are_kept_over_all_sources_too_and_shared_evenly() -> None:
    names = [f"n{i}" for i in range(8)]
    has = {name: range(100 * i, 100 * i + 99) for i, name in enumerate(names)}
    moves = ledger_of(has, *(party(name, lanes=6) for name in names)).next(0.0).move
    assert len(moves) == LANES_MAX
    assert set(Counter(batch.source for batch in moves).values()) == {LANES_MAX // 8}


def test_a_source_waits_for_its_checksums() -> None:
    ledger = ledger_of({"a": range(20)}, party("a", lanes=2))
    started = 0
    while moves := ledger.next(0.0).move:
        for batch in moves:
            ledger.moved(batch, {}, 0.0)
            started += 1
    assert UNVERIFIED_BATCHES_MAX * 2 < started <= (UNVERIFIED_BATCHES_MAX + 1) * 2
    ledger.verified(0, RIGHT)
    ledger.verified(1, WRONG)
    assert len(ledger.next(0.0).move) == 2


def test_orders_are_given_once() -> None:
    ledger = ledger_of({"a": range(2)}, party("a", lanes=2))
    first, second = ledger.next(0.0).move
    ledger.moved(first, {}, 0.0)
    ledger.moved(second, {1: RIGHT}, 0.0)
    orders = ledger.next(0.0)
    assert ([b.want.row for b in orders.verify], [b.want.row for b in orders.publish]) == ([0], [1])
    assert ledger.next(0.0) == Orders((), (), (), None, ())


def sizes_of_all(ledger: Ledger) -> list[int]:
    """Bytes of every batch, in the order that they are begun in; each is moved as soon as it is ordered."""
    sizes: list[int] = []
    while batches := ledger.next(0.0).move:
        for batch in batches:
            sizes.append(batch.nbytes)
            ledger.moved(batch, dict.fromkeys((w.row for w in batch.wants), RIGHT), 0.0)
    return sizes


def whole_mib(blocks: int, lanes: int, most: int) -> Ledger:
    """One source of blocks of 1 MiB, with batches of at most so many."""
    wants = [want(row, 1 << 20) for row in range(blocks)]
    return ledger_of({"a": range(blocks)}, Party("a", 0, lanes, Limits(nbytes=most << 20)), wants=wants)


def test_the_lanes_of_a_source_begin_out_of_step() -> None:
    first = whole_mib(900, lanes=3, most=30).next(0.0).move
    assert [batch.nbytes >> 20 for batch in first] == [10, 20, 30]


def test_the_lanes_of_a_source_end_together() -> None:
    sizes = [nbytes >> 20 for nbytes in sizes_of_all(whole_mib(300, lanes=3, most=30))]
    assert sum(sizes) == 300
    for number, size in enumerate(sizes[3:], 3):  # past the first of each lane
        left = sum(sizes[number:])
        assert size == min(left, 30, max(LAST_BATCHES_NBYTES_MIN >> 20, left // 3)), sizes


# -- what was given up on, and late bytes ----------------------------------------------------------------------


def test_a_block_that_an_outstanding_transfer_may_touch_is_held_back_until_all_such_have_ended() -> None:
    ledger = ledger_of({"a": [7], "b": [7], "c": [7]}, *(party(n, i) for i, n in enumerate("abc")))
    for _ in "ab":
        (batch,) = ledger.next(0.0).move
        ledger.failed(batch, LATE, 0.0)
    (batch,) = ledger.next(0.0).move
    ledger.moved(batch, {7: RIGHT}, 0.0)
    assert ledger.next(0.0).publish == ()
    first, second = ledger.outstanding
    assert rows_of([first]) == [7]
    assert ledger.waits_for == (first, second)
    assert not ledger.is_over
    ledger.ended(first)
    assert ledger.next(0.0).verify == ()
    ledger.ended(second)
    (look,) = ledger.next(0.0).verify
    assert look.source == "c"
    ledger.verified(7, RIGHT)
    assert [b.want.row for b in ledger.next(0.0).publish] == [7]


def test_the_last_look_wants_the_bytes_that_were_verified_also_where_no_checksum_was_given() -> None:
    ledger = ledger_of({"a": [7], "b": [7]}, party("a", 0), party("b", 1), wants=[want(7, checksum=None)])
    (batch,) = ledger.next(0.0).move
    ledger.failed(batch, LATE, 0.0)
    (batch,) = ledger.next(0.0).move
    ledger.moved(batch, {7: RIGHT}, 0.0)
    ledger.ended(ledger.outstanding[0])
    ledger.next(0.0)
    ledger.verified(7, WRONG)
    assert ledger.stage(7) is Stage.WANTED
    assert rows_of(ledger.next(0.0).move) == [7], "from the source whose bytes were right, once more"


def test_a_block_that_failed_leaves_its_outstanding_transfers_to_be_seen() -> None:
    ledger = ledger_of({"a": [7]})
    (batch,) = ledger.next(0.0).move
    ledger.failed(batch, LATE, 0.0)
    ledger.next(0.0)
    assert ledger.is_over
    assert ledger.waits_for == ()
    assert ledger.outstanding == (batch,)


# -- a destination that is gone --------------------------------------------------------------------------------


def test_a_destination_that_is_gone_fails_what_is_wanted_and_lets_what_is_under_way_end() -> None:
    ledger = ledger_of({"a": range(5), "b": range(5)})
    a, b = ledger.next(0.0).move
    ledger.failed(a, GONE, 0.0)
    assert ledger.next(0.0) == Orders((), (), (), None, ())
    assert not ledger.is_over
    ledger.moved(b, dict.fromkeys(rows_of([b]), RIGHT), 0.0)
    assert [block.want.row for block in ledger.next(0.0).publish] == rows_of([b])
    ledger.published(rows_of([b])[0])
    assert ledger.is_over
    assert sorted(ledger.failures) == sorted(set(range(5)) - set(rows_of([b])))
    assert all("given up" in reason for reason in ledger.failures.values())


# -- cancelling ------------------------------------------------------------------------------------------------


def test_cancelling_recalls_what_is_under_way_once_and_keeps_what_comes_all_the_same() -> None:
    race = Race(blocks=4)
    others = race.ledger.next(1.0).move
    assert set(race.ledger.cancel()) == {race.slow, *others}
    assert race.ledger.cancel() == ()
    race.ledger.moved(race.slow, {want.row: RIGHT for want in race.slow.wants}, 2.0)
    orders = race.ledger.next(2.0)
    assert [block.want for block in orders.publish] == list(race.slow.wants)
    assert (orders.move, orders.recall) == ((), ())


def test_cancelling_starts_nothing_more_and_lets_what_is_under_way_end() -> None:
    ledger = ledger_of({"a": range(3), "b": range(3)})
    a, b = ledger.next(0.0).move
    ledger.cancel()
    ledger.failed(a, BROKE, 0.0)
    assert ledger.next(0.0) == Orders((), (), (), None, ())
    assert not ledger.is_over
    ledger.moved(b, {}, 0.0)
    (arrived,) = ledger.next(0.0).verify
    ledger.verified(arrived.want.row, RIGHT)
    assert len(ledger.next(0.0).publish) == 1
    ledger.published(arrived.want.row)
    assert ledger.is_over
    assert not ledger.is_complete
    assert ledger.failures == {}


def test_an_empty_ledger_is_over_at_once() -> None:
    ledger = ledger_of({})
    assert ledger.next(0.0) == Orders((), (), (), None, ())
    assert ledger.is_over
    assert ledger.is_complete


# -- whatever happens ------------------------------------------------------------------------------------------


@dataclass
class World:
    """What sources do, drawn as it goes; and the byte-true state of each destination, which the ledger cannot see."""

    draw: Callable[[list[str]], str]
    ledger: Ledger
    has: Mapping[str, set[int]]
    lanes: Mapping[str, int]
    now: float = 0.0
    under_way: list[Batch] = field(default_factory=list)
    late: list[Batch] = field(default_factory=list)
    good: dict[int, bool] = field(default_factory=dict)
    verified: set[int] = field(default_factory=set)
    published: set[int] = field(default_factory=set)
    asked: set[tuple[str, int]] = field(default_factory=set)
    wrong_or_late: set[tuple[str, int]] = field(default_factory=set)

    def take(self, orders: Orders) -> None:
        for batch in orders.move:
            self.under_way.append(batch)
            for w in batch.wants:
                assert w.row in self.has[str(batch.source)]
                assert w.row not in self.published
                self.asked.add((str(batch.source), w.row))
                self.verified.discard(w.row)
        running = Counter(str(batch.source) for batch in self.under_way)
        assert all(running[name] <= self.lanes[name] for name in running)
        assert running.total() <= LANES_MAX
        for block in orders.verify:
            self.verify(block.want.row)
        for block in orders.publish:
            self.publish(block.want.row)

    def verify(self, row: int) -> None:
        if self.draw(["looked at", "looked at", "looked at", "cannot be looked at"]) == "looked at":
            if self.good[row]:
                self.verified.add(row)
            self.ledger.verified(row, RIGHT if self.good[row] else WRONG)
        else:
            self.ledger.refused(row, "cannot be looked at")

    def publish(self, row: int) -> None:
        assert self.good[row], "wrong bytes were published"
        assert row in self.verified
        assert all(row not in rows_of([batch]) for batch in self.late), "late bytes may land in a published block"
        if self.draw(["published", "published", "published", "cannot be published"]) == "published":
            self.published.add(row)
            self.ledger.published(row)
        else:
            self.ledger.refused(row, "cannot be published")

    def step(self) -> None:
        """One thing happens."""
        if self.under_way:
            batch = self.under_way.pop(self.draw_index(len(self.under_way)))
            self.now += float(self.draw(["0", "0.01", "3"]))
            what = self.draw(["moved", "moved", "moved", "moved with checksums", "failed", "timed out"])
            is_good = self.draw(["good", "good", "good", "bad"]) == "good"
            for row in rows_of([batch]):
                self.good[row] = is_good and what.startswith("moved")
            if what == "failed":
                self.ledger.failed(batch, BROKE, self.now)
            elif what == "timed out":
                self.late.append(batch)
                self.ledger.failed(batch, LATE, self.now)
            else:
                taken = dict.fromkeys(rows_of([batch]), RIGHT if is_good else WRONG)
                with_them = what == "moved with checksums"
                self.verified |= {row for row in taken if with_them and is_good}
                self.ledger.moved(batch, taken if with_them else {}, 0.0)
        for batch in self.ledger.waits_for:
            if self.draw(["right", "wrong"]) == "wrong":
                self.good |= {row: False for row in rows_of([batch]) if row not in self.published}
            self.late.remove(batch)
            self.ledger.ended(batch)

    def draw_index(self, count: int) -> int:
        return int(self.draw([str(number) for number in range(count)]))

    def run(self, cancel_after: int) -> None:
        for number in itertools.count():
            if number == cancel_after:
                self.ledger.cancel()
            assert number < 5000, "it never ends"
            orders = self.ledger.next(self.now)
            self.take(orders)
            if self.ledger.is_over and not (orders.verify or orders.publish):
                return
            if not self.under_way and orders.wait_s is not None:
                self.now += orders.wait_s
            self.step()


@st.composite
def worlds(draw: st.DrawFn) -> World:
    names = ["a", "b", "c", "d"][: draw(st.integers(1, 4))]
    rows = range(draw(st.integers(0, 12)))
    has = {name: set(draw(st.lists(st.sampled_from(rows), unique=True))) if rows else set[int]() for name in names}
    parties = [party(name, draw(st.integers(0, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 4))) for name in names]
    offers = {row: [Offer(name, row << 30) for name in names if row in has[name]] for row in rows}
    ledger = Ledger([want(row) for row in rows], offers, {p.name: p for p in parties})
    return World(lambda choices: draw(st.sampled_from(choices)), ledger, has, {p.name: p.lanes for p in parties})


@settings(max_examples=300)
@given(worlds())
def test_every_block_ends_published_or_failed_with_reasons_and_only_right_ones_are_published(world: World) -> None:
    world.run(cancel_after=-1)
    failures = world.ledger.failures
    offered = set[int]().union(*world.has.values())
    for row in world.ledger._blocks:
        assert world.ledger.stage(row) in (Stage.PUBLISHED, Stage.FAILED)
        assert (world.ledger.stage(row) is Stage.PUBLISHED) == (row in world.published)
        assert (row in failures) == (row not in world.published)
        if row in failures:
            assert failures[row]
            assert (failures[row] == NOBODY) == (row not in offered)


@settings(max_examples=300)
@given(worlds())
def test_no_block_fails_while_a_source_that_has_it_and_is_not_given_up_was_not_asked(world: World) -> None:
    world.run(cancel_after=-1)
    for row in world.ledger.failures:
        for name, rows in world.has.items():
            if row in rows and world.ledger.standing(name) is not Standing.GIVEN_UP:
                assert (name, row) in world.asked


@given(worlds(), st.integers(0, 20))
def test_a_cancelled_restore_ends_and_publishes_only_right_blocks(world: World, cancel_after: int) -> None:
    world.run(cancel_after)
    assert world.ledger.is_over
    assert not world.under_way


def test_every_block_is_asked_of_each_source_a_bounded_number_of_times() -> None:
    ledger, now, asked = ledger_of({"a": range(3), "b": range(3)}), 0.0, Counter[tuple[Any, int]]()
    while not ledger.is_over:
        orders = ledger.next(now)
        for batch in orders.move:
            asked.update((batch.source, row) for row in rows_of([batch]))
            ledger.failed(batch, BROKE, now)
        now += orders.wait_s or 0.0
    assert set(asked.values()) == {OFFER_TRIES_MAX}

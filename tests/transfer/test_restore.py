"""The executor over real memory. Sources that lie, break or stall are of the test's own: loopback cannot make those."""

from __future__ import annotations

import itertools
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from shm.block import ExpertKey, HeldBlock
from shm.errors import HotspareError
from tests.processes import DEADLINE_S, wait_until
from transfer.checkpoint import read_checkpoint
from transfer.checkpoint.content import pin
from transfer.destination import Destination, Landing, Resident
from transfer.errors import TransferFailed
from transfer.ledger import OFFER_TRIES_MAX
from transfer.memory import view
from transfer.plan import Batch, Limits, Offer, Piece, Want
from transfer.progress import Progress, Report, RestoreState
from transfer.restore import Found, Restore
from transfer.sources import Disk, HostMemory, Source, SourceKind, on_disk
from transfer.standing import SOURCE_FAILURES_MAX

NBYTES = 3333
SPARE = 77  # between blocks, so that nothing joins
Places = Mapping[int, int]
"""Row → where its bytes belong."""
Trick = Callable[[Places], None]


class Memory:
    """Blocks of a source or a destination, one behind the other."""

    def __init__(self, blocks: int, seed: int | None = None) -> None:
        self.array = np.zeros(blocks * (NBYTES + SPARE), np.uint8)
        if seed is not None:
            self.array[:] = np.random.default_rng(seed).integers(0, 256, self.array.size, np.uint8)

    def address(self, row: int) -> int:
        return int(self.array.ctypes.data) + row * (NBYTES + SPARE)

    def block(self, row: int) -> memoryview:
        return view(self.address(row), NBYTES)


class Slots:
    """A destination that remembers what was hidden and published, and checks that no block is published wrong."""

    def __init__(self, blocks: int, truth: Memory) -> None:
        self.memory = Memory(blocks)
        self.truth = truth
        self.published: set[int] = set()
        self.begun: Counter[int] = Counter()
        self.wrong: list[int] = []
        self.looks: Counter[int] = Counter()
        self.before_look: Callable[[int], None] = lambda row: None

    def begin(self, row: int) -> None:
        self.begun[row] += 1
        self.published.discard(row)

    def take(self, blocks: Sequence[Resident]) -> Mapping[int, bytes]:
        assert all(block.address == self.memory.address(block.want.row) for block in blocks), "only what is in place"
        return {}

    def landings(self, wants: Sequence[Want], *, in_one_run: bool) -> Iterator[AbstractContextManager[Landing]]:
        for want in wants:
            self.begin(want.row)
        pieces = {want.row: (Piece(self.memory.address(want.row), 0, NBYTES),) for want in wants}
        yield nullcontext(Landing(pieces, lambda taken, lost: taken))

    def checksum(self, want: Want) -> bytes:
        self.looks[want.row] += 1
        self.before_look(want.row)
        found = xxhash.xxh3_128_digest(self.memory.block(want.row))
        if found != want.checksum:
            self.begin(want.row)
        return found

    def held(self, rows: Iterable[int]) -> dict[int, HeldBlock]:
        """As memory of this host: what is published."""
        here = self.published.intersection(rows)
        return {row: HeldBlock(self.memory.address(row), b"") for row in here}

    def publish(self, want: Want, checksum: bytes) -> None:
        if self.memory.block(want.row) != self.truth.block(want.row):
            self.wrong.append(want.row)
        self.published.add(want.row)


class Odd:
    """Copies memory, and calls `trick` with each batch first or after, and the places that it got."""

    def __init__(
        self,
        name: str,
        *,
        before: Trick | None = None,
        after: Trick | None = None,
        kind: SourceKind = SourceKind.PEER,
        lanes: int = 1,
        waits_for_recall: bool = False,
    ) -> None:
        self.name = name
        self._waits_for_recall = waits_for_recall
        self.was_recalled = False
        self.kind = kind
        self.lanes = lanes
        self.limits = Limits(nbytes=2 * NBYTES)
        self._before, self._after = before, after
        self.fetched: list[int] = []
        self.closed = 0

    def fetch(self, batch: Batch, destination: Destination) -> Mapping[int, bytes]:
        self.fetched.extend(want.row for want in batch.wants)
        if self._waits_for_recall:
            wait_until(lambda: batch.watch.is_recalled, "the recall")
            self.was_recalled = True
            raise TransferFailed("was recalled")
        address = {want.row: at for want, at in zip(batch.wants, batch.addresses, strict=True)}
        for landing in destination.landings(batch.wants, in_one_run=False):
            with landing as landed:
                places = {row: piece.destination for row, (piece,) in landed.pieces.items()}
                if self._before:
                    self._before(places)
                for row, to in places.items():
                    view(to, NBYTES)[:] = view(address[row], NBYTES)
                if self._after:
                    self._after(places)
                return landed.settle({}, ())
        return {}

    def close(self) -> None:
        self.closed += 1


class Case:
    """Blocks that sources with the right bytes can bring."""

    def __init__(self, blocks: int = 13) -> None:
        self.rows = range(blocks)
        self.truth = Memory(blocks, seed=33)
        self.slots = Slots(blocks, self.truth)
        self.wants = [Want(row, NBYTES, xxhash.xxh3_128_digest(self.truth.block(row))) for row in self.rows]

    def restore(self, *tiers: list[Any], only: Mapping[str, set[int]] | None = None, **options: Any) -> Restore:
        """Every source offers every row, or those of `only`."""
        offers: dict[int, list[Offer]] = {row: [] for row in self.rows}
        for source in (s for tier in tiers for s in tier):
            has = (only or {}).get(source.name, set(self.rows))
            for row in sorted(has):
                offers[row].append(Offer(source, self.truth.address(row)))
        key_of = options.pop("key_of", lambda row: ExpertKey(3, row))
        return Restore(
            options.pop("wants", self.wants),
            offers,
            tiers,
            self.slots,
            key_of,
            options.pop("progress", None),
            **options,
        )

    def check(self, report: Report, done: set[int] | None = None) -> None:
        """What is published is right, and the numbers say so."""
        done = set(self.rows) if done is None else done
        assert self.slots.published == done
        assert self.slots.wrong == []
        assert (report.blocks_done, report.bytes_done) == (len(done), len(done) * NBYTES)
        assert sum(report.bytes_by_source.values()) == report.bytes_done
        assert {f.key.expert for f in report.failed} == (
            set(self.rows) - done if report.state is RestoreState.FAILED else set()
        )


def fail(message: str = "the wire broke", **options: Any) -> Trick:
    def trick(places: Places) -> None:
        raise TransferFailed(message, **options)

    return trick


def spoil(places: Places) -> None:
    for place in places.values():
        view(place, NBYTES)[NBYTES - 1] ^= 1


@pytest.fixture
def case() -> Case:
    return Case()


# -- the good days ---------------------------------------------------------------------------------------------


def test_every_block_comes_verified_and_published(case: Case) -> None:
    a, b = Odd("a"), Odd("b")
    report = case.restore([a, b]).run()
    assert report.ok
    case.check(report)
    assert report.bytes_by_source == {"local": 0, "peer": 13 * NBYTES, "disk": 0}
    assert sorted(a.fetched + b.fetched) == list(case.rows)
    assert a.fetched, "both have their share; how large, is the ledger's matter and the clock's"
    assert b.fetched
    assert set(case.slots.begun.values()) == {1}, "each was hidden before its bytes changed"
    assert (a.closed, b.closed) == (1, 1)


def test_the_nearest_source_serves_alone_if_it_can(case: Case) -> None:
    near, far = Odd("near", kind=SourceKind.PEER), Odd("far", kind=SourceKind.DISK)
    report = case.restore([near], [far], only={"near": {0, 1, 2, 3, 4}}).run()
    case.check(report)
    assert sorted(near.fetched) == [0, 1, 2, 3, 4]
    assert sorted(far.fetched) == list(range(5, 13))
    assert report.bytes_by_source == {"local": 0, "peer": 5 * NBYTES, "disk": 8 * NBYTES}


def test_an_empty_restore_succeeds_at_once(case: Case) -> None:
    report = case.restore([Odd("a")], wants=[]).run()
    assert (report.state, report.blocks_total, report.error) == (RestoreState.SUCCEEDED, 0, None)


def test_blocks_in_place_are_verified_not_moved_and_bad_ones_mended(case: Case) -> None:
    for row in case.rows:
        case.slots.memory.block(row)[:] = case.truth.block(row)
        case.slots.published.add(row)
    case.slots.memory.block(7)[100] ^= 1
    case.slots.memory.block(11)[NBYTES - 1] ^= 1
    peer = Odd("peer")
    report = case.restore([HostMemory("in place", case.slots)], [peer]).run()
    case.check(report)
    assert sorted(peer.fetched) == [7, 11]
    assert report.bytes_by_source == {"local": 11 * NBYTES, "peer": 2 * NBYTES, "disk": 0}
    assert case.slots.begun == {7: 2, 11: 2}, "hidden when found bad, and when written; the others never"


def test_a_bad_block_that_nobody_can_mend_is_hidden(case: Case) -> None:
    for row in case.rows:
        case.slots.memory.block(row)[:] = case.truth.block(row)
        case.slots.published.add(row)
    case.slots.memory.block(7)[100] ^= 1
    report = case.restore([HostMemory("in place", case.slots)]).run()
    case.check(report, done=set(case.rows) - {7})
    assert "checksum" in report.failed[0].reason


def test_blocks_of_a_real_checkpoint_take_the_disks_word_and_leave_no_descriptor(moe_checkpoint: Path) -> None:
    checkpoint = read_checkpoint(moe_checkpoint, "moe")
    nbytes = int(checkpoint.manifest.nbytes[0])
    rows = range(len(checkpoint.manifest))
    arena = np.zeros(len(rows) * nbytes, np.uint8)
    published: dict[int, bytes] = {}

    class Arena:
        def landings(self, wants: Sequence[Want], *, in_one_run: bool) -> Iterator[AbstractContextManager[Landing]]:
            assert in_one_run
            pieces = {want.row: (Piece(arena.ctypes.data + want.row * nbytes, 0, nbytes),) for want in wants}
            yield nullcontext(Landing(pieces, lambda taken, lost: taken))

        def publish(self, want: Want, checksum: bytes) -> None:
            published[want.row] = checksum

    disk = Disk("disk", partial(pin, checkpoint))
    wants = [Want(row, nbytes, None) for row in rows]
    offers = {row: [Offer(disk, at)] for row, (at, _) in on_disk(checkpoint.manifest, rows).items()}
    arena_as_destination: Any = Arena()  # without `checksum`: the disk took it on the way
    keys = checkpoint.manifest.keys
    report = Restore(wants, offers, [[disk]], arena_as_destination, keys.__getitem__).run()
    assert report.bytes_by_source == {"local": 0, "peer": 0, "disk": arena.nbytes}
    for row in rows:
        assert published[row] == xxhash.xxh3_128_digest(arena[row * nbytes : (row + 1) * nbytes])
    assert descriptors(moe_checkpoint) == 0


def descriptors(directory: Path) -> int:
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return sum(os.path.realpath(link).startswith(f"{directory}/") for link in links)


# -- sources that fail -----------------------------------------------------------------------------------------


def test_another_replica_serves_what_one_fails_to(case: Case) -> None:
    bad, good, disk = Odd("bad", before=fail()), Odd("good"), Odd("disk", kind=SourceKind.DISK)
    report = case.restore([bad, good], [disk]).run()
    assert report.ok
    case.check(report)
    assert sorted(good.fetched) == list(case.rows)
    assert disk.fetched == []


def test_the_next_tier_serves_what_no_replica_can(case: Case) -> None:
    disk = Odd("disk", kind=SourceKind.DISK)
    report = case.restore([Odd("b1", before=fail()), Odd("b2", before=fail())], [disk]).run()
    case.check(report)
    assert report.bytes_by_source == {"local": 0, "peer": 0, "disk": 13 * NBYTES}


def test_a_source_that_keeps_failing_is_left_aside_while_others_can_serve(case: Case) -> None:
    bad, good = Odd("bad", before=fail()), Odd("good")
    report = case.restore([bad], [good]).run()
    case.check(report)
    batches_of_two = 2 * SOURCE_FAILURES_MAX
    assert len(bad.fetched) == batches_of_two


def test_a_source_that_failed_for_passing_reasons_still_brings_what_only_it_has(case: Case) -> None:
    passing = iter([fail(), fail(), fail()])

    def trick(places: Places) -> None:
        next(passing, lambda places: None)(places)

    source = Odd("a", before=trick)
    report = case.restore([source]).run()
    assert report.ok
    case.check(report)
    assert len(source.fetched) == len(case.rows) + 2 * SOURCE_FAILURES_MAX + 2, "three batches of two came twice"


def test_one_block_that_a_source_cannot_give_costs_no_other(case: Case) -> None:
    def trick(places: Places) -> None:
        if 7 in places:
            raise TransferFailed("a bad sector")

    disk = Odd("disk", before=trick, kind=SourceKind.DISK)
    report = case.restore([disk]).run()
    case.check(report, done=set(case.rows) - {7})
    assert report.failed[0].reason == "disk: a bad sector"
    assert disk.fetched.count(7) == OFFER_TRIES_MAX


@pytest.mark.parametrize("error", [OSError(5, "I/O"), MemoryError("no"), KeyError("x"), HotspareError("ours")])
def test_whatever_a_source_raises_others_serve_and_nothing_hangs(case: Case, error: Exception) -> None:
    def trick(places: Places) -> None:
        raise error

    report = case.restore([Odd("bad", before=trick)], [Odd("good")]).run()
    assert report.ok
    case.check(report)


def test_where_nobody_can_help_the_report_says_what_each_source_said(case: Case) -> None:
    good_for = {"only-some": {2, 3, 5}}
    restore = case.restore([Odd("broken", before=fail("it is on fire"))], [Odd("only-some")], only=good_for)
    report = restore.run()
    assert report.state is RestoreState.FAILED
    case.check(report, done={2, 3, 5})
    assert report.error is not None
    assert report.error.startswith("10 blocks could not be had")
    assert {f.reason for f in report.failed} == {"broken: it is on fire"}


def test_a_block_that_nobody_offers_is_reported_with_a_reason(case: Case) -> None:
    report = case.restore([Odd("a")], only={"a": set(range(12))}).run()
    case.check(report, done=set(range(12)))
    assert report.failed[0].reason == "no source that was allowed and could be reached has it"


def test_what_a_silent_source_was_asked_for_is_recalled_and_brought_by_another(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be silent for ever: only the recall ends it."""
    monkeypatch.setattr("transfer.standing.GRACE_S", 0.03)
    silent = Odd("silent", waits_for_recall=True)
    report = case.restore([silent, Odd("good")]).run()
    assert report.ok
    case.check(report)
    assert silent.was_recalled
    assert len(silent.fetched) == 2, "one batch, and never again"


def found(case: Case, source: Any, rows: Iterable[int]) -> Found:
    """What that source has turned up with."""
    rows = list(rows)
    offers = {row: [Offer(source, case.truth.address(row))] for row in rows}
    return Found([source], offers, {row: xxhash.xxh3_128_digest(case.truth.block(row)) for row in rows})


def test_before_blocks_are_given_up_it_is_looked_once_more_who_has_them(case: Case) -> None:
    """A peer that came back while the others were asked was asked for nothing: its blocks had failed by then."""
    broken, late, asked = Odd("broken", before=fail()), Odd("late"), list[tuple[int, ...]]()

    def look_again(rows: Sequence[int]) -> Found:
        asked.append(tuple(rows))
        return found(case, late, rows)

    report = case.restore([Odd("good"), broken], only={"good": set(range(5))}, look_again=look_again).run()
    assert report.ok
    case.check(report)
    assert asked == [tuple(range(5, 13))], "once, and for nothing that others had"
    assert sorted(late.fetched) == list(range(5, 13))
    assert late.closed == 1


def test_who_turns_up_late_and_is_broken_or_of_other_content_or_nobody_at_all_ends_it(case: Case) -> None:
    broken, looks = Odd("broken", before=fail("late and broken")), list[int]()
    other = {row: bytes(16) for row in case.rows}
    for turned_up in (
        lambda rows: found(case, broken, rows),
        lambda rows: found(case, broken, rows)._replace(expected=other),
        lambda rows: Found([], {}, {}),
    ):
        report = case.restore([], look_again=lambda rows, t=turned_up: looks.append(len(rows)) or t(rows)).run()
        case.check(report, done=set())
    assert looks == [13, 13, 13], "once each"


def test_a_cancelled_restore_does_not_look_again(case: Case) -> None:
    restore = case.restore([], look_again=lambda rows: pytest.fail("it looked"))
    restore.cancel()
    assert restore.run().state is RestoreState.CANCELLED


# -- sources that lie ------------------------------------------------------------------------------------------


def test_wrong_bytes_are_never_published(case: Case) -> None:
    liar, honest = Odd("liar", after=spoil), Odd("honest")
    report = case.restore([liar], [honest]).run()
    assert report.ok
    case.check(report)
    assert sorted(honest.fetched) == list(case.rows)


def test_wrong_bytes_from_everyone_leave_the_block_hidden(case: Case) -> None:
    report = case.restore([Odd("x", after=spoil), Odd("y", after=spoil)]).run()
    assert report.state is RestoreState.FAILED
    case.check(report, done=set())
    assert all("x: checksum" in f.reason and "y: checksum" in f.reason for f in report.failed)


def test_late_bytes_after_a_timeout_are_seen_and_the_block_is_brought_again(case: Case) -> None:
    """A peer times out; the next source serves; then the peer's late bytes land, and they are wrong."""
    late: list[Callable[[], None]] = []

    def time_out(places: Places) -> None:
        late.append(lambda: spoil(places))
        raise TransferFailed("gave up", timed_out=True)

    def land(row: int) -> None:
        while case.slots.looks[row] > 1 and late:  # all have been verified, and are looked at once more
            late.pop()()

    third = Odd("third", kind=SourceKind.DISK)
    case.slots.before_look = land
    restore = case.restore([Odd("stalled", before=time_out)], [Odd("second")], [third])
    report = restore.run()
    assert report.ok
    case.check(report)
    assert sorted(want.row for batch in restore.outstanding for want in batch.wants) == [0, 1, 2, 3]
    assert len(third.fetched) == 2 * SOURCE_FAILURES_MAX, "those that the stalled peer could still reach"
    assert report.bytes_by_source["disk"] == len(third.fetched) * NBYTES


def test_late_bytes_that_nobody_can_mend_are_reported(case: Case) -> None:
    def time_out(places: Places) -> None:
        raise TransferFailed("gave up", timed_out=True)

    def land(row: int) -> None:
        if case.slots.looks[row] > 1:
            case.slots.memory.block(row)[0] ^= case.slots.looks[row]

    case.slots.before_look = land
    report = case.restore([Odd("stalled", before=time_out)], [Odd("second")]).run()
    assert report.state is RestoreState.FAILED
    case.check(report, done=case.slots.published)
    assert len(report.failed) == 2 * SOURCE_FAILURES_MAX
    assert "late bytes" in report.failed[0].reason


def test_blocks_that_late_bytes_may_reach_are_published_after_a_last_look_also_when_cancelled(case: Case) -> None:
    def time_out(places: Places) -> None:
        raise TransferFailed("gave up", timed_out=True)

    second = Odd("second", after=lambda places: restore.cancel())
    restore = case.restore([Odd("stalled", before=time_out)], [second])
    report = restore.run()
    assert report.state is RestoreState.CANCELLED
    case.check(report, done=set(second.fetched))
    assert any(case.slots.looks[row] > 1 for row in second.fetched)


# -- destinations that fail ------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["landings", "checksum", "publish"])
def test_a_destination_that_fails_for_a_block_costs_only_that_block(
    case: Case, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = getattr(case.slots, verb)

    def broken(wanted: Want | Sequence[Want], *rest: Any, **options: Any) -> Any:
        wants = [wanted] if isinstance(wanted, Want) else wanted
        if any(want.row == 7 for want in wants):
            raise ValueError("this slot is gone")
        return done(wanted, *rest, **options)

    monkeypatch.setattr(case.slots, verb, broken)
    source = Odd("a")
    source.limits = Limits(nbytes=NBYTES)
    report = case.restore([source], [Odd("b")]).run()
    assert report.state is RestoreState.FAILED
    case.check(report, done=set(case.rows) - {7})
    assert "this slot is gone" in report.failed[0].reason


def test_a_block_that_cannot_be_published_keeps_none_back_that_came_with_it(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Vouching(Odd):
        def fetch(self, batch: Batch, destination: Destination) -> Mapping[int, bytes]:
            super().fetch(batch, destination)
            return {want.row: want.checksum for want in batch.wants if want.checksum is not None}

    publish = case.slots.publish

    def broken(want: Want, checksum: bytes) -> None:
        if want.row == 7:
            raise ValueError("this slot is gone")
        publish(want, checksum)

    monkeypatch.setattr(case.slots, "publish", broken)
    source = Vouching("a")
    source.limits = Limits(nbytes=len(case.rows) * NBYTES)
    report = case.restore([source]).run()
    case.check(report, done=set(case.rows) - {7})
    assert report.state is RestoreState.FAILED


def test_nobody_is_asked_any_more_once_the_destination_is_gone(case: Case) -> None:
    def trick(places: Places) -> None:
        raise TransferFailed("the consumer is given up", is_destination_gone=True)

    first, second = Odd("first", before=trick), Odd("second")
    report = case.restore([first], [second]).run()
    case.check(report, done=set())
    assert (len(first.fetched), second.fetched) == (2, [])
    assert {block.reason for block in report.failed} == {
        "first: the consumer is given up; the consumer is given up",
        "the consumer is given up",
    }


def test_sources_of_one_name_are_still_two(case: Case) -> None:
    """A node may be called `disk`."""
    node, disk = Odd("disk", before=fail("it is a node")), Odd("disk", kind=SourceKind.DISK)
    report = case.restore([node], [disk]).run()
    case.check(report)
    assert report.bytes_by_source == {"local": 0, "peer": 0, "disk": 13 * NBYTES}


def test_what_was_known_of_a_row_beforehand_is_in_its_reason(case: Case) -> None:
    restore = case.restore([Odd("a")], only={"a": set(range(12))}, reasons={12: "two nodes disagree"})
    assert restore.run().failed[0].reason == "two nodes disagree"


def test_a_failure_of_the_restore_itself_is_told_and_closes_the_sources(case: Case) -> None:
    def broken(row: int) -> ExpertKey:
        raise RuntimeError("no keys today")

    source, progress = Odd("a"), Progress()
    restore = case.restore([source], only={"a": set()}, key_of=broken, progress=progress)
    with pytest.raises(RuntimeError, match="no keys today"):
        restore.run()
    assert (progress.report().state, progress.report().error) == (RestoreState.FAILED, "RuntimeError: no keys today")
    assert source.closed == 1


# -- cancelling and watching -----------------------------------------------------------------------------------


def test_cancelling_stops_after_the_batches_under_way(case: Case) -> None:
    source = Odd("a", before=lambda places: restore.cancel() if len(source.fetched) > 4 else None)
    restore = case.restore([source])
    report = restore.run()
    assert report.state is RestoreState.CANCELLED
    assert sorted(case.slots.published) == sorted(source.fetched), "whole batches, and those are published"
    assert 4 < len(source.fetched) < 13
    case.check(report, done=set(source.fetched))
    assert source.closed == 1


def test_cancelling_recalls_what_is_under_way_with_a_source_that_would_be_silent_for_ever(case: Case) -> None:
    silent = Odd("silent", waits_for_recall=True)
    restore = case.restore([silent])
    running = threading.Thread(target=restore.run)
    running.start()
    wait_until(lambda: silent.fetched, "it was asked")
    restore.cancel()
    running.join(DEADLINE_S)
    assert not running.is_alive()
    assert silent.was_recalled
    assert restore.report().state is RestoreState.CANCELLED
    assert len(silent.fetched) == 2, "one batch, and never again"


def test_one_cancelled_before_it_runs_touches_nothing(case: Case) -> None:
    source = Odd("a")
    restore = case.restore([source])
    restore.cancel()
    report = restore.run()
    assert report.state is RestoreState.CANCELLED
    case.check(report, done=set())
    assert (source.fetched, source.closed) == ([], 1)
    assert not case.slots.begun


def test_the_numbers_add_up_whenever_somebody_looks() -> None:
    case = Case(blocks=333)
    sources: list[Source] = [Odd("a", lanes=3), Odd("b", lanes=2, after=spoil)]
    restore = case.restore(sources, [Odd("disk", kind=SourceKind.DISK)])
    seen: list[Report] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.is_set():
            seen.append(restore.report())

    watcher = threading.Thread(target=watch)
    watcher.start()
    report = restore.run()
    ended.set()
    watcher.join()
    case.check(report)
    for before, after in itertools.pairwise(seen):
        assert before.blocks_done <= after.blocks_done
        assert all(before.bytes_by_source[k] <= after.bytes_by_source[k] for k in before.bytes_by_source)
    for each in seen:
        assert each.bytes_done == sum(each.bytes_by_source.values()) == each.blocks_done * NBYTES
        assert each.state is RestoreState.RUNNING or each.blocks_done in (0, 333)

"""What becomes of every block and every source of one restore. Pure: no thread, no byte moved, no clock of its own.

Theory of operation. Whoever moves bytes asks `next` what to do now, does it, and tells what came of it: `moved`,
`failed`, `verified`, `refused`, `published`, `ended`, `cancel`. After each of these `next` is asked again. Nothing is
decided anywhere else, and nothing is decided ahead: which source serves a block is settled again whenever one of three
things happens: the block's transfer failed, its bytes were wrong, or the source it waits for is doubted. Failure means
"clear and ask again": the block is wanted as before, poorer by an offer, and there are no rounds.

A block goes these ways, and no other; STEPS is the same as a table, and what is not in it raises.

    WANTED ──started──▶ UNDER_WAY ──moved──▶ UNVERIFIED ──matched──▶ RIGHT ──published──▶ PUBLISHED
      │ ▲                   │                  │  ▲  │                 │
      │ └────── lost ───────┘                  │  │  └─early─▶ HELD_BACK: what it holds is right, but a transfer that
      │ └─ wrong, refused ─────────────────────┴──┼────────────────────┘  was given up on may still write there
      └─exhausted─▶ FAILED ─offered─▶ WANTED      └─quiet── HELD_BACK: that transfer has ended, so look once more

A source is asked for the blocks whose nearest offer it is; sources that are equally near share them by bytes. How a
source comes to be doubted or given up is in `transfer.standing`.

A source that has nothing left to do takes over: what still waits for another that is as near or farther, and what is
late there (`transfer.standing`). That is *recalled*: whoever moves it is told, ends it if that can be done, and tells
what became of it, as of any other. A source that was recalled is doubted; what it was disturbed in besides is free.

A doubted source is left aside while others can serve. What nobody else has it is asked for again, one batch at a time
with pauses in between, for a failure may pass. One that is given up is asked for nothing. A block may ask each source
OFFER_TRIES_MAX times, the second time alone, and of a source that gave it wrong bytes or timed out never again: so
every restore ends. A transfer that timed out is *outstanding* until somebody who knows says that it has `ended`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from transfer.errors import SomeLost, TransferFailed, told
from transfer.plan import Batch, Offer, Want
from transfer.standing import Course, Party, Record, Standing

LANES_MAX = 32  # batches under way at a time, over all sources
OFFER_TRIES_MAX = 2  # of one block at one source
REASONS_MAX = 4  # remembered for each block
LOOK_S = 0.05  # between looks at whether what is under way is late, while somebody is idle
LATE = "spoiled by late bytes of a peer that had timed out"
NOBODY = "no source that was allowed and could be reached has it"


class Stage(StrEnum):
    """How far a block is."""

    WANTED = "wanted"
    UNDER_WAY = "under way"
    UNVERIFIED = "unverified"
    RIGHT = "right"
    HELD_BACK = "held back"
    PUBLISHED = "published"
    FAILED = "failed"


class Event(StrEnum):
    """What can happen to a block."""

    STARTED = "started"
    EXHAUSTED = "exhausted"
    MOVED = "moved"
    LOST = "lost"
    MATCHED = "matched"
    EARLY = "early"
    WRONG = "wrong"
    REFUSED = "refused"
    PUBLISHED = "published"
    QUIET = "quiet"
    OFFERED = "offered"


STEPS: Mapping[tuple[Stage, Event], Stage] = {
    (Stage.WANTED, Event.STARTED): Stage.UNDER_WAY,
    (Stage.WANTED, Event.EXHAUSTED): Stage.FAILED,
    (Stage.UNDER_WAY, Event.MOVED): Stage.UNVERIFIED,
    (Stage.UNDER_WAY, Event.LOST): Stage.WANTED,
    (Stage.UNVERIFIED, Event.MATCHED): Stage.RIGHT,
    (Stage.UNVERIFIED, Event.EARLY): Stage.HELD_BACK,
    (Stage.UNVERIFIED, Event.WRONG): Stage.WANTED,
    (Stage.UNVERIFIED, Event.REFUSED): Stage.WANTED,
    (Stage.RIGHT, Event.PUBLISHED): Stage.PUBLISHED,
    (Stage.RIGHT, Event.REFUSED): Stage.WANTED,
    (Stage.HELD_BACK, Event.QUIET): Stage.UNVERIFIED,
    (Stage.FAILED, Event.OFFERED): Stage.WANTED,
}
BUSY = (Stage.UNDER_WAY, Stage.UNVERIFIED, Stage.RIGHT)


class Arrived(NamedTuple):
    """A block whose bytes are at their destination. `checksum` is the one that was verified, if it was."""

    want: Want
    source: Hashable
    checksum: bytes | None


class Orders(NamedTuple):
    """What to do now, all of it. With `wait_s`, ask again after that many seconds even if nothing happened."""

    move: tuple[Batch, ...]
    verify: tuple[Arrived, ...]
    publish: tuple[Arrived, ...]
    wait_s: float | None
    recall: tuple[Batch, ...]


@dataclass(slots=True)
class _Block:
    want: Want
    offers: Sequence[Offer]
    stage: Stage = Stage.WANTED
    source: Hashable = None
    """Whom it waits for, or whose bytes it has."""
    checksum: bytes | None = None
    """That was verified while it is RIGHT or HELD_BACK, and at the look that follows."""
    tried: tuple[Hashable, ...] = ()
    reasons: tuple[str, ...] = ()

    def give_reason(self, reason: str) -> None:
        if len(self.reasons) < REASONS_MAX and reason not in self.reasons:
            self.reasons += (reason,)

    def try_again_or_close(self, source: Hashable) -> None:
        """It was tried there in vain: it may be tried again, but not for ever."""
        self.tried += (source,)
        if self.tried.count(source) >= OFFER_TRIES_MAX:
            self.close(source)

    def close(self, source: Hashable) -> None:
        self.offers = [offer for offer in self.offers if offer.source != source]


class Ledger:
    """The blocks and sources of one restore. Not thread-safe: one lock around each call will do."""

    def __init__(
        self,
        wants: Iterable[Want],
        offers: Mapping[int, Sequence[Offer]],
        parties: Mapping[Hashable, Party],
        reasons: Mapping[int, str] | None = None,
    ) -> None:
        """`offers` by manifest row; the sources in them are the keys of `parties`. `reasons` are known beforehand."""
        self._blocks = {want.row: _Block(want, offers.get(want.row, ())) for want in wants}
        for row, reason in (reasons or {}).items():
            self._blocks[row].give_reason(reason)
        self._sources = {key: Record(key, party) for key, party in parties.items()}
        for row, block in self._blocks.items():
            for offer in block.offers:
                self._sources[offer.source].open.add(row)
        self._look_at = float("-inf")
        self._count = dict.fromkeys(Stage, 0) | {Stage.WANTED: len(self._blocks)}
        self._unassigned = list(self._blocks)
        self._to_verify: list[int] = []
        self._to_publish: list[int] = []
        self._outstanding: list[Batch] = []
        self._touched: Counter[int] = Counter()
        self.wrong: defaultdict[Hashable, list[int]] = defaultdict(list)
        """By source, the rows whose bytes had another checksum than they should, as it gave them."""
        self.is_cancelled = False
        self._is_abandoned = False

    # -- what to do ------------------------------------------------------------------------------------------

    def next(self, now: float) -> Orders:
        """All that can be done now and was not ordered before. `now` in seconds of a clock that never jumps."""
        for source in self._sources.values():
            source.listen(now)
        if not self.is_cancelled:
            self._assign()
        is_looking = now >= self._look_at and not (self.is_cancelled or self._is_abandoned)
        if is_looking:
            self._share(now)
        move = () if self.is_cancelled else tuple(self._start(now))
        recall = tuple(self._recall(now)) if is_looking else ()
        if is_looking and not move:
            self._look_at = now + LOOK_S
        verify, self._to_verify = self._to_verify, []
        publish, self._to_publish = self._to_publish, []
        return Orders(move, self._arrived(verify), self._arrived(publish), self._wait_s(now), recall)

    def _assign(self) -> None:
        """Have each block that waits for nobody wait for a source, or fail it if there is none left.

        Blocks with the fewest offers go first: those with a choice then even out what those without have left uneven.
        """
        rows, self._unassigned = self._unassigned, []
        for row in sorted(rows, key=lambda row: len(self._blocks[row].offers)):
            block = self._blocks[row]
            offer = self._choose(block)
            if offer is None:
                self._step(block, Event.EXHAUSTED)
                continue
            self._put(block, self._sources[offer.source])

    def _choose(self, block: _Block) -> Offer | None:
        """Of the offers that are open: first one not doubted, then not tried, nearest, least loaded."""
        if self._is_abandoned:
            return None
        offers = [o for o in block.offers if not self._sources[o.source].is_given_up]
        if len(offers) > 1:
            costs = [self._cost(offer, block.tried) for offer in offers]
            return offers[costs.index(min(costs))]
        return offers[0] if offers else None

    def _cost(self, offer: Offer, tried: Sequence[Hashable]) -> tuple[bool, bool, int, int]:
        source = self._sources[offer.source]
        return source.is_doubted, offer.source in tried, source.party.tier, source.load_nbytes

    def _share(self, now: float) -> None:
        """Let who is idle have of what waits for others: the last of it, half at most, so that both end together."""
        for idle in [source for source in self._sources.values() if source.is_idle and source.open]:
            held_up = (s for s in self._sources.values() if s.queue and s.is_held_up(now))
            for busy in sorted(held_up, key=lambda s: -s.queue.nbytes):
                if busy.party.tier < idle.party.tier:
                    continue  # else every restore from memory would end on the disk
                nbytes = min(idle.party.limits.nbytes, busy.queue.nbytes // 2)
                for want in busy.queue.take_last(idle.open.__contains__, nbytes):
                    self._put(self._blocks[want.row], idle)
                if idle.queue:
                    break

    def _put(self, block: _Block, source: Record) -> None:
        """Have a block wait for a source that offers it."""
        block.source = source.key
        address = next(offer.address for offer in block.offers if offer.source == source.key)
        source.queue.put(block.want, address, is_again=source.key in block.tried)

    def _recall(self, now: float) -> Iterable[Batch]:
        """The batches that somebody who is idle would bring sooner, each once."""
        idle = [source for source in self._sources.values() if source.is_idle and source.open]
        for source in self._sources.values() if idle else ():
            for batch, course in source.under_way.items():
                if course.is_recalled or not self._would_serve(idle, source, batch, now):
                    continue
                course.is_recalled = True
                for other in source.under_way.values():
                    other.is_disturbed = True
                yield batch

    def _would_serve(self, idle: Sequence[Record], source: Record, batch: Batch, now: float) -> bool:
        late = [other for other in idle if other is not source and source.is_late(batch, other, now)]
        return any(want.row in other.open for other in late for want in batch.wants)

    def _start(self, now: float) -> Iterable[Batch]:
        free = LANES_MAX - sum(len(source.under_way) for source in self._sources.values())
        ready = [s for s in self._sources.values() if s.has_room and not s.pause_s(now)]
        while ready and free > 0:
            source = min(ready, key=lambda s: len(s.under_way))
            batch = source.begin(now)
            for want in batch.wants:
                self._step(self._blocks[want.row], Event.STARTED)
            yield batch
            free -= 1
            if not source.has_room:
                ready.remove(source)

    def _arrived(self, rows: Iterable[int]) -> tuple[Arrived, ...]:
        return tuple(Arrived(b.want, b.source, b.checksum) for b in map(self._blocks.__getitem__, rows))

    def _wait_s(self, now: float) -> float | None:
        if self.is_cancelled:
            return None
        doubted = (s for s in self._sources.values() if s.is_doubted and s.has_room)
        pauses = [pause for s in doubted if (pause := s.pause_s(now))]
        sources = self._sources.values()
        if not self._is_abandoned and any(s.is_idle and s.open for s in sources) and any(s.under_way for s in sources):
            pauses.append(LOOK_S)  # what is under way may be late by then
        return min(pauses, default=None)

    # -- what happened ---------------------------------------------------------------------------------------

    def moved(self, batch: Batch, checksums: Mapping[int, bytes], now: float) -> None:
        """The batch's bytes are in place, with the checksums that were taken on the way, by row."""
        source = self._sources[batch.source]
        source.note_service(source.end(batch), batch.nbytes, now)
        for want in batch.wants:
            self._came(want.row, checksums)

    def _came(self, row: int, checksums: Mapping[int, bytes]) -> None:
        self._step(self._blocks[row], Event.MOVED)
        if row in checksums:
            self.verified(row, checksums[row])
        else:
            self._to_verify.append(row)

    def came_in_part(self, batch: Batch, error: SomeLost, now: float) -> None:
        """Of the batch's blocks some came. A source that brings anything serves: only the blocks it lacks are tried
        again, alone; it stands no worse for them."""
        if len(error.lost) == len(batch.wants):
            self.failed(batch, error, now)
            return
        source = self._sources[batch.source]
        course, before = source.end(batch), source.standing
        if course.is_recalled:
            source.note_recall(now)
        else:
            source.failures = 0
        for row in (want.row for want in batch.wants):
            if row in error.lost:
                self._lose(self._blocks[row], source, error.lost[row], course)
            else:
                self._came(row, error.came)
        if source.standing is not before:
            self._reassign(source)

    def _lose(self, block: _Block, source: Record, reason: str, course: Course) -> None:
        block.give_reason(f"{source.party.name}: {reason}")
        if course.is_recalled or not course.is_disturbed:
            block.try_again_or_close(source.key)
        self._want_again(block, Event.LOST)

    def failed(self, batch: Batch, error: Exception, now: float) -> None:
        """The batch did not come, and any of its blocks may be half-written; if it timed out, also later.

        Where its destination is gone, nothing can be put there any more: what is wanted has failed.
        """
        source = self._sources[batch.source]
        course, before = source.end(batch), source.standing
        if course.is_recalled:
            source.note_recall(now)
        elif not course.is_disturbed:
            source.note_failure(course.started, now)
        timed_out = isinstance(error, TransferFailed) and error.timed_out
        is_gone = isinstance(error, TransferFailed) and error.is_destination_gone
        if timed_out:
            self._outstanding.append(batch)
            self._touched.update(want.row for want in batch.wants)
        lost = error.lost if isinstance(error, SomeLost) else {}
        for want in batch.wants:
            block = self._blocks[want.row]
            if timed_out:
                block.close(source.key)
            self._lose(block, source, lost.get(want.row) or told(error), course)
        if is_gone:
            self._abandon(told(error))
        elif source.standing is not before:
            self._reassign(source)

    def verified(self, row: int, checksum: bytes) -> None:
        """A block that is in place has this checksum."""
        block = self._blocks[row]
        expected = block.checksum or block.want.checksum
        if expected is not None and checksum != expected:
            reason = LATE if block.checksum is not None else f"checksum {checksum.hex()} instead of {expected.hex()}"
            if block.checksum is None:
                self.wrong[block.source].append(row)
            self._turn_down(block, Event.WRONG, reason)
            return
        self._step(block, Event.EARLY if self._touched.get(row) else Event.MATCHED)
        block.checksum = checksum
        if block.stage is Stage.RIGHT:
            self._to_publish.append(row)

    def refused(self, row: int, reason: str) -> None:
        """A block that is in place could not be verified, or not be published."""
        self._turn_down(self._blocks[row], Event.REFUSED, reason)

    def _turn_down(self, block: _Block, event: Event, reason: str) -> None:
        """It is wanted again, from another source. If late bytes spoiled it, the one it came from is not at fault."""
        block.give_reason(f"{self._sources[block.source].party.name}: {reason}")
        was_right, block.checksum = block.checksum is not None, None
        if not was_right:
            block.close(block.source)
        elif event is Event.REFUSED:
            block.try_again_or_close(block.source)
        else:
            block.tried += (block.source,)
        self._want_again(block, event)

    def published(self, row: int) -> None:
        self._step(self._blocks[row], Event.PUBLISHED)

    def ended(self, batch: Batch) -> None:
        """An outstanding transfer can write no more: what was held back for it may be looked at once more."""
        self._outstanding.remove(batch)
        self._touched.subtract(want.row for want in batch.wants)
        for row in (want.row for want in batch.wants):
            if self._blocks[row].stage is Stage.HELD_BACK and not self._touched[row]:
                self._step(self._blocks[row], Event.QUIET)
                self._to_verify.append(row)

    def offered(
        self, offers: Mapping[int, Sequence[Offer]], expected: Mapping[int, bytes], parties: Mapping[Hashable, Party]
    ) -> None:
        """Others turned up for blocks that have failed: those are wanted again.

        `expected` are the checksums that they say the blocks have; one that is to have another stays as it is.
        """
        if self._is_abandoned or self.is_cancelled:
            return
        self._sources |= {key: Record(key, party) for key, party in parties.items() if key not in self._sources}
        for row, more in offers.items():
            block = self._blocks[row]
            checksum = block.want.checksum or expected.get(row)
            if block.stage is not Stage.FAILED or not more or checksum != expected.get(row):
                continue
            block.want, block.offers = block.want._replace(checksum=checksum), list(more)
            for offer in more:
                self._sources[offer.source].open.add(row)
            self._want_again(block, Event.OFFERED)

    def cancel(self) -> tuple[Batch, ...]:
        """Start nothing more. What is under way is recalled, and each tells how it ended: returns what was not before.

        What has come by then is still verified and published.
        """
        self.is_cancelled = True
        running = [each for source in self._sources.values() for each in source.under_way.items()]
        recalled = tuple(batch for batch, course in running if not course.is_recalled)
        for _, course in running:
            course.is_recalled = True
        return recalled

    # -- how it stands ---------------------------------------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        """Whether something is to be done, or being done."""
        is_wanting = self._count[Stage.WANTED] and not self.is_cancelled
        return bool(is_wanting or any(self._count[stage] for stage in BUSY))

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do, or to wait for."""
        return not self.is_busy and not self._count[Stage.HELD_BACK]

    @property
    def waits_for(self) -> tuple[Batch, ...]:
        """Once nothing else is left: the outstanding transfers that blocks are held back for."""
        if self.is_busy:
            return ()
        held = {row for row, block in self._blocks.items() if block.stage is Stage.HELD_BACK}
        return tuple(b for b in self._outstanding if any(want.row in held for want in b.wants))

    @property
    def outstanding(self) -> tuple[Batch, ...]:
        """The transfers that were given up on, and may still write to where their blocks belong."""
        return tuple(self._outstanding)

    @property
    def is_complete(self) -> bool:
        return self._count[Stage.PUBLISHED] == len(self._blocks)

    @property
    def failures(self) -> dict[int, str]:
        """The rows that could not be had, ascending, and what each source said."""
        failed = sorted(row for row, block in self._blocks.items() if block.stage is Stage.FAILED)
        return {row: "; ".join(self._blocks[row].reasons) or NOBODY for row in failed}

    def stage(self, row: int) -> Stage:
        return self._blocks[row].stage

    def standing(self, source: Hashable) -> Standing:
        return self._sources[source].standing

    # -- stepping --------------------------------------------------------------------------------------------

    def _step(self, block: _Block, event: Event) -> None:
        before = block.stage
        after = STEPS.get((before, event))
        if after is None:
            raise RuntimeError(f"block {block.want.row} is {before}: it cannot be {event}")
        count = self._count
        count[before] -= 1
        count[after] += 1
        block.stage = after
        if after is Stage.UNVERIFIED:
            self._sources[block.source].unverified_nbytes += block.want.nbytes
        elif before is Stage.UNVERIFIED:
            self._sources[block.source].unverified_nbytes -= block.want.nbytes

    def _want_again(self, block: _Block, event: Event) -> None:
        self._step(block, event)
        self._unassigned.append(block.want.row)

    def _reassign(self, source: Record) -> None:
        """Send away who waits for a source that is doubted, or given up; who has no other comes back."""
        self._unassigned += source.queue.clear()
        if source.is_given_up:
            reason = f"{source.party.name}: given up after {source.failures} failures"
            for row in self._unassigned:
                if any(offer.source == source.key for offer in self._blocks[row].offers):
                    self._blocks[row].give_reason(reason)

    def _abandon(self, reason: str) -> None:
        """Fail what is wanted, and ask nobody any more."""
        self._is_abandoned = True
        for source in self._sources.values():
            self._unassigned += source.queue.clear()
        for row in self._unassigned:
            self._blocks[row].give_reason(reason)

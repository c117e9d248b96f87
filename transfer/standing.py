"""What is thought of a source while a restore runs. Pure, like `transfer.ledger`, which keeps one record for each.

    GOOD ──SOURCE_FAILURES_MAX failures in a row──▶ DOUBTED ──still failing after PATIENCE_S──▶ GIVEN_UP
      ▲───────────────── served ─────────────────────┘

Why not given up at once: a failure may pass, and a source that failed twice may be the only one that has a block. Why
given up at all: one that is dead answers each question after a second, or ten, and there may be thousands to ask.

A source may also be slow, or say nothing, for as long as it likes: what is thought of that depends on who else could
serve. Beside one that is as near and idle it is *late* once its batch will take longer than that one would, by far; the
measure is what that one took, of this very restore. Beside one that is farther, a disk, it is late only if it is silent
for SILENCE_S or slower than any disk: else every large restore from memory would end on the disk.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import NamedTuple

from transfer.plan import Batch, Limits, Queue

UNVERIFIED_BATCHES_MAX = 2  # for each lane of a source: it waits for its checksums beyond that
SOURCE_FAILURES_MAX = 2  # failed batches in a row, after which a source is doubted
PATIENCE_S = 2.0  # of nothing but failures, after which a doubted source is given up
DOUBT_PAUSE_S = 0.05  # before a doubted source is asked again
GRACE_S = 0.25  # within which nobody is late, whatever others would take: machines have hiccups
LATE_FACTOR = 2.0  # times what another would take, a batch may take besides
SILENCE_S = 3.0  # without a byte: more than a network's hiccup, and less than anybody wants to wait
PACE_NBYTES_PER_S = 4 << 20  # of a source: 100 Mbit/s are 12 MB/s, a disk that does not do 4 is broken


class Standing(StrEnum):
    """What is thought of a source."""

    GOOD = "good"
    DOUBTED = "doubted"
    GIVEN_UP = "given up"


class Party(NamedTuple):
    """A source as the ledger sees it: its name, how near it is (0 the nearest), and what it can do at a time."""

    name: str
    tier: int
    lanes: int
    limits: Limits


@dataclass(slots=True)
class Course:
    """How far one batch is. Times are those of whoever asks the ledger."""

    started: float
    is_recalled: bool = False
    is_disturbed: bool = False
    """Whether another batch of its source was recalled meanwhile: connections are cut for that, perhaps its own."""


@dataclass(slots=True)
class Record:
    """How one source stands in one restore: what waits for it, what is under way, how it has done."""

    key: Hashable
    party: Party
    queue: Queue = field(default_factory=Queue)
    open: set[int] = field(default_factory=set)
    """Rows that it has, and was never asked for."""
    under_way: dict[Batch, Course] = field(default_factory=dict)
    begun: int = 0
    """How many batches were ordered of it."""
    moving_nbytes: int = 0
    busy_since: float = 0.0
    """When the first of the batches was started that follow each other until now."""
    heard_at: float = 0.0
    """When it was last seen to bring a byte, or was first asked."""
    arrived_nbytes: int = 0
    """Brought since `busy_since`, as far as it was seen."""
    ended_nbytes: int = 0
    """Of which by batches that have ended."""
    pace_s: float | None = None
    """Seconds a byte of the batch that it was quickest with; None until it has brought one."""
    unverified_nbytes: int = 0
    failures: int = 0
    """In a row."""
    failing_since: float = 0.0
    again_at: float = 0.0
    """When it may be asked, if it is doubted."""
    is_given_up: bool = False

    @property
    def standing(self) -> Standing:
        if self.is_given_up:
            return Standing.GIVEN_UP
        return Standing.DOUBTED if self.is_doubted else Standing.GOOD

    @property
    def is_doubted(self) -> bool:
        return self.failures >= SOURCE_FAILURES_MAX and not self.is_given_up

    @property
    def load_nbytes(self) -> int:
        return self.queue.nbytes + self.moving_nbytes

    @property
    def has_room(self) -> bool:
        """Whether it may be asked for a batch more, if not at once."""
        if not self.queue:
            return False
        party = self.party
        lanes = 1 if self.failures >= SOURCE_FAILURES_MAX else party.lanes
        unverified_max = UNVERIFIED_BATCHES_MAX * party.lanes * party.limits.nbytes
        return len(self.under_way) < lanes and self.unverified_nbytes <= unverified_max

    @property
    def next_limits(self) -> Limits:
        """How large its next batch may be.

        The lanes should be out of step, for what they share, a bus or a link, would idle while all of them verify:
        so the first batch of each is larger than that of the lane before. And they should end together: so what is left
        is shared out between them.
        """
        lanes, most = self.party.lanes, self.party.limits
        first = most.nbytes * min(lanes, self.begun + 1) // lanes
        share = max(most.last_nbytes, -(-self.queue.nbytes // lanes))
        nbytes = min(first, share, most.nbytes)
        return most if nbytes == most.nbytes else replace(most, nbytes=nbytes)

    def begin(self, now: float) -> Batch:
        """Its next batch, which is under way from now on."""
        batch = self.queue.cut(self.key, self.next_limits)
        self.begun += 1
        if not self.under_way:
            self.busy_since = self.heard_at = now
            self.arrived_nbytes = self.ended_nbytes = 0
        self.under_way[batch] = Course(now)
        self.open.difference_update(want.row for want in batch.wants)
        self.moving_nbytes += batch.nbytes
        return batch

    def pause_s(self, now: float) -> float:
        return max(0.0, self.again_at - now) if self.is_doubted else 0.0

    @property
    def is_idle(self) -> bool:
        """Whether it could do more than it has to do."""
        is_good = self.standing is Standing.GOOD
        return is_good and not self.queue and len(self.under_way) < self.party.lanes

    def end(self, batch: Batch) -> Course:
        self.moving_nbytes -= batch.nbytes
        self.ended_nbytes += batch.watch.arrived_nbytes
        return self.under_way.pop(batch)

    def listen(self, now: float) -> None:
        """Take notice of what has arrived."""
        arrived = self.ended_nbytes + sum(batch.watch.arrived_nbytes for batch in self.under_way)
        if arrived > self.arrived_nbytes:
            self.arrived_nbytes, self.heard_at = arrived, now

    def is_silent(self, now: float) -> bool:
        """Whether it brings nothing, or next to nothing."""
        busy_s = now - self.busy_since
        is_slow = busy_s >= SILENCE_S and self.arrived_nbytes < PACE_NBYTES_PER_S * busy_s
        return is_slow or now - self.heard_at >= SILENCE_S

    def is_late(self, batch: Batch, other: Record, now: float) -> bool:
        """Whether a batch that is under way had better be brought by another source, which is idle."""
        if other.party.tier > self.party.tier or other.pace_s is None:
            return self.is_silent(now)
        elapsed, arrived = now - self.under_way[batch].started, batch.watch.arrived_nbytes
        left_s = elapsed * (batch.nbytes - arrived) / arrived if arrived else elapsed
        return elapsed > GRACE_S and left_s > GRACE_S + LATE_FACTOR * other.pace_s * batch.nbytes

    def is_held_up(self, now: float) -> bool:
        """Whether what waits for it will not have its turn at once."""
        return any(now - course.started >= DOUBT_PAUSE_S for course in self.under_way.values())

    def note_service(self, course: Course, nbytes: int, now: float) -> None:
        self.failures = 0
        if nbytes:
            pace_s = (now - course.started) / nbytes
            self.pace_s = pace_s if self.pace_s is None else min(pace_s, self.pace_s)

    def note_recall(self, now: float) -> None:
        """It was too slow beside others: it is asked for what only it has, which it may bring in its own time."""
        if self.standing is Standing.GOOD:
            self.failures, self.failing_since = SOURCE_FAILURES_MAX, now
        self.again_at = now + DOUBT_PAUSE_S

    def note_failure(self, started: float, now: float) -> None:
        if not self.failures:
            self.failing_since = started
        self.failures += 1
        self.again_at = now + DOUBT_PAUSE_S
        is_long = now - self.failing_since >= PATIENCE_S
        self.is_given_up = is_long and self.is_doubted and not self.under_way

"""What is thought of a source while a restore runs. Pure, like `transfer.ledger`, which keeps one record for each.

    GOOD ──SOURCE_FAILURES_MAX failures in a row──▶ DOUBTED ──still failing after PATIENCE_S──▶ GIVEN_UP
      ▲───────────────── served ─────────────────────┘

Why not given up at once: a failure may pass, and a source that failed twice may be the only one that has a block. Why
given up at all: one that is dead answers each question after a second, or ten, and there may be thousands to ask.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from transfer.plan import Batch, Limits, Queue

UNVERIFIED_BATCHES_MAX = 2  # for each lane of a source: it waits for its checksums beyond that
SOURCE_FAILURES_MAX = 2  # failed batches in a row, after which a source is doubted
PATIENCE_S = 2.0  # of nothing but failures, after which a doubted source is given up
DOUBT_PAUSE_S = 0.05  # before a doubted source is asked again


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
class Record:
    """How one source stands in one restore: what waits for it, what is under way, how it has done."""

    key: Hashable
    party: Party
    queue: Queue = field(default_factory=Queue)
    under_way: dict[Batch, float] = field(default_factory=dict)
    """When each was started."""
    moving_nbytes: int = 0
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

    def pause_s(self, now: float) -> float:
        return max(0.0, self.again_at - now) if self.is_doubted else 0.0

    def note_failure(self, started: float, now: float) -> None:
        if not self.failures:
            self.failing_since = started
        self.failures += 1
        self.again_at = now + DOUBT_PAUSE_S
        is_long = now - self.failing_since >= PATIENCE_S
        self.is_given_up = is_long and self.is_doubted and not self.under_way

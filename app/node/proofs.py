"""When each block's bytes were last proved against its checksum: proof is a date, not a flag.

A block that was published was proved then; one that was adopted was not, whatever its table says. From there on every
proof grows old, and the oldest one says how long rot may have gone unseen. Ages are counted by a clock that does not
jump, and told as dates.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta

import numpy as np

from app.cluster.placement import Int64s

NEVER = -np.inf


class Proofs:
    """Of the blocks of one segment. For any thread: a block's time is one number, stored at once."""

    def __init__(self, blocks: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._proved_at = np.full(blocks, NEVER)
        self._clock = clock

    def note(self, row: int) -> None:
        """The block's bytes matched its checksum just now."""
        self._proved_at[row] = self._clock()

    def doubt(self, rows: Iterable[int]) -> None:
        """Somebody read other bytes of these: they are proved next, before all others."""
        self._proved_at[list(rows)] = NEVER

    def next(self, rows: Int64s) -> int | None:
        """Of these rows the one whose proof is oldest, those never proved first; None of none."""
        return int(rows[self._proved_at[rows].argmin()]) if len(rows) else None

    def unproved(self, rows: Int64s) -> int:
        """How many of these rows were never proved since this process began."""
        return int((self._proved_at[rows] == NEVER).sum())

    def oldest(self, rows: Int64s) -> datetime | None:
        """When the oldest proof among these rows was; None if one of them has none, or there are no rows."""
        if not len(rows) or self.unproved(rows):
            return None
        age_s = self._clock() - float(self._proved_at[rows].min())
        return datetime.now(UTC) - timedelta(seconds=age_s)

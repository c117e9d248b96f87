"""Proves blocks in the background, the one whose proof is oldest first, at a bounded rate, for ever.

Memory rots: a flipped bit, a stray write. What is wrong is hidden at once, so that no reader and no peer takes it for
good, and then mended by an ordinary restore; what cannot be mended now, the caretaker tries again.

The rate is such that everything is proved within a day, and takes little of the memory's bandwidth. After an adoption,
when nothing is proved yet, the first time through is faster. What a reader doubts comes next. A restore is never held
up: while one is under way nothing is proved.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from app.errors import Conflict
from app.node.holding import Holding
from app.node.node import Node
from shm.block import ExpertKey
from transfer.loop import Loop

WITHIN_S = 86_400.0  # all of it, once
RATE_MIN = 1 << 20  # bytes a second, of a small segment
FIRST_RATE = 100 << 20  # while something was never proved: 1% of what a host's memory gives, 10 GB/s and more
TURN_S_MIN = 0.02  # between turns: small blocks are proved several at a time
IDLE_S = 1.0  # between looks at whether there is anything to prove

Mend = Callable[[Sequence[ExpertKey]], None]

_log = logging.getLogger("hotspare.scrub")


class Scrubber:
    """One node's. Counts what it did since it began."""

    def __init__(self, node: Node, mend: Mend, clock: Callable[[], float] = time.monotonic) -> None:
        self.loop = Loop("hotspare-scrubber", self._turn)
        self.proved = 0
        """Blocks found right."""
        self.rotten = 0
        """Blocks found wrong, and hidden."""
        self._node = node
        self._mend = mend
        self._clock = clock
        self._ahead = 0.0
        """Bytes proved sooner than the rate allows."""
        self._counted_at = clock()

    def rate(self, holding: Holding) -> float:
        """Bytes a second that are to be proved now."""
        published = holding.published()
        total = int(holding.manifest.nbytes[published].sum())
        asked = self._node.settings.scrub_rate or max(RATE_MIN, total / WITHIN_S)
        return max(asked, FIRST_RATE) if holding.proofs.unproved(published) else asked

    def _turn(self) -> float:
        holding = self._node.holding
        if holding is None or self._node.is_restoring:
            return IDLE_S
        rate, now = self.rate(holding), self._clock()
        self._ahead, self._counted_at = max(0.0, self._ahead - rate * (now - self._counted_at)), now
        all_nbytes = int(holding.manifest.nbytes.sum())
        while self._ahead < min(rate * TURN_S_MIN, all_nbytes):  # a small segment is proved once a turn, not more
            row = holding.proofs.next(holding.published())
            if row is None:
                return IDLE_S
            self.prove(holding, row)
            self._ahead += int(holding.manifest.nbytes[row])
        return min(max(TURN_S_MIN, self._ahead / rate), IDLE_S)

    def doubt(self, content: str, experts: Sequence[ExpertKey]) -> None:
        """A reader had other bytes of these than their checksums say: prove them next. It may be its own fault, or the
        network's. Raises BlockUnavailable for an expert that the model lacks, Conflict for a reader of other content.
        """
        holding = self._node.holding
        if holding is None or holding.content_digest != content:
            raise Conflict("this node has other weights than the ones doubted: what was read there is gone")
        rows = [holding.manifest.index(*key) for key in experts]
        holding.proofs.doubt(rows)
        first = experts[0]
        _log.warning("%d blocks arrived wrong somewhere, first %s: proving them next", len(experts), first)

    def prove(self, holding: Holding, row: int) -> bool:
        """Take a published block's checksum; whether it is the one on record. A block that is not is hidden.

        One that the object ends before is left to the guard, which gives the object its length first: where to write
        that it is hidden may be cut off as well, and whoever touches that dies of it.
        """
        segment, recorded = holding.segment, holding.segment.checksum(row)
        found = segment.read_checksum(row)
        if found is None:
            return False
        if found == recorded:
            holding.proofs.note(row)
            self.proved += 1
            return True
        if segment.checksum(row) != recorded or row not in holding.published():
            return True  # it was being written anew meanwhile, and is proved by whoever does
        segment.quarantine(row)
        self.rotten += 1
        key = holding.manifest.keys[row]
        _log.error("expert %d of layer %d does not match its checksum: it is hidden now", key.expert, key.layer)
        self._mend([key])
        return False

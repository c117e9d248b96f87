"""A node's segment as where a restore puts blocks: none is found in it while it is being written.

It has the segment of one holding, and with it that segment's memory for as long as the restore lasts: sources write to
addresses, and those must lead nowhere else when the node starts over with another segment meanwhile.
"""

from __future__ import annotations

from shm.checksum import checksum
from shm.segment import Segment
from transfer.plan import Want


class SegmentDestination:
    """A segment of ours as where a restore puts blocks."""

    def __init__(self, segment: Segment) -> None:
        self._segment = segment

    def begin(self, want: Want) -> None:
        self._segment.quarantine(want.row)

    def checksum(self, want: Want) -> bytes:
        return checksum(self._segment.block(want.row))

    def publish(self, want: Want, checksum: bytes) -> None:
        self._segment.publish(want.row, checksum)

"""A node's segment as where a restore puts blocks: none is found in it while it is being written."""

from __future__ import annotations

from collections.abc import Callable

from shm.checksum import checksum
from shm.segment import Segment
from transfer.plan import Want


class SegmentDestination:
    """A segment of ours as where a restore puts blocks."""

    def __init__(self, segment: Segment, changed: Callable[[], None]) -> None:
        """`changed` is called, from any thread, when a block has come or gone."""
        self._segment = segment
        self._changed = changed
        self._memory = segment.mappings()  # sources write to addresses: those must outlive a renewal

    def begin(self, want: Want) -> None:
        self._segment.quarantine(want.row)
        self._changed()

    def checksum(self, want: Want) -> bytes:
        return checksum(self._segment.block(want.row))

    def publish(self, want: Want, checksum: bytes) -> None:
        self._segment.publish(want.row, checksum)
        self._changed()

"""A node's segment as where a restore puts blocks: none is found in it while it is being written.

It has the segment of one holding, and with it that segment's memory for as long as the restore lasts: sources write to
addresses, and those must lead nowhere else when the node starts over with another segment meanwhile.
"""

from __future__ import annotations

from app.node.holding import Holding
from shm.checksum import checksum
from transfer.errors import RestoreError
from transfer.plan import Want


class SegmentDestination:
    """A segment of ours as where a restore puts blocks: each must be of its content, wherever it came from."""

    def __init__(self, holding: Holding) -> None:
        self._segment = holding.segment
        self._content = holding.disk.content if holding.disk else None
        self._proofs = holding.proofs

    def begin(self, want: Want) -> None:
        self._segment.quarantine(want.row)

    def checksum(self, want: Want) -> bytes:
        return checksum(self._segment.block(want.row))

    def publish(self, want: Want, checksum: bytes) -> None:
        if self._content is not None and not self._content.has(want.row, self._segment.block(want.row)):
            raise RestoreError("its bytes are not of the content that this node keeps: were its files exchanged?")
        self._segment.publish(want.row, checksum)
        self._proofs.note(want.row)

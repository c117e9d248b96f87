"""A node's segment as where a restore puts blocks: none is found in it while it is being written.

It has the segment of one holding, and with it that segment's memory for as long as the restore lasts: sources write to
addresses, and those must lead nowhere else when the node starts over with another segment meanwhile.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

from app.node.holding import Holding
from shm.checksum import checksum
from transfer.destination import Landing, Resident
from transfer.errors import RestoreError
from transfer.plan import Piece, Want


class SegmentDestination:
    """A segment of ours as where a restore puts blocks: each must be of its content, wherever it came from."""

    def __init__(self, holding: Holding) -> None:
        self._segment = holding.segment
        self._content = holding.disk.content if holding.disk else None
        self._proofs = holding.proofs

    def take(self, blocks: Sequence[Resident]) -> Mapping[int, bytes]:
        """Blocks that lie where they belong are only to be verified, which is left to the restore."""
        for block in blocks:
            if (place := self._segment.address(block.want.row)) != block.address:
                self._segment.quarantine(block.want.row)
                ctypes.memmove(place, block.address, block.want.nbytes)
        return {}

    def landings(self, wants: Sequence[Want], *, in_one_run: bool) -> Iterator[AbstractContextManager[Landing]]:
        yield self._hidden(wants)

    @contextmanager
    def _hidden(self, wants: Sequence[Want]) -> Iterator[Landing]:
        for want in wants:
            self._segment.quarantine(want.row)
        places = {want.row: (Piece(self._segment.address(want.row), 0, want.nbytes),) for want in wants}
        yield Landing(places, lambda taken, lost: taken)

    def checksum(self, want: Want) -> bytes:
        found = checksum(self._segment.block(want.row))
        if want.checksum not in (None, found):
            self._segment.quarantine(want.row)
        return found

    def publish(self, want: Want, checksum: bytes) -> None:
        if self._content is not None and not self._content.has(want.row, self._segment.block(want.row)):
            raise RestoreError("its bytes are not of the content that this node keeps: were its files exchanged?")
        self._segment.publish(want.row, checksum)
        self._proofs.note(want.row)

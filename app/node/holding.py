"""What a node has, as one value that is replaced whole: whoever reads it reads one moment, and needs no lock.

A route, an offer or a destination that asked the node for its segment, then for its manifest, then for an address,
might get three answers of two moments, with a renewal in between. So they take the node's holding once, and go by it.
A holding that was replaced stays readable for as long as somebody has it: its memory is mapped until then.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

import numpy as np

from app.cluster.placement import Int64s, Placement
from app.node.proofs import Proofs
from shm.block import ExpertKey, HeldBlock
from shm.checksum import CHECKSUM_NBYTES
from shm.errors import InvalidInput
from shm.layout import SegmentState
from shm.manifest import Manifest
from shm.segment import Segment
from transfer.checkpoint.content import PinnedCheckpoint

UNKNOWN_CHECKSUM = bytes(CHECKSUM_NBYTES)  # of a block that was never published here

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Holding:
    """A segment with the manifest that its rows are of, and which of them belong here. For any thread."""

    node_id: str
    segment: Segment
    manifest: Manifest
    placement: Placement
    content: bytes
    """The content digest of the bytes that its blocks have, or are to have: 16 bytes."""
    disk: PinnedCheckpoint | None
    """The checkpoint, as a source of that very content; None where there is none."""
    proofs: Proofs
    """When each of its blocks was last proved."""
    registered: Ranges
    """(address, nbytes) of its memory that is open to the transfer engine."""
    predecessor: Holding | None = None
    """What was held of this content in a segment that lost its name: served until it is here, and a while longer."""

    @property
    def content_digest(self) -> str:
        """The same in hex."""
        return self.content.hex()

    @property
    def revision(self) -> str:
        """Changes whenever what is published does: a digest of the block table, so nobody has to keep count."""
        return f"{self.segment.header.generation:x}-{self.segment.fingerprint()}"

    def placed(self) -> Int64s:
        """Manifest rows that belong here."""
        return self.placement.rows_of(self.node_id)

    def published(self) -> Int64s:
        return self.segment.published()

    def missing(self) -> Int64s:
        """Rows that belong here and are not published."""
        return np.setdiff1d(self.placed(), self.published(), assume_unique=True)

    def is_recorded(self, row: int) -> bool:
        """Whether the block was published here once: then its checksum is on record."""
        return self.segment.checksum(row) != UNKNOWN_CHECKSUM

    def held(self, rows: Iterable[int] | None = None) -> dict[int, HeldBlock]:
        """Of these rows, or all, those that are published, where they lie in the memory that is open to the engine."""
        is_view = set(self.registered) <= set(self.segment.served_ranges())
        asked = range(len(self.manifest)) if rows is None else tuple(rows)
        found = self.segment.served(asked) if is_view else self.segment.held(asked)
        if self.predecessor is not None:
            found |= self.predecessor.held(row for row in asked if row not in found)
        return found

    def checks(self) -> dict[str, bool]:
        """What READY consists of. Looks at the object in /dev/shm as a reader does: about a millisecond."""
        return {
            "manifest": True,
            "published": not len(self.missing()),
            "sealed": self.segment.state is SegmentState.SEALED,
            "registered": bool(self.registered),
            "attachable": self.segment.reader_problem() is None,
        }

    def available(self) -> Int64s:
        """Rows that others may have from here, wherever in this process's memory they are."""
        return self.published() if self.predecessor is None else np.union1d(self.published(), self.left_behind())

    def left_behind(self) -> Int64s:
        """Rows whose block the predecessor has and this segment lacks."""
        had = np.zeros(0, dtype=np.int64) if self.predecessor is None else self.predecessor.available()
        return np.setdiff1d(had, self.published(), assume_unique=True)

    def without_room(self) -> Int64s:
        """Rows that belong here and have no place in the segment."""
        return np.array([row for row in self.placed().tolist() if not self.segment.holds(row)], dtype=np.int64)

    def rows_of(self, experts: Iterable[ExpertKey] | None) -> Int64s:
        """Manifest rows of these experts, or of all that belong here.

        Raises BlockUnavailable for an expert that the model lacks, InvalidInput for one that is placed elsewhere.
        """
        if experts is None:
            return self.placed()
        rows = sorted({self.manifest.index(*key) for key in experts})
        placed = set(self.placed().tolist())
        strangers = [row for row in rows if row not in placed and not self.segment.holds(row)]
        if strangers:
            layer, expert = self.manifest.keys[strangers[0]]
            raise InvalidInput(
                f"expert {expert} of layer {layer} is not placed on node {self.node_id}: restore it on "
                f"{', '.join(self.placement.nodes_of(strangers[0]))}"
            )
        return np.array(rows, dtype=np.int64)


NOTHING = {"manifest": False, "published": False, "sealed": False, "registered": False, "attachable": False}
"""The checks of a node that has no holding yet."""


def proofs_of(holding: Holding | None) -> tuple[int, datetime | None]:
    """How many published blocks were never proved, and when the oldest proof of all others was."""
    if holding is None:
        return 0, None
    published = holding.published()
    return holding.proofs.unproved(published), holding.proofs.oldest(published)

"""Where a block's bytes can come from, nearest first: this host's memory, a peer's memory, the checkpoint on disk.

One class a kind of place. A source brings the blocks of a batch to the places that the destination gives them, and says
nothing of whether they are right. It is an object with a name for people: two sources may have the same name.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from enum import StrEnum
from functools import partial
from typing import Protocol

from shm.block import HeldBlock
from shm.manifest import Manifest
from transfer.checkpoint.content import PinnedCheckpoint
from transfer.checkpoint.reader import BlockReader, position_on_disk
from transfer.destination import Destination, Resident
from transfer.engine import Copy, TransferEngine
from transfer.errors import CheckpointError, SomeLost, TransferFailed
from transfer.memory import populate, view
from transfer.plan import Batch, Limits, Piece, coalesce, in_pieces, sliced, split

LOCAL_LANES_MAX = 16
LOCAL_BATCH_NBYTES_MIN = 8 << 20
LOCAL_BATCH_NBYTES_MAX = 256 << 20
BATCHES_PER_LANE = 4  # so that no lane is left with much more to do than the others
PEER_LANES_MAX = 6  # 16 cores: 16 GB/s over loopback, 15 with 2 or 3
DISK_LANES_MAX = 16
DISK_BATCH_NBYTES = 64 << 20
RECALLED = "was recalled"


class SourceKind(StrEnum):
    LOCAL = "local"
    PEER = "peer"
    DISK = "disk"


class Source(Protocol):
    """One place that has blocks. `fetch` is called by up to `lanes` threads at a time."""

    def __hash__(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> SourceKind: ...
    @property
    def lanes(self) -> int: ...
    @property
    def limits(self) -> Limits: ...

    def fetch(self, batch: Batch, destination: Destination) -> Mapping[int, bytes]:
        """Bring the batch; the checksums of blocks that were taken meanwhile, by row.

        Raises SomeLost where some of its blocks came, and another HotspareError where any of them may be half-written.
        """
        ...

    def close(self) -> None:
        """Give up what it holds open. Called once, when the restore has ended."""
        ...


# -- this host's memory --------------------------------------------------------------------------------------------


class HeldMemory(Protocol):
    """Published blocks in this process's memory: a `shm.segment.Segment`, a `shm.attachment.Attachment`."""

    def held(self, rows: Iterable[int]) -> Mapping[int, HeldBlock]: ...


class HostMemory:
    """A segment of this host. Its owner may withdraw a block at any time, so that is asked before and after.

    A batch that is recalled ends between two pieces of it: what was taken is in place, and the others are not begun.
    """

    kind = SourceKind.LOCAL

    def __init__(
        self,
        name: str,
        memory: HeldMemory,
        *,
        lanes: int = LOCAL_LANES_MAX,
        limits: Limits = Limits(),  # noqa: B008 - it is frozen
        kept_by: tuple[memoryview, ...] = (),
        piece_nbytes: int = LOCAL_BATCH_NBYTES_MAX,
    ) -> None:
        """`kept_by` are views that keep the memory mapped, where having `memory` does not.

        `piece_nbytes` is how much is taken at a time, at least a block: little, where taking it means to send it.
        """
        self.name = name
        self.lanes = lanes
        self.limits = limits
        self._memory = memory
        self._kept_by = kept_by
        self._piece_nbytes = piece_nbytes

    def fetch(self, batch: Batch, destination: Destination) -> Mapping[int, bytes]:
        taken: dict[int, bytes] = {}
        lost: dict[int, str] = {}
        for piece in in_pieces(batch.wants, self._piece_nbytes):
            if batch.watch.is_recalled:
                lost |= dict.fromkeys((want.row for want in piece), RECALLED)
                continue
            held = self._memory.held(want.row for want in piece)
            here = [Resident(want, *held[want.row], self._kept_by) for want in piece if want.row in held]
            taken |= destination.take(here)
            batch.watch.arrived_nbytes += sum(block.want.nbytes for block in here)
        still = self._memory.held(taken)
        came = {row: checksum for row, checksum in taken.items() if row in still}
        if lost:
            raise SomeLost(lost, came)
        return came

    def close(self) -> None:
        """Nothing is open: the memory is not ours."""


def local_limits(total_nbytes: int, lanes: int, *, share_a_bus: bool = False) -> Limits:
    """Batches for so many bytes in all: large ones, but several for each lane.

    Lanes that share a bus end together anyway, and small batches leave it idle: they keep their size to the end.
    """
    share = total_nbytes // (lanes * BATCHES_PER_LANE)
    nbytes = max(LOCAL_BATCH_NBYTES_MIN, min(LOCAL_BATCH_NBYTES_MAX, share))
    return Limits(nbytes=nbytes, last_nbytes=nbytes) if share_a_bus else Limits(nbytes=nbytes)


# -- a peer's memory -----------------------------------------------------------------------------------------------

Move = Callable[[Batch, Destination], Mapping[int, bytes]]
"""A way to have a peer's blocks at the destination: reading them (`reading`), or asking the peer to write them."""


class PeerMemory:
    """A peer's memory."""

    kind = SourceKind.PEER

    def __init__(
        self,
        name: str,
        move: Move,
        *,
        lanes: int | None = None,
        limits: Limits = Limits(),  # noqa: B008
    ) -> None:
        self.name = name
        self.lanes = lanes or max(2, min(PEER_LANES_MAX, (os.cpu_count() or 2) // 2))
        self.limits = limits
        self._move = move

    def fetch(self, batch: Batch, destination: Destination) -> Mapping[int, bytes]:
        return self._move(batch, destination)

    def close(self) -> None:
        """Nothing is open: the engine, or the client, is not ours."""


def reading(engine: TransferEngine, session_id: str) -> Move:
    """Read blocks out of a peer's memory, through the transfer engine."""
    return partial(_read, engine, session_id)


def _read(engine: TransferEngine, session_id: str, batch: Batch, destination: Destination) -> Mapping[int, bytes]:
    address = {want.row: at for want, at in zip(batch.wants, batch.addresses, strict=True)}
    checksums: dict[int, bytes] = {}
    lost: dict[int, str] = {}
    for landing in destination.landings(batch.wants, in_one_run=False):
        with landing as landed:
            copies = [
                Copy(piece.destination, address[row] + piece.offset, piece.nbytes)
                for row, pieces in landed.pieces.items()
                for piece in pieces
            ]
            for call in split(sliced(coalesce(copies)), Limits()):
                for copy in call:
                    populate(copy.destination, copy.nbytes)
                try:
                    engine.read(session_id, call, batch.watch)
                except TransferFailed as error:
                    if not error.lost or (len(error.lost) == len(call) and not batch.watch.arrived_nbytes):
                        raise
                    lost |= dict.fromkeys(_rows_of([call[number] for number in error.lost], landed.pieces), str(error))
            checksums |= landed.settle({}, lost.keys())
    if lost:
        raise SomeLost(lost, checksums)
    return checksums


def _rows_of(copies: Sequence[Copy], pieces: Mapping[int, Sequence[Piece]]) -> list[int]:
    """The blocks that have a byte in one of these copies."""
    spans = [(copy.destination, copy.destination + copy.nbytes) for copy in copies]
    return [
        row
        for row, each in pieces.items()
        if any(start < p.destination + p.nbytes and p.destination < end for p in each for start, end in spans)
    ]


# -- the disk ------------------------------------------------------------------------------------------------------


class Disk:
    """A checkpoint's files. They are opened when first needed, and closed with the batch: most restores never do.

    A block that cannot be read costs no other: a disk has bad sectors, and one of its files may be gone.
    """

    kind = SourceKind.DISK

    def __init__(
        self,
        name: str,
        checkpoint: Callable[[], PinnedCheckpoint],
        *,
        lanes: int | None = None,
        limits: Limits = Limits(nbytes=DISK_BATCH_NBYTES),  # noqa: B008
    ) -> None:
        """`checkpoint` raises CheckpointError where there is none to be had."""
        self.name = name
        self.lanes = lanes or max(2, min(DISK_LANES_MAX, os.cpu_count() or 1))
        self.limits = limits
        self._find = checkpoint
        self._pinned: PinnedCheckpoint | None = None
        self._lock = threading.Lock()

    def fetch(self, batch: Batch, destination: Destination) -> Mapping[int, bytes]:
        pinned = self._found()
        checksums: dict[int, bytes] = {}
        lost: dict[int, str] = {}
        with closing(BlockReader(pinned.checkpoint, pinned.files)) as reader:
            for landing in destination.landings(batch.wants, in_one_run=True):
                with landing as landed:
                    taken: dict[int, bytes] = {}
                    for row, (piece,) in landed.pieces.items():
                        if batch.watch.is_recalled:
                            lost[row] = RECALLED
                            continue
                        try:
                            taken[row] = reader.read_block(row, view(piece.destination, piece.nbytes))
                        except CheckpointError as error:
                            lost[row] = str(error)
                        batch.watch.arrived_nbytes += piece.nbytes
                    checksums |= landed.settle(taken, lost.keys())
        if lost:
            raise SomeLost(lost, checksums)
        return checksums

    def _found(self) -> PinnedCheckpoint:
        with self._lock:
            if self._pinned is None:
                self._pinned = self._find()
            return self._pinned

    def close(self) -> None:
        """Nothing is open between two batches."""


def on_disk(manifest: Manifest, rows: Iterable[int]) -> dict[int, tuple[int, None]]:
    """What a checkpoint has of these rows, in terms of `transfer.offers`: a place to sort by, and no checksum."""
    return {row: (position_on_disk(manifest, row), None) for row in rows}

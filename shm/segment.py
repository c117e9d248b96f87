"""The owner's side of a segment: claim it, allocate it, fill its blocks, publish them, seal it.

    claim ──▶ CLAIMED ──allocate──▶ FILLING ──seal──▶ SEALED ──extend──▶ SEALED, with blocks still to fill
      └────── a sealed object of a dead owner ─────────▶┘

The object is never made shorter while it has a name: a reader that has it mapped would die of SIGBUS. To start over,
the name is unlinked and a new object takes it; readers of the old one keep their memory until they let go.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import xxhash

from shm import posix
from shm.block import HeldBlock
from shm.errors import (
    BlockUnavailable,
    ManifestError,
    SegmentBusy,
    SegmentCorrupt,
    SegmentError,
    SegmentForeign,
    SegmentNotFound,
    SegmentTruncated,
    SegmentUnsealed,
)
from shm.header import Header, corrupt
from shm.layout import (
    ENTRY,
    HEADER_NBYTES,
    SHM_DIRECTORY,
    STATE_OFFSET,
    BlockState,
    SegmentName,
    SegmentState,
    align,
    place_blocks,
    plan_segment,
)
from shm.lookup import read_header
from shm.manifest import Manifest
from shm.rules import check_table

CLAIM_ATTEMPTS_MAX = 16


@dataclass(frozen=True, slots=True)
class Extent:
    """One mapping of the object: bytes [start, end) of it lie at `address`."""

    start: int
    end: int
    address: int
    view: memoryview


class Segment:
    """A shared-memory object that this process owns. Not thread-safe but for `block`, `address` and `publish`."""

    def __init__(self, name: SegmentName, fd: int, header: Header) -> None:
        self.name = name
        self._fd = fd
        self._header = header
        self._manifest: Manifest | None = None
        self._table: npt.NDArray[np.void] = np.zeros(0, dtype=ENTRY)
        self._extents: list[Extent] = []

    # -- claiming --------------------------------------------------------------------------------------------

    @classmethod
    def claim(cls, name: SegmentName) -> Segment:
        """Own the segment of this name: the sealed one that a dead owner left, else a new, empty one.

        Raises SegmentBusy if a living process owns it, SegmentForeign or SegmentTooNew if the object there is not ours
        to remove, SegmentForbidden if it is another user's.
        """
        for _ in range(CLAIM_ATTEMPTS_MAX):
            try:
                fd, fresh = posix.create_exclusive(name.object_name), True
            except FileExistsError:
                try:
                    fd, fresh = posix.open_existing(name.object_name, read_only=False), False
                except SegmentNotFound:
                    continue  # it vanished in between
            try:
                segment = cls._take(name, fd, fresh)
            except BaseException:
                os.close(fd)
                raise
            if segment is not None:
                return segment
            os.close(fd)
        raise SegmentError(f"{SHM_DIRECTORY}/{name.object_name} keeps changing hands: is another daemon starting?")

    @classmethod
    def _take(cls, name: SegmentName, fd: int, fresh: bool) -> Segment | None:
        """Lock the open object and make it ours; None if it must be opened again."""
        if not posix.try_lock(fd):
            raise cls._busy(name, fd)
        if not posix.still_named(fd, name.object_name):
            return None
        if fresh or os.fstat(fd).st_size == 0:
            return cls._start(name, fd)
        header = cls._adoptable_header(name, fd)
        if header is None:
            posix.unlink(name.object_name)
            return None
        segment = cls(name, fd, replace(header, owner_pid=os.getpid()))
        try:
            segment._open_content()
        except (ManifestError, SegmentCorrupt):  # what the header leads to is not right: nobody can attach either
            posix.unlink(name.object_name)
            return None
        segment._write_header()
        return segment

    @classmethod
    def _start(cls, name: SegmentName, fd: int) -> Segment:
        now = time.time_ns()
        segment = cls(name, fd, Header(name, SegmentState.CLAIMED, now, os.getpid(), now, 0))
        try:
            posix.reserve(fd, 0, HEADER_NBYTES)
        except BaseException:
            posix.unlink(name.object_name)
            raise
        segment._write_header()
        return segment

    @staticmethod
    def _busy(name: SegmentName, fd: int) -> SegmentBusy:
        try:
            pid = read_header(fd, name.object_name).owner_pid
        except SegmentError:
            pid = 0  # its owner has not written the header yet
        return SegmentBusy(
            f"{name} is owned by process {pid or 'unknown'}, which is alive: stop it, or give this node "
            "another --node-id or --namespace",
            pid,
        )

    @staticmethod
    def _adoptable_header(name: SegmentName, fd: int) -> Header | None:
        """The header of a sealed object of ours; None for one that its owner left half-made."""
        try:
            header = read_header(fd, name.object_name)
        except (SegmentCorrupt, SegmentTruncated, SegmentUnsealed):
            return None
        if header.name != name:
            raise SegmentForeign(f"{SHM_DIRECTORY}/{name.object_name} is the segment of {header.name}, not of {name}")
        return header if header.state is SegmentState.SEALED else None

    # -- allocating ------------------------------------------------------------------------------------------

    def allocate(self, manifest: Manifest, rows: Iterable[int]) -> None:
        """Reserve the space for these manifest rows. Raises SharedMemoryFull, and is then as before."""
        if self._header.state is not SegmentState.CLAIMED:
            raise SegmentError(f"{self.name} is allocated already: start over with `renew`")
        plan = plan_segment(manifest, rows)
        posix.reserve(self._fd, HEADER_NBYTES, plan.total_nbytes)
        os.pwrite(self._fd, manifest.to_bytes(), plan.manifest_offset)
        os.pwrite(self._fd, plan.table.tobytes(), plan.table_offset)
        self._header = replace(
            self._header,
            state=SegmentState.FILLING,
            manifest_offset=plan.manifest_offset,
            manifest_nbytes=plan.manifest_nbytes,
            table_offset=plan.table_offset,
            table_nbytes=plan.table_nbytes,
            data_offset=plan.data_offset,
            data_nbytes=plan.total_nbytes - plan.data_offset,
            total_nbytes=plan.total_nbytes,
            manifest_digest=bytes.fromhex(manifest.digest),
        )
        self._write_header()
        self._open_content()

    def extend(self, rows: Iterable[int]) -> None:
        """Reserve space for more rows behind what is there, which readers keep reading meanwhile."""
        start = align(self._header.total_nbytes)
        missing = [row for row in rows if self._table["state"][row] == BlockState.ABSENT]
        if not missing:
            return
        placed, offsets, end = place_blocks(self.manifest, missing, start)
        posix.reserve(self._fd, start, end)
        self._map_extent(start, end)
        # The header first: who adopts this after a crash in between finds space unused, and no entry that points
        # past the end.
        self._header = replace(self._header, data_nbytes=end - self._header.data_offset, total_nbytes=end)
        self._write_header()
        self._table["offset"][placed] = offsets
        self._table["nbytes"][placed] = self.manifest.nbytes[placed]
        self._table["state"][placed] = BlockState.RESERVED

    def renew(self) -> Segment:
        """Give this object up, name and all, and claim an empty one.

        Readers keep what they have mapped, and so does whoever has this `Segment`: it can be read for as long as it is
        held, and owns nothing any more.
        """
        posix.unlink(self.name.object_name)
        self._disown()
        return Segment.claim(self.name)

    def _open_content(self) -> None:
        self._map_extent(0, self._header.total_nbytes)
        view = self._extents[0].view
        header = self._header
        raw = view[header.manifest_offset : header.manifest_offset + header.manifest_nbytes]
        self._manifest = Manifest.from_bytes(raw, header.manifest_digest.hex())
        table = np.frombuffer(view, ENTRY, header.table_nbytes // ENTRY.itemsize, header.table_offset)
        check_table(table, self._manifest, header, f"{SHM_DIRECTORY}/{self.name.object_name}")
        self._table = table

    def _map_extent(self, start: int, end: int) -> None:
        mapping = mmap.mmap(self._fd, end - start, offset=start)
        for advice in ("MADV_HUGEPAGE", "MADV_DONTDUMP"):  # both only advice: an old kernel may refuse
            try:
                mapping.madvise(getattr(mmap, advice))
            except (AttributeError, OSError):
                continue
        view = memoryview(mapping)
        address = np.frombuffer(view, np.uint8).ctypes.data
        self._extents.append(Extent(start, end, address, view))

    def _write_header(self) -> None:
        """The page first, with the state that is there; then the state alone."""
        page = self._header.pack()
        os.pwrite(self._fd, page[:STATE_OFFSET], 0)
        os.pwrite(self._fd, page[STATE_OFFSET + 4 :], STATE_OFFSET + 4)
        os.pwrite(self._fd, page[STATE_OFFSET : STATE_OFFSET + 4], STATE_OFFSET)

    # -- what is there ---------------------------------------------------------------------------------------

    @property
    def header(self) -> Header:
        return self._header

    @property
    def state(self) -> SegmentState:
        return self._header.state

    @property
    def manifest(self) -> Manifest:
        if self._manifest is None:
            raise SegmentUnsealed(f"{self.name} has no content yet")
        return self._manifest

    @property
    def is_allocated(self) -> bool:
        return self._manifest is not None

    @property
    def nbytes(self) -> int:
        """Bytes of the whole object."""
        return self._header.total_nbytes

    def data_ranges(self) -> list[tuple[int, int]]:
        """(address, nbytes) of the blocks' memory, header and table left out: what a transfer engine may serve."""
        starts = [max(e.start, self._header.data_offset) for e in self._extents]
        return [
            (e.address + start - e.start, e.end - start)
            for e, start in zip(self._extents, starts, strict=True)
            if start < e.end
        ]

    def mappings(self) -> tuple[memoryview, ...]:
        """Views of all its memory: while they live, its addresses stay mapped, whatever becomes of the segment."""
        return tuple(extent.view for extent in self._extents)

    def rows(self, *states: BlockState) -> npt.NDArray[np.int64]:
        """Ascending manifest rows whose block is in one of these states."""
        return np.flatnonzero(np.isin(self._table["state"], states))

    def holds(self, row: int) -> bool:
        """Whether space is reserved for the row, in whatever state its block is."""
        return bool(self._table["state"][row] != BlockState.ABSENT)

    def published(self) -> npt.NDArray[np.int64]:
        return self.rows(BlockState.PUBLISHED)

    def held(self, rows: Iterable[int]) -> dict[int, HeldBlock]:
        """Of these manifest rows those whose block is published here."""
        states = self._table["state"]
        here = [row for row in rows if row < len(states) and states[row] == BlockState.PUBLISHED]
        return {row: HeldBlock(self.address(row), self.checksum(row)) for row in here}

    def fingerprint(self) -> str:
        """Of the block table, hex: another one whenever a block was published, hidden or given other content."""
        return xxhash.xxh3_64_hexdigest(self._table.tobytes())

    def checksum(self, row: int) -> bytes:
        """The checksum recorded when the block was last published; 16 zero bytes if it never was."""
        return bytes(self._table["checksum"][row])

    def _place(self, row: int) -> tuple[Extent, int, int]:
        entry = self._table[row]
        if entry["state"] == BlockState.ABSENT:
            raise BlockUnavailable(f"{self.name} has no space for {self.manifest.keys[row]}")
        offset, nbytes = int(entry["offset"]), int(entry["nbytes"])
        for extent in reversed(self._extents):
            if extent.start <= offset and offset + nbytes <= extent.end:
                return extent, offset - extent.start, nbytes
        raise corrupt(str(self.name), f"the place of {self.manifest.keys[row]} has changed and lies outside it")

    def address(self, row: int) -> int:
        """Where the block lies in this process's memory."""
        extent, offset, _ = self._place(row)
        return extent.address + offset

    def block(self, row: int) -> memoryview:
        """The block's bytes, writable."""
        extent, offset, nbytes = self._place(row)
        return extent.view[offset : offset + nbytes]

    # -- publishing ------------------------------------------------------------------------------------------

    def publish(self, row: int, checksum: bytes) -> None:
        """Let readers find the block. Only after its bytes matched the checksum."""
        self._table["checksum"][row] = checksum
        self._table["state"][row] = BlockState.PUBLISHED

    def quarantine(self, row: int) -> None:
        """Hide a block whose bytes are wrong or about to be written; its checksum stays on record."""
        self._table["state"][row] = BlockState.QUARANTINED

    def seal(self) -> None:
        """Let readers attach. Raises SegmentError while a block that has a place is not published."""
        waiting = self.rows(BlockState.RESERVED, BlockState.QUARANTINED)
        if len(waiting):
            key = self.manifest.keys[int(waiting[0])]
            raise SegmentError(f"{self.name} cannot be sealed: {len(waiting)} blocks are not published, first {key}")
        if self._header.state is not SegmentState.SEALED:
            self._header = replace(self._header, state=SegmentState.SEALED, sealed_ns=time.time_ns())
            self._write_header()

    def record_origin(self, origin: bytes) -> None:
        """Remember which checkpoint files (16 bytes of identity) the content came from or was compared with."""
        self._header = replace(self._header, origin=origin)
        self._write_header()

    # -- letting go ------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Give up ownership; the object stays. Mappings end when the last view of them does."""
        self._extents.clear()
        self._table = np.zeros(0, dtype=ENTRY)
        self._manifest = None
        self._disown()

    def _disown(self) -> None:
        if self._fd >= 0:
            posix.unlock(self._fd)
            os.close(self._fd)
            self._fd = -1

    def unlink(self) -> None:
        """Remove the name, then close."""
        if self._fd >= 0 and posix.still_named(self._fd, self.name.object_name):
            posix.unlink(self.name.object_name)
        self.close()

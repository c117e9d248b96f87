"""The owner's side of a segment: claim it, allocate it, fill its blocks, publish them, seal it.

    claim ──▶ CLAIMED ──allocate──▶ FILLING ──seal──▶ SEALED ──extend──▶ SEALED, with blocks still to fill
      └────── a sealed object of a dead owner ─────────▶┘

The object is never made shorter while it has a name: a reader that has it mapped would die of SIGBUS. To start over,
the name is unlinked and a new object takes it; readers of the old one keep their memory until they let go. Where the
old one is still good, the new one has its room before that (`succeed`): a shortage costs nobody anything.

Others may do to the object what they may do to any file: unlink it, cut it short, change its mode. `reader_problem`
says what of that a reader would stumble over, and `mend` puts right what can be.

What an owner knows of its segment it keeps in memory of its own, and the object has it twice: what is damaged there is
written anew, when the segment is adopted and whenever `mend` is called.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xxhash

from shm import posix
from shm.block import HeldBlock
from shm.checksum import CHECKSUM_NBYTES, checksum
from shm.errors import (
    BlockUnavailable,
    InvalidInput,
    SegmentBusy,
    SegmentCorrupt,
    SegmentError,
    SegmentForeign,
    SegmentNotFound,
    SegmentTooNew,
    SegmentUnsealed,
)
from shm.extents import Extents
from shm.header import Header
from shm.layout import (
    ENTRY,
    MANIFEST_OFFSET,
    SHM_DIRECTORY,
    BlockState,
    Entries,
    Int64s,
    SegmentName,
    SegmentState,
    absent_entries,
    align,
    place_blocks,
    plan_segment,
)
from shm.lookup import read_header, read_manifest
from shm.manifest import Manifest
from shm.rules import check_entries
from shm.table import BlockTable, read_entries, table_copies
from shm.twin import Twin

CLAIM_ATTEMPTS_MAX = 16

READ_NBYTES = 1 << 20  # at a time, of a block that is read and not mapped

_NO_TABLE = BlockTable(np.zeros(0, dtype=ENTRY), ())
_NO_MANIFESTS = Twin("manifest", b"", MANIFEST_OFFSET)


@dataclass(frozen=True, slots=True)
class Damage:
    """What in an object was not as its owner had written it."""

    parts: tuple[str, ...] = ()
    """Of "header", "second header", "manifest" and "second manifest" those that were written anew."""
    rows: tuple[int, ...] = ()
    """Manifest rows whose entry in the block table was written anew."""
    lost: tuple[int, ...] = ()
    """Those of them that were right in no copy: their blocks are absent now, and `extend` makes room for them."""
    cut_off: tuple[int, ...] = ()
    """Rows whose block lost bytes as somebody cut the object short: they are hidden now."""

    def __bool__(self) -> bool:
        return bool(self.parts or self.rows or self.cut_off)


class Segment:
    """A shared-memory object that this process owns. Thread-safe are `block`, `address`, `publish` and `quarantine`."""

    def __init__(self, name: SegmentName, fd: int, header: Header) -> None:
        self.name = name
        self._fd = fd
        self._identity = posix.identity(fd)
        self._header = header
        self._manifest: Manifest | None = None
        self._manifests = _NO_MANIFESTS
        self._table = _NO_TABLE
        self._extents = Extents(mmap.PROT_READ | mmap.PROT_WRITE)
        self._served = Extents(mmap.PROT_READ)
        self._heading = threading.Lock()
        """Held while a header is written: in memory, so for a moment."""
        self.found = Damage()
        """What was damaged when this process adopted it."""

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
        segment = cls(name, fd, header)
        try:
            segment.found = segment._adopt()
        except SegmentCorrupt:  # what the header leads to is not right: nobody can attach either
            posix.unlink(name.object_name)
            return None
        segment._write_header(owner_pid=os.getpid())
        return segment

    @classmethod
    def _start(cls, name: SegmentName, fd: int) -> Segment:
        now = time.time_ns()
        segment = cls(name, fd, Header(name, SegmentState.CLAIMED, now, os.getpid(), now, 0))
        try:
            posix.reserve(fd, 0, MANIFEST_OFFSET)
        except BaseException:
            if posix.still_named(fd, name.object_name):  # else it is one of `succeed`, and another has the name
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
        except (SegmentForeign, SegmentTooNew):
            raise
        except SegmentError:  # damaged, cut short, without a header, or of a format that is no longer read
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
        posix.reserve(self._fd, MANIFEST_OFFSET, plan.total_nbytes)
        self._use_manifest(manifest)
        self._manifests.write(self._fd)
        Twin("table", plan.table.tobytes(), plan.table_offset).write(self._fd)
        self._write_header(
            state=SegmentState.FILLING,
            manifest_offset=MANIFEST_OFFSET,
            manifest_nbytes=plan.manifest_nbytes,
            table_offset=plan.table_offset,
            table_nbytes=plan.table_nbytes,
            data_offset=plan.data_offset,
            data_nbytes=plan.total_nbytes - plan.data_offset,
            total_nbytes=plan.total_nbytes,
            manifest_digest=bytes.fromhex(manifest.digest),
        )
        self._extents.cover(self._fd, plan.total_nbytes)
        self._table = BlockTable(plan.table, self._table_copies())

    def _use_manifest(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._manifests = Twin("manifest", manifest.to_bytes(), MANIFEST_OFFSET)

    def extend(self, rows: Iterable[int]) -> None:
        """Reserve space for more rows behind what is there, which readers keep reading meanwhile."""
        start = align(self._header.total_nbytes)
        missing = [row for row in rows if self._table.entries["state"][row] == BlockState.ABSENT]
        if not missing:
            return
        placed, offsets, end = place_blocks(self.manifest, missing, start)
        posix.reserve(self._fd, start, end)
        self._extents.cover(self._fd, end)
        # The header first: who adopts this after a crash in between finds space unused, and no entry that points
        # past the end.
        self._write_header(data_nbytes=end - self._header.data_offset, total_nbytes=end)
        self._table.place(placed, offsets, self.manifest.nbytes[placed])

    def renew(self) -> Segment:
        """Give this object up, name and all, and claim an empty one.

        Readers keep what they have mapped, and so does whoever has this `Segment`: it can be read for as long as it is
        held, and owns nothing any more.
        """
        self.give_up()
        return Segment.claim(self.name)

    def give_up(self) -> None:
        """Own the object no longer, nor its name. What is mapped can be read for as long as this `Segment` is held."""
        self._unname()
        self._disown()

    def succeed(self, manifest: Manifest, rows: Iterable[int]) -> Segment:
        """Another segment of this name, with room for these rows; this one is given up once that is there.

        Until then the new object has no name: killed at any point, this leaves the old one or the new one and nothing
        else. Raises SharedMemoryFull and whatever else keeps it from being made, and is then as before.
        """
        fd = posix.create_unnamed()
        try:
            posix.try_lock(fd)
            successor = Segment._start(self.name, fd)
            successor.allocate(manifest, rows)
            self._unname()
            posix.name(fd, self.name.object_name)
            successor._open_by_name()
        except FileExistsError as error:
            raise SegmentError(f"{self.name} was taken by another process just now: see `hotspare ls`") from error
        finally:
            os.close(fd)
        self._disown()
        return successor

    def _open_by_name(self) -> None:
        """Own it through a descriptor of its name: one that was opened without tells nobody whose memory it is."""
        fd = posix.open_existing(self.name.object_name, read_only=False)
        posix.unlock(self._fd)
        if posix.identity(fd) != self._identity or not posix.try_lock(fd):
            os.close(fd)
            raise SegmentError(f"{self.name} was taken by another process just now: see `hotspare ls`")
        self._fd = fd
        self._map_anew()

    def _map_anew(self) -> None:
        """In one mapping; nobody may have an address of before."""
        self._extents.clear()
        self._extents.cover(self._fd, self._header.total_nbytes)
        self._table = BlockTable(self._table.entries, self._table_copies())

    def _unname(self) -> None:
        """Unlink the name if it leads to this object: it may have been lost, and be another owner's now."""
        if self._fd >= 0 and posix.still_named(self._fd, self.name.object_name):
            posix.unlink(self.name.object_name)

    def _table_copies(self) -> tuple[Entries, ...]:
        return table_copies(self._extents.views()[0], self._header.table_offset, self._header.table_nbytes)

    def _adopt(self) -> Damage:
        """Take over all that is right, and write anew what is not. Raises SegmentCorrupt if nothing can be kept."""
        header, where = self._header, f"{SHM_DIRECTORY}/{self.name.object_name}"
        self._extents.cover(self._fd, header.total_nbytes)
        manifest = read_manifest(self._extents.views()[0], header, where)
        self._use_manifest(manifest)
        copies = self._table_copies()
        entries, lost = read_entries(copies, np.arange(len(manifest)))
        check_entries(entries, lost, manifest, header, where)
        entries[lost] = absent_entries(np.flatnonzero(lost))
        self._table = BlockTable(entries, copies)
        damage = replace(self.mend(), lost=tuple(np.flatnonzero(lost).tolist()))
        if not damage.lost:  # else one of the places that nothing is known of may be the last
            self._cut_off_unused()
        return damage

    def _cut_off_unused(self) -> None:
        """Free the pages behind the last block: an owner that was killed while it extended the segment left them.

        The object stays as long as it is. Who reads it by an earlier header is led to none of them by any entry.
        """
        header, entries = self._header, self._table.entries
        is_placed = entries["state"] != BlockState.ABSENT
        ends = entries["offset"][is_placed] + entries["nbytes"][is_placed]
        end = align(int(ends.max(initial=header.data_offset)))
        posix.give_back(self._fd, align(end, mmap.PAGESIZE), os.fstat(self._fd).st_size)
        if end < header.total_nbytes:
            self._write_header(total_nbytes=end, data_nbytes=end - header.data_offset)
            self._map_anew()  # `extend` goes on there, and no block may lie in two mappings

    def drop_unfilled(self, rows: Iterable[int]) -> None:
        """Give back the room of those of these rows whose block never was here."""
        for row in np.intersect1d(np.fromiter(rows, np.int64), self.rows(BlockState.RESERVED)).tolist():
            offset, nbytes = self._place(row)
            self._table.drop(row)
            start, end = align(offset, mmap.PAGESIZE), align(offset + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
            posix.give_back(self._fd, start, end)

    def _header_pages(self) -> Twin:
        return _pages_of(self._header)

    def _write_header(self, **changes: Any) -> None:
        """Readers first: what this process says of the object, they find there."""
        with self._heading:
            header = replace(self._header, **changes)
            _pages_of(header).write(self._fd)
            self._header = header

    # -- proving what leads to the blocks ---------------------------------------------------------------------

    def damaged(self) -> Int64s:
        """Ascending manifest rows whose entry in the block table is not as it was written, in one copy or both."""
        return self._table.damaged()

    def mend(self) -> Damage:
        """Write anew what is damaged of all that leads to the blocks, and say what was. The blocks are not looked at.

        An object that was cut short has its length again after that. Raises SharedMemoryFull where it cannot have it.
        For any thread, whatever others do with the segment; one that has no content, or is given up, has no damage.
        """
        cut_off = self._regrow()
        with self._heading:
            if self._fd < 0 or self._manifest is None:
                return Damage()
            parts = self._header_pages().mend(self._fd) + self._manifests.mend(self._fd)
        return Damage(tuple(parts), tuple(self._table.mend().tolist()), cut_off=cut_off)

    def _regrow(self) -> tuple[int, ...]:
        """Give an object that was cut short its length again, and hide the blocks that lost bytes by that; their rows.

        First of all, for whoever touches a page behind the end dies of SIGBUS.
        """
        with self._own_descriptor() as fd:
            whole = self._header.total_nbytes
            if fd < 0 or (there := os.fstat(fd).st_size) >= whole:
                return ()
            posix.reserve(fd, there // mmap.PAGESIZE * mmap.PAGESIZE, whole)
        entries = self._table.entries
        ends = entries["offset"] + entries["nbytes"]
        rows: list[int] = np.flatnonzero((entries["state"] == BlockState.PUBLISHED) & (ends > there)).tolist()
        for row in rows:
            self._table.hide(row)
        return tuple(rows)

    @contextmanager
    def _own_descriptor(self) -> Iterator[int]:
        """A descriptor that stays this object's whatever other threads do with the segment; -1 once it is given up."""
        with self._heading:
            fd = os.dup(self._fd) if self._fd >= 0 else -1
        try:
            yield fd
        finally:
            if fd >= 0:
                os.close(fd)

    def reader_problem(self) -> str | None:
        """Why nobody could attach to what this segment's name leads to; None if its header and its manifest are found.

        Looks at the object and not at what is known here, as a reader does. Takes about a millisecond.
        """
        object_name = self.name.object_name
        try:
            fd = posix.open_existing(object_name, read_only=True)
        except SegmentError as error:
            return str(error)
        try:
            if not posix.still_named(fd, object_name) or posix.identity(fd) != self._identity:
                return f"{SHM_DIRECTORY}/{object_name} is another object now: see `hotspare ls`"
            read_header(fd, object_name)
            if self._manifest is not None and not self._manifests.is_whole(fd):
                return f"{SHM_DIRECTORY}/{object_name}: its manifest is damaged in both copies"
        except SegmentError as error:
            return str(error)
        finally:
            os.close(fd)
        return None

    def is_named(self) -> bool:
        """Whether its name leads to it."""
        with self._own_descriptor() as fd:
            return fd >= 0 and posix.still_named(fd, self.name.object_name)

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
        return self._extents.ranges(self._header.data_offset)

    def served_ranges(self) -> list[tuple[int, int]]:
        """The same memory at other, read-only addresses: a transfer engine given these refuses whoever would write."""
        self._served.cover(self._fd, self._extents.end)
        return self._served.ranges(self._header.data_offset)

    def mappings(self) -> tuple[memoryview, ...]:
        """Views of all its memory: while they live, its addresses stay mapped, whatever becomes of the segment."""
        return (*self._extents.views(), *self._served.views())

    def rows(self, *states: BlockState) -> Int64s:
        """Ascending manifest rows whose block is in one of these states."""
        return np.flatnonzero(np.isin(self._table.entries["state"], states))

    def holds(self, row: int) -> bool:
        """Whether space is reserved for the row, in whatever state its block is."""
        return bool(self._table.entries["state"][row] != BlockState.ABSENT)

    def published(self) -> Int64s:
        return self.rows(BlockState.PUBLISHED)

    def held(self, rows: Iterable[int]) -> dict[int, HeldBlock]:
        """Of these manifest rows those whose block is published here."""
        return {row: HeldBlock(self.address(row), self.checksum(row)) for row in self._of_these(rows)}

    def served(self, rows: Iterable[int]) -> dict[int, HeldBlock]:
        """The same, at their addresses in `served_ranges`."""
        return {row: HeldBlock(self.served_address(row), self.checksum(row)) for row in self._of_these(rows)}

    def _of_these(self, rows: Iterable[int]) -> list[int]:
        """Those of the rows whose block is published."""
        states = self._table.entries["state"]
        return [row for row in rows if row < len(states) and states[row] == BlockState.PUBLISHED]

    def fingerprint(self) -> str:
        """Of the block table, hex: another one whenever a block was published, hidden or given other content."""
        return xxhash.xxh3_64_hexdigest(self._table.entries.tobytes())

    def checksum(self, row: int) -> bytes:
        """The checksum recorded when the block was last published; 16 zero bytes if it never was."""
        return bytes(self._table.entries["checksum"][row])

    def _place(self, row: int) -> tuple[int, int]:
        # As a tuple, for it is asked several times a block: field by field it takes three times as long.
        offset, nbytes, _, state, *_ = self._table.entries[row].tolist()
        if state == BlockState.ABSENT:
            raise BlockUnavailable(f"{self.name} has no space for {self.manifest.keys[row]}")
        return offset, nbytes

    def address(self, row: int) -> int:
        """Where the block lies in this process's memory."""
        return self._extents.address(*self._place(row))

    def served_address(self, row: int) -> int:
        """Where the block lies in `served_ranges`."""
        self.served_ranges()
        return self._served.address(*self._place(row))

    def block(self, row: int) -> memoryview:
        """The block's bytes, writable."""
        return self._extents.view(*self._place(row))

    def read_checksum(self, row: int) -> bytes | None:
        """Take the checksum of the block's bytes as they are in the object; None if the object ends before them.

        They are read, not mapped: somebody may be cutting the object short, and touching such a page is SIGBUS.
        """
        offset, nbytes = self._place(row)
        with self._own_descriptor() as fd:
            if fd < 0:  # no longer anybody's to cut short
                return checksum(self.block(row))
            taken, buffer = xxhash.xxh3_128(), memoryview(bytearray(min(READ_NBYTES, nbytes)))
            while nbytes:
                if not (read := os.preadv(fd, [buffer[:nbytes]], offset)):
                    return None
                taken.update(buffer[:read])
                offset, nbytes = offset + read, nbytes - read
        return taken.digest()

    # -- publishing ------------------------------------------------------------------------------------------

    def publish(self, row: int, checksum: bytes) -> None:
        """Let readers find the block. Only after its bytes matched the checksum. Raises BlockUnavailable."""
        self._place(row)
        self._table.publish(row, checksum)

    def quarantine(self, row: int) -> None:
        """Hide a block whose bytes are wrong or about to be written; its checksum stays. Raises BlockUnavailable."""
        self._place(row)
        self._table.hide(row)

    def seal(self) -> None:
        """Let readers attach. Raises SegmentError while a block that has a place is not published."""
        waiting = self.rows(BlockState.RESERVED, BlockState.QUARANTINED)
        if len(waiting):
            key = self.manifest.keys[int(waiting[0])]
            raise SegmentError(f"{self.name} cannot be sealed: {len(waiting)} blocks are not published, first {key}")
        if self._header.state is not SegmentState.SEALED:
            self._write_header(state=SegmentState.SEALED, sealed_ns=time.time_ns())

    def record_origin(self, origin: bytes) -> None:
        """Remember which checkpoint files (16 bytes of identity) the content came from or was compared with."""
        self._write_header(origin=origin)

    def record_content(self, digest: bytes) -> None:
        """Remember the identity (16 bytes) of the content's bytes."""
        if len(digest) != CHECKSUM_NBYTES:
            raise InvalidInput(f"a content digest of {len(digest)} bytes: give {CHECKSUM_NBYTES}")
        self._write_header(content_digest=digest)

    # -- letting go ------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Give up ownership; the object stays. Mappings end when the last view of them does."""
        self._extents.clear()
        self._served.clear()
        self._table = _NO_TABLE
        self._manifest = None
        self._disown()

    def _disown(self) -> None:
        with self._heading:
            if self._fd >= 0:
                posix.unlock(self._fd)
                os.close(self._fd)
                self._fd = -1

    def unlink(self) -> None:
        """Remove the name, then close."""
        self._unname()
        self.close()


def _pages_of(header: Header) -> Twin:
    return Twin("header", header.pack(), 0)

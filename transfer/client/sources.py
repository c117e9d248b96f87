"""Where the blocks of a rank's slots come from: `transfer.sources`, with slots as the destination.

Each takes the checksum of what it brought, block by block, and leaves a block out that it could not bring whole: the
restore then asks the next source. None lets an exception out that is not a HotspareError.
"""

from __future__ import annotations

import ctypes
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence

from shm.attachment import Attachment
from shm.block import TENSOR_ALIGNMENT
from shm.errors import BlockUnavailable, HotspareError
from transfer.engine import Copy, TransferEngine
from transfer.errors import TransferFailed
from transfer.memory import view
from transfer.plan import Batch, Limits, Want, coalesce, split
from transfer.slots.host import SlotMemory
from transfer.slots.staging import Staging
from transfer.slots.table import SlotTable
from transfer.sources import DiskSource, SourceKind

LOCAL_LANES_MAX = 16
LOCAL_BATCH_NBYTES_MIN = 8 << 20
LOCAL_BATCH_NBYTES_MAX = 256 << 20
BATCHES_PER_LANE = 4  # so that no lane is left with much more to do than the others
PEER_LANES_MAX = 6  # 16 cores: 16 GB/s over loopback, 15 with 2 or 3
DISK_LANES_MAX = 16
STRAIGHT_BATCH_NBYTES = 96 << 20
ITEM_NBYTES_MAX = 8 << 20  # TCP moves the items of a batch side by side, and each item through one connection


def want_of(row: int, nbytes: int, expected: bytes | None) -> Want:
    """A block for the slots of its row. It has no pieces: the sources here find them in the slot table."""
    return Want(row, nbytes, (), expected)


class SlotDestination:
    """The slots as a restore sees them; tells `done` of each block that is in place and right."""

    def __init__(self, memory: SlotMemory, table: SlotTable, done: Callable[[], None]) -> None:
        self._memory = memory
        self._table = table
        self._done = done

    def begin(self, want: Want) -> None:
        """Nothing: a slot is not good until the report says so."""

    def checksum(self, want: Want) -> bytes:
        """Asked for blocks that a source left out, and once more for blocks that late bytes may have reached."""
        if want.checksum is None or not self._table.is_whole(want.row):
            raise BlockUnavailable("it was withdrawn while it was being copied")
        return self._memory.check(want.row)

    def publish(self, want: Want, checksum: bytes) -> None:
        self._done()


class SlotSource(ABC):
    """What the three have in common."""

    kind: SourceKind
    writes = True

    def __init__(self, name: str, memory: SlotMemory, lanes: int, limits: Limits) -> None:
        self.name = name
        self.lanes = lanes
        self.limits = limits
        self._memory = memory

    def fetch(self, batch: Batch) -> Mapping[int, bytes]:
        try:
            return self._fetch(batch.wants)
        except HotspareError:
            raise
        except Exception as error:  # an engine must survive whatever its sources do
            raise TransferFailed(f"{type(error).__name__}: {error}") from error

    @abstractmethod
    def _fetch(self, wants: Sequence[Want]) -> Mapping[int, bytes]: ...

    def close(self) -> None:  # noqa: B027 - most hold nothing open
        """Give up what it holds open."""


class LocalSlots(SlotSource):
    """An attached segment of this host. Its owner may withdraw a block at any time, so that is asked before and after.

    With `staging` blocks pass through it: for a device, where the segment could not be page-locked.
    """

    kind = SourceKind.LOCAL

    def __init__(
        self, name: str, attachment: Attachment, memory: SlotMemory, total_nbytes: int, staging: Staging | None = None
    ) -> None:
        """`total_nbytes` is how much it will be asked for."""
        lanes = max(2, min(LOCAL_LANES_MAX, memory.lanes))
        batch = max(LOCAL_BATCH_NBYTES_MIN, min(LOCAL_BATCH_NBYTES_MAX, total_nbytes // (lanes * BATCHES_PER_LANE)))
        super().__init__(name, memory, lanes, Limits(nbytes=staging.capacity if staging else batch))
        self._attachment = attachment
        self._staging = staging

    def _fetch(self, wants: Sequence[Want]) -> Mapping[int, bytes]:
        held = self._attachment.held(want.row for want in wants)
        here = {want: held[want.row].address for want in wants if want.row in held}
        if self._staging is None:
            checksums = self._memory.put([(want.row, address) for want, address in here.items()])
        else:
            checksums = {}
            for group in _groups(list(here), self._staging.nbytes):
                checksums |= self._through(self._staging, {want: here[want] for want in group})
        still = self._attachment.held(checksums)
        return {row: checksum for row, checksum in checksums.items() if row in still}

    def _through(self, staging: Staging, here: Mapping[Want, int]) -> dict[int, bytes]:
        with staging.take() as buffer:
            placed = _packed(buffer.address, list(here))
            for (_, to), (want, address) in zip(placed, here.items(), strict=True):
                ctypes.memmove(to, address, want.nbytes)
            return self._memory.put(placed)


class PeerSlots(SlotSource):
    """A peer's memory, by way of the transfer engine: straight into slots that allow it, else through staging.

    Straight only with `is_straight`: the slots are registered, and `engine` can be thrown away after a peer timed out,
    for otherwise that peer's bytes might arrive in a slot that has long had another expert.
    """

    kind = SourceKind.PEER

    def __init__(
        self,
        name: str,
        session_id: str,
        addresses: Mapping[int, int],
        engine: TransferEngine,
        memory: SlotMemory,
        table: SlotTable,
        staging: Staging,
        *,
        is_straight: bool,
    ) -> None:
        lanes = max(2, min(PEER_LANES_MAX, (os.cpu_count() or 2) // 2))
        super().__init__(name, memory, lanes, Limits(nbytes=min(staging.capacity, STRAIGHT_BATCH_NBYTES)))
        self.session_id = session_id
        self.timed_out = False
        self._addresses = addresses
        self._engine = engine
        self._table = table
        self._staging = staging
        self._is_straight = is_straight

    def _fetch(self, wants: Sequence[Want]) -> Mapping[int, bytes]:
        direct: list[Want] = []
        staged: list[Want] = []
        for want in wants:
            (direct if self._is_straight and self._table.is_direct(want.row) else staged).append(want)
        checksums = self._straight(direct) if direct else {}
        for group in _groups(staged, self._staging.nbytes):
            checksums |= self._through(group)
        return checksums

    def _straight(self, wants: Sequence[Want]) -> dict[int, bytes]:
        copies = [
            Copy(copy.address, self._addresses[want.row] + copy.block_offset, copy.run_nbytes)
            for want in wants
            for copy in self._table.by_slot(want.row)[0]
        ]
        try:
            self._read(copies)
        except TransferFailed as error:
            self.timed_out |= error.timed_out
            raise
        for want in wants:
            self._memory.spread(want.row)
        return {want.row: self._memory.check(want.row) for want in wants}

    def _through(self, wants: Sequence[Want]) -> dict[int, bytes]:
        self._staging.prepare(self._engine)
        with self._staging.take() as buffer:
            placed = _packed(buffer.address, wants)
            copies = [
                Copy(to, self._addresses[row], want.nbytes) for (row, to), want in zip(placed, wants, strict=True)
            ]
            try:
                self._read(copies)
            except TransferFailed as error:
                buffer.is_retired = error.timed_out
                # Late bytes land in the buffer, never in a slot: to the restore this is a failure like any other.
                raise TransferFailed(str(error)) from error
            return self._memory.put(placed)

    def _read(self, copies: Sequence[Copy]) -> None:
        for call in split(_sliced(coalesce(copies)), Limits()):
            self._engine.read(self.session_id, call)


class DiskSlots(SlotSource):
    """The checkpoint's files, through staging. They are opened when first needed: most restores never do."""

    kind = SourceKind.DISK

    def __init__(self, name: str, open_disk: Callable[[], DiskSource], memory: SlotMemory, staging: Staging) -> None:
        """`open_disk` raises CheckpointError where there is none to be had."""
        lanes = max(2, min(DISK_LANES_MAX, os.cpu_count() or 2))
        super().__init__(name, memory, lanes, Limits(nbytes=staging.capacity))
        self._open_disk = open_disk
        self._disk: DiskSource | None = None
        self._staging = staging
        self._lock = threading.Lock()

    def _fetch(self, wants: Sequence[Want]) -> Mapping[int, bytes]:
        checksums: dict[int, bytes] = {}
        for group in _groups(wants, self._staging.nbytes):
            checksums |= self._through(group)
        return checksums

    def _opened(self) -> DiskSource:
        with self._lock:
            if self._disk is None:
                self._disk = self._open_disk()
            return self._disk

    def _through(self, wants: Sequence[Want]) -> dict[int, bytes]:
        disk = self._opened()
        with self._staging.take() as buffer:
            placed = _packed(buffer.address, wants)
            read = {
                row: disk.read_block(row, view(to, want.nbytes)) for (row, to), want in zip(placed, wants, strict=True)
            }
            put = self._memory.put(placed)
        return {row: taken for row, taken in read.items() if put[row] == taken}

    def close(self) -> None:
        if self._disk is not None:
            self._disk.close()


def _aligned(nbytes: int) -> int:
    return -(-nbytes // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT


def _groups(wants: Sequence[Want], nbytes: int) -> Iterator[list[Want]]:
    """The wants in as few groups as fit into `nbytes` bytes each, one behind the other."""
    group: list[Want] = []
    end = 0
    for want in wants:
        if group and end + _aligned(want.nbytes) > nbytes:
            yield group
            group, end = [], 0
        group.append(want)
        end += _aligned(want.nbytes)
    if group:
        yield group


def _packed(start: int, wants: Sequence[Want]) -> list[tuple[int, int]]:
    """(row, address) of the wanted blocks, one behind the other from `start` on."""
    placed = []
    for want in wants:
        placed.append((want.row, start))
        start += _aligned(want.nbytes)
    return placed


def _sliced(copies: Sequence[Copy]) -> list[Copy]:
    return [
        Copy(to + at, source + at, min(ITEM_NBYTES_MAX, nbytes - at))
        for to, source, nbytes in copies
        for at in range(0, nbytes, ITEM_NBYTES_MAX)
    ]

"""Slots in GPU memory.

A block is verified after it was copied, where it then lies: the GPU takes its checksum (`transfer.cuda.checksum`).
Where it cannot, the checksum is of the host bytes, taken while the copy runs: a slot that holds a part of each block,
or a device without a compiler for it. Those bytes are in page-locked memory that nobody rewrites while it is published,
the bus checks every packet and repeats a broken one, and GPU memory corrects its own errors.
"""

from __future__ import annotations

import ctypes
import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shm.checksum import checksum
from transfer.cuda.checksum import DeviceChecksums, Workspace
from transfer.cuda.driver import Cuda, Stream
from transfer.errors import TransferFailed
from transfer.memory import address_of, view
from transfer.slots.copies import holds_copies, within
from transfer.slots.host import agreed
from transfer.slots.staging import Staging
from transfer.slots.table import Copies, SlotTable

Int64s = npt.NDArray[np.int64]

LANES = 3  # with one on the bus, the others are queued behind it or being verified
LANES_HASHING = 16  # where the processor takes the checksums
LANE_WAIT_S_MAX = 60.0
PITCH_MAX = (1 << 31) - 1  # CU_DEVICE_ATTRIBUTE_MAX_PITCH
_WAYS = {"to_device": ("address_pitch", "block_pitch"), "to_host": ("block_pitch", "address_pitch")}


class Lane(NamedTuple):
    """What one thread copies with."""

    stream: Stream
    workspace: Workspace | None


class DeviceSlots:
    """CUDA tensors. Host memory to copy from should be page-locked; else copies run at a seventh of the speed."""

    def __init__(
        self, table: SlotTable, cuda: Cuda, staging: Staging, checksums: DeviceChecksums | None = None
    ) -> None:
        """Without `checksums` the processor takes them all."""
        self._table = table
        self._cuda = cuda
        self._staging = staging
        self._checksums = checksums
        self.edges: Int64s = np.empty(0, np.int64)
        """Where page-locked pieces of host memory begin or end, ascending: CUDA refuses a copy that crosses one."""
        self.lanes = LANES if checksums else LANES_HASHING
        self._streams = tuple(cuda.open_stream() for _ in range(self.lanes))
        self._queueing = threading.Lock()
        """One batch at a time is queued for the bus: lanes that share the interpreter would all begin late."""
        self._free: queue.LifoQueue[Lane] = queue.LifoQueue()
        for stream in self._streams:
            self._free.put(Lane(stream, checksums.open_workspace() if checksums else None))

    def follow(self, *, wait: bool) -> None:
        for stream in self._streams:
            stream.follow()
        if wait:
            self._streams[0].wait()

    def put(self, blocks: Sequence[tuple[int, int]]) -> dict[int, bytes]:
        if not blocks:
            return {}
        copies, number = self._table.copies_of([row for row, _ in blocks])
        sources = np.array([address for _, address in blocks], np.int64)[number] + copies["block_offset"]
        first = copies["slot"] == 0
        with self._lane() as lane:
            with self._queueing:
                self._copy("to_device", copies[first], copies["address"][first], sources[first], lane.stream)
            if not first.all():
                for row, _ in blocks:
                    self._spread(row, lane.stream)
            if self._checksums is not None:
                assert lane.workspace is not None
                return self._checksums.take([row for row, _ in blocks], lane.workspace, lane.stream)
            nbytes = self._table.manifest.nbytes
            return {row: checksum(view(address, int(nbytes[row]))) for row, address in blocks}

    def check(self, rows: Sequence[int]) -> dict[int, bytes]:
        """On the device, or else back over the bus, through staging."""
        if self._checksums is None:
            return {row: self._check_on_host(row) for row in rows}
        with self._lane() as lane:
            assert lane.workspace is not None
            return self._checksums.take(rows, lane.workspace, lane.stream)

    def _check_on_host(self, row: int) -> bytes:
        seen = set()
        for slot in range(self._table.slot_count(row)):
            with self._gathered(row, slot) as block:
                seen.add(checksum(block))
        return agreed(seen)

    def holds(self, row: int, address: int) -> bool:
        right = view(address, int(self._table.manifest.nbytes[row]))
        for slot, copies in enumerate(self._table.by_slot(row)):
            with self._gathered(row, slot) as block:
                if not holds_copies(right, within(copies, address_of(block))):
                    return False
        return True

    def gather(self, row: int, slot: int) -> bytearray:
        with self._gathered(row, slot) as block:
            return bytearray(block)

    @contextmanager
    def _gathered(self, row: int, slot: int) -> Iterator[memoryview]:
        """What one slot has of a block, in a host buffer and at its place there; all else is zeros, as in a block."""
        nbytes = int(self._table.manifest.nbytes[row])
        copies = self._table.copies(row)
        copies = copies[copies["slot"] == slot]
        with self._staging.take() as buffer:
            ctypes.memset(buffer.address, 0, nbytes)
            with self._lane() as lane:
                self._copy("to_host", copies, copies["block_offset"] + buffer.address, copies["address"], lane.stream)
            yield view(buffer.address, nbytes)

    def spread(self, row: int) -> None:
        with self._lane() as lane:
            self._spread(row, lane.stream)

    def _spread(self, row: int, stream: Stream) -> None:
        copies = self._table.copies(row)
        first = copies[copies["slot"] == 0]
        for slot in range(1, self._table.slot_count(row)):
            sibling = copies[copies["slot"] == slot]
            self._copy("within", sibling, sibling["address"], first["address"], stream)

    # -- the device ------------------------------------------------------------------------------------------

    @contextmanager
    def _lane(self) -> Iterator[Lane]:
        """One of the lanes; what is queued on it in the block is done when the block ends, also when it fails."""
        try:
            lane = self._free.get(timeout=LANE_WAIT_S_MAX)
        except queue.Empty:
            raise TransferFailed(f"the device took no more copies for {LANE_WAIT_S_MAX:.0f} s") from None
        try:
            with self._cuda.current():
                yield lane
        finally:
            try:
                lane.stream.wait()
            finally:
                self._free.put(lane)

    def _copy(self, way: str, copies: Copies, to: Int64s, source: Int64s, stream: Stream) -> None:
        """Queue the copies with these addresses; `way` is to_device, to_host or within."""
        runs = copies["rows"] == 1
        alone = self._fold(way, copies[runs], to[runs], source[runs], stream)
        self._cuda.runs(way, to[runs][alone], source[runs][alone], copies["run_nbytes"][runs][alone], stream)
        to_pitch, pitch = (copies[name] for name in _WAYS.get(way, ("address_pitch", "address_pitch")))
        for at in np.flatnonzero(~runs).tolist():
            shape = int(copies["rows"][at]), int(copies["run_nbytes"][at])
            self._cuda.rows(way, (int(to[at]), int(to_pitch[at])), (int(source[at]), int(pitch[at])), shape, stream)

    def _fold(self, way: str, runs: Copies, to: Int64s, source: Int64s, stream: Stream) -> list[int]:
        """Queue runs that lie at equal distances as the rows of one matrix; returns the indices of the others.

        The same tensor of neighbouring experts is such a matrix. A copy costs the bus some 5 us whatever its size, and
        an expert's fp8 scales are of 3.5 KB each. All rows are of one tensor and of one page-locked piece: CUDA refuses
        two allocations in one copy.
        """
        piece = np.searchsorted(self.edges, source, "right") if way == "to_device" else np.zeros(len(runs), np.int64)
        order = np.lexsort((source, runs["block_offset"], piece, runs["tensor"], runs["run_nbytes"]))
        alike = list(zip(*(each[order].tolist() for each in (runs["run_nbytes"], runs["tensor"], piece)), strict=True))
        places = list(zip(to[order].tolist(), source[order].tolist(), strict=True))
        alone: list[int] = []
        at = 0
        while at < len(order):
            count, pitches = _equidistant(places, alike, at)
            if count > 1:
                to_rows, source_rows = zip(places[at], pitches, strict=True)
                self._cuda.rows(way, to_rows, source_rows, (count, alike[at][0]), stream)
            else:
                alone.append(int(order[at]))
            at += count
        return alone


def _equidistant(
    places: Sequence[tuple[int, int]], alike: Sequence[tuple[int, int, int]], first: int
) -> tuple[int, tuple[int, int]]:
    """How many runs from `first` on make a matrix, and its pitches at the destination and at the source.

    `places` are addresses at both; `alike` are sizes, tensors and page-locked pieces: a matrix has one of each.
    """
    pitches, end = (0, 0), first + 1
    while end < len(places) and alike[end] == alike[first]:
        step = places[end][0] - places[end - 1][0], places[end][1] - places[end - 1][1]
        if end == first + 1:
            pitches = step
        if step != pitches or min(step) < alike[first][0] or max(step) > PITCH_MAX:
            break
        end += 1
    return end - first, pitches

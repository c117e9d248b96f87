"""Slots in GPU memory.

Checksums are of the host bytes that the copies read, taken while the copies run. That is enough: those bytes are in
page-locked memory that nobody rewrites while it is published, the bus checks every packet and repeats a broken one,
and GPU memory corrects its own errors. Reading everything back would take the bus as long again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from shm.checksum import checksum
from transfer.cuda import Cuda, Stream
from transfer.host_slots import UNEQUAL
from transfer.memory import view
from transfer.slot_table import Copies, SlotTable
from transfer.staging import Staging

Int64s = npt.NDArray[np.int64]

STREAMS = 4  # the pause of a small copy on one is filled by the others


class DeviceSlots:
    """CUDA tensors. Host memory to copy from should be page-locked; else copies run at a seventh of the speed."""

    def __init__(self, table: SlotTable, cuda: Cuda, staging: Staging) -> None:
        self._table = table
        self._cuda = cuda
        self._staging = staging
        self._streams = tuple(cuda.open_stream() for _ in range(STREAMS))
        self._turn = itertools.count()

    def follow(self) -> None:
        """Let the copies to come wait for what the engine has queued on the device until now."""
        for stream in self._streams:
            stream.follow()

    def put(self, blocks: Sequence[tuple[int, int]]) -> dict[int, bytes]:
        if not blocks:
            return {}
        copies, number = self._table.copies_of([row for row, _ in blocks])
        sources = np.array([address for _, address in blocks], np.int64)[number] + copies["block_offset"]
        first = copies["slot"] == 0
        with self._stream() as stream:
            self._copy("to_device", copies[first], copies["address"][first], sources[first], stream)
            if not first.all():
                for row, _ in blocks:
                    self._spread(row, stream)
            nbytes = self._table.manifest.nbytes
            return {row: checksum(view(address, int(nbytes[row]))) for row, address in blocks}

    def check(self, row: int) -> bytes:
        """Back over the bus, through staging."""
        nbytes = int(self._table.manifest.nbytes[row])
        copies, seen = self._table.copies(row), set()
        with self._staging.take() as buffer:
            block = view(buffer.address, nbytes)
            for slot in range(int(copies["slot"].max()) + 1):
                block[:] = bytes(nbytes)  # alignment between tensors is zeros
                chosen = copies[copies["slot"] == slot]
                with self._stream() as stream:
                    self._copy("to_host", chosen, chosen["block_offset"] + buffer.address, chosen["address"], stream)
                seen.add(checksum(block))
        return seen.pop() if len(seen) == 1 else UNEQUAL

    def spread(self, row: int) -> None:
        with self._stream() as stream:
            self._spread(row, stream)

    def _spread(self, row: int, stream: Stream) -> None:
        copies = self._table.copies(row)
        first = copies[copies["slot"] == 0]
        for slot in range(1, int(copies["slot"].max()) + 1):
            sibling = copies[copies["slot"] == slot]
            self._copy("within", sibling, sibling["address"], first["address"], stream)

    @contextmanager
    def _stream(self) -> Iterator[Stream]:
        """One of the streams; what is queued on it in the block is done when the block ends, also when it fails."""
        self._cuda.enter()
        stream = self._streams[next(self._turn) % len(self._streams)]
        try:
            yield stream
        finally:
            stream.wait()

    def _copy(self, way: str, copies: Copies, to: Int64s, source: Int64s, stream: Stream) -> None:
        """Queue the copies with these addresses; `way` is to_device, to_host or within."""
        runs = copies["rows"] == 1
        self._cuda.runs(way, to[runs], source[runs], copies["run_nbytes"][runs], stream)
        if runs.all():
            return
        device, host = copies["address_pitch"], copies["block_pitch"]
        to_pitch, pitch = {"to_device": (device, host), "to_host": (host, device), "within": (device, device)}[way]
        for at in np.flatnonzero(~runs).tolist():
            shape = int(copies["rows"][at]), int(copies["run_nbytes"][at])
            self._cuda.rows(way, (int(to[at]), int(to_pitch[at])), (int(source[at]), int(pitch[at])), shape, stream)

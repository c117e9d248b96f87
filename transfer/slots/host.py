"""Slots in CPU memory: blocks are copied in, and their checksums taken where they then lie."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Sequence
from typing import Protocol

import xxhash

from shm.checksum import checksum
from transfer.memory import view
from transfer.slots.copies import SlotCopy, apply_copies, gather_copies, holds_copies
from transfer.slots.table import SlotTable

CHUNK_NBYTES = 256 << 10  # copied, then checksummed while it is still in the core's cache
UNEQUAL = b""  # in place of a checksum: the slots of one expert do not hold the same bytes


class SlotMemory(Protocol):
    """The memory that a rank's slots lie in. Called from several threads, for different blocks."""

    @property
    def lanes(self) -> int:
        """How many threads that put blocks it keeps busy."""
        ...

    def put(self, blocks: Sequence[tuple[int, int]]) -> dict[int, bytes]:
        """Copy whole blocks, given as (manifest row, address in host memory), into all their slots.

        Returns the xxh3-128 of each, and has the bytes in place by then. Raises EngineError for a device that fails.
        """
        ...

    def check(self, rows: Sequence[int]) -> dict[int, bytes]:
        """The xxh3-128 of each block as it lies in its slots; UNEQUAL if they differ. The slots must be whole."""
        ...

    def holds(self, row: int, address: int) -> bool:
        """Whether all slots have what they should of the block at an address in host memory, parts of it too."""
        ...

    def gather(self, row: int, slot: int) -> bytearray:
        """What one of the block's slots has, each byte at its place in the block; zeros where it has nothing."""
        ...

    def spread(self, row: int) -> None:
        """Copy a block from its first slot to the others."""
        ...

    def follow(self, *, wait: bool) -> None:
        """Let copies to come wait for what the calling thread has queued on the device until now.

        With `wait`, until that is done: for a transfer engine that writes to the memory itself, and knows no streams.
        """
        ...


class HostSlots:
    """CPU tensors.

    A slot that holds whole blocks is checked at the destination, piece by piece as it is filled: what the checksum
    saw is what is in the slot. Of a slot with a part of each block no checksum can be taken: there the host bytes are
    checked, and what is in the slot then compared with them.
    """

    def __init__(self, table: SlotTable) -> None:
        self._table = table
        self.lanes = os.cpu_count() or 2

    def put(self, blocks: Sequence[tuple[int, int]]) -> dict[int, bytes]:
        return {row: self._put(row, address) for row, address in blocks}

    def _put(self, row: int, address: int) -> bytes:
        slots = self._table.by_slot(row)
        nbytes = int(self._table.manifest.nbytes[row])
        if self._table.is_direct(row):
            return agreed(_copy_and_check(copies, address, nbytes) for copies in slots)
        block = view(address, nbytes)
        for copies in slots:
            apply_copies(block, copies)
        if self._table.is_whole(row):
            return self._check(row)
        taken = checksum(block)
        return taken if self.holds(row, address) else UNEQUAL

    def check(self, rows: Sequence[int]) -> dict[int, bytes]:
        return {row: self._check(row) for row in rows}

    def _check(self, row: int) -> bytes:
        nbytes = int(self._table.manifest.nbytes[row])
        take = _check if self._table.is_direct(row) else _gather_and_check
        return agreed(take(copies, nbytes) for copies in self._table.by_slot(row))

    def holds(self, row: int, address: int) -> bool:
        block = view(address, int(self._table.manifest.nbytes[row]))
        return all(holds_copies(block, copies) for copies in self._table.by_slot(row))

    def gather(self, row: int, slot: int) -> bytearray:
        block = bytearray(int(self._table.manifest.nbytes[row]))
        gather_copies(block, self._table.by_slot(row)[slot])
        return block

    def follow(self, *, wait: bool) -> None:
        """Nothing is ever queued on a CPU."""

    def spread(self, row: int) -> None:
        first, *others = self._table.by_slot(row)
        for copies in others:
            for source, copy in zip(first, copies, strict=True):
                ctypes.memmove(copy.address, source.address, copy.run_nbytes)


def agreed(checksums: Iterable[bytes]) -> bytes:
    """The checksum of all slots of one expert; UNEQUAL if they differ."""
    seen = set(checksums)
    return seen.pop() if len(seen) == 1 else UNEQUAL


def _copy_and_check(copies: Sequence[SlotCopy], block: int, nbytes: int) -> bytes:
    digest = xxhash.xxh3_128()
    end = 0
    for copy in copies:
        if copy.block_offset > end:
            digest.update(bytes(copy.block_offset - end))  # alignment between tensors is zeros
        for at in range(0, copy.run_nbytes, CHUNK_NBYTES):
            size = min(CHUNK_NBYTES, copy.run_nbytes - at)
            ctypes.memmove(copy.address + at, block + copy.block_offset + at, size)
            digest.update(view(copy.address + at, size))
        end = copy.block_offset + copy.run_nbytes
    if nbytes > end:
        digest.update(bytes(nbytes - end))
    return digest.digest()


def _check(copies: Sequence[SlotCopy], nbytes: int) -> bytes:
    digest = xxhash.xxh3_128()
    end = 0
    for copy in copies:
        digest.update(bytes(copy.block_offset - end))
        digest.update(view(copy.address, copy.run_nbytes))
        end = copy.block_offset + copy.run_nbytes
    digest.update(bytes(nbytes - end))
    return digest.digest()


def _gather_and_check(copies: Sequence[SlotCopy], nbytes: int) -> bytes:
    block = bytearray(nbytes)
    gather_copies(block, copies)
    return checksum(memoryview(block))

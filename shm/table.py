"""The block table: one entry a manifest row, in two copies, each entry with a check of its own.

What leads to a block must not be trusted more than the block. An entry is whole if its check is right and its state is
one that there is. Readers take each entry from the first copy in which it is whole, so a copy may be damaged, or its
owner be in the middle of writing it, and nothing is missing. An entry that is whole in no copy is *lost*: its block
is hidden and said to be damaged, the others stay as they are.

An owner keeps the entries in memory of its own and never reads back what it wrote: what flips under it does not lead
its restores to another block's place. It writes a copy only after the other is whole, hides a block in both before an
entry or a byte of it changes, and shows it last.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shm.layout import COPIES, ENTRY, BlockState, Entries, Int64s, copy_offset, entry_check, entry_checks

TABLE_READS_MAX = 5  # an entry is lost for a moment to who reads one copy and the other while its owner writes them
TABLE_RETRY_S = 0.002

Mask = npt.NDArray[np.bool_]

_STATES = np.array(BlockState, dtype=np.uint32)


def table_copies(view: memoryview, offset: int, nbytes: int) -> tuple[Entries, ...]:
    """The copies of the table as they lie in a mapping of the object's start."""
    offsets = (offset, copy_offset(offset, nbytes))
    return tuple(np.frombuffer(view, ENTRY, nbytes // ENTRY.itemsize, at) for at in offsets[:COPIES])


def is_whole(rows: Int64s, entries: Entries) -> Mask:
    """Whether each of these entries is one that its owner wrote for its row."""
    is_known = np.isin(entries["state"], _STATES) & (entries["reserved"] == 0)
    whole: Mask = is_known & (entries["check"] == entry_checks(rows, entries))
    return whole


def read_entries(copies: Sequence[Entries], rows: Int64s) -> tuple[Entries, Mask]:
    """The entries of these rows, and which of them are lost: what those say means nothing."""
    for _ in range(TABLE_READS_MAX):
        entries, lost = _read_once(copies, rows)
        if not lost.any():
            break
        time.sleep(TABLE_RETRY_S)
    return entries, lost


def _read_once(copies: Sequence[Entries], rows: Int64s) -> tuple[Entries, Mask]:
    entries = copies[0][rows]
    lost = ~is_whole(rows, entries)
    for copy in copies[1:]:
        again = np.flatnonzero(lost)
        if len(again):
            spare = copy[rows[again]]
            whole = is_whole(rows[again], spare)
            entries[again[whole]], lost[again[whole]] = spare[whole], False
    return entries, lost


class BlockTable:
    """An owner's entries, and the copies of them that readers see. Thread-safe for different rows."""

    def __init__(self, entries: Entries, copies: Sequence[Entries]) -> None:
        """`entries` are taken over; the copies stay as they are until they are written."""
        self.entries = entries
        self._copies = copies
        self._lock = threading.Lock()

    def place(self, rows: Int64s, offsets: Int64s, sizes: Int64s) -> None:
        """Give blocks that were absent a place."""
        with self._lock:
            self.entries["offset"][rows] = offsets
            self.entries["nbytes"][rows] = sizes
            self.entries["check"][rows] = entry_checks(rows, self.entries[rows])
            self._write(rows)
            self._show(rows, BlockState.RESERVED)

    def publish(self, row: int, checksum: bytes) -> None:
        """Show the block, with the checksum that its bytes have. One that is shown with it already is not hidden."""
        with self._lock:
            offset, nbytes, recorded, state, *_ = self.entries[row].tolist()
            if state == BlockState.PUBLISHED and recorded == checksum:
                self._mend(np.array([row]))
                return
            self._show(row, BlockState.QUARANTINED)
            self.entries["check"][row] = entry_check(row, offset, nbytes, checksum)
            self.entries["checksum"][row] = checksum
            self._write(row)
            self._show(row, BlockState.PUBLISHED)

    def hide(self, row: int) -> None:
        """Hide the block; its checksum stays."""
        with self._lock:
            self._show(row, BlockState.QUARANTINED)

    def drop(self, row: int) -> None:
        """Take the block's place away; nobody ever read it there."""
        with self._lock:
            self._show(row, BlockState.ABSENT)

    def _write(self, rows: Int64s | int) -> None:
        for copy in self._copies:
            for field in ("offset", "nbytes", "checksum", "reserved", "check"):
                copy[field][rows] = self.entries[field][rows]

    def _show(self, rows: Int64s | int, state: BlockState) -> None:
        self.entries["state"][rows] = state
        for copy in self._copies:
            copy["state"][rows] = state

    def damaged(self) -> Int64s:
        """Ascending rows whose entry is not what was written, in one copy or the other."""
        with self._lock:
            return self._damaged(np.arange(len(self.entries)))

    def mend(self) -> Int64s:
        """Write what is damaged anew, one copy after the other; the rows."""
        with self._lock:
            return self._mend(np.arange(len(self.entries)))

    def _damaged(self, rows: Int64s) -> Int64s:
        mine = _words(self.entries[rows])
        differs = np.zeros(len(rows), dtype=bool)
        for copy in self._copies:
            differs |= (_words(copy[rows]) != mine).any(axis=1)
        return rows[differs]

    def _mend(self, rows: Int64s) -> Int64s:
        damaged = self._damaged(rows)
        if len(damaged):
            for copy in self._copies:
                copy[damaged] = self.entries[damaged]
        return damaged


def _words(entries: Entries) -> npt.NDArray[np.uint64]:
    return entries.view("<u8").reshape(len(entries), ENTRY.itemsize // 8)

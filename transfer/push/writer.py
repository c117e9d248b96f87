"""Writing blocks into a consumer's memory, from ours: none of the consumer's code runs meanwhile.

A block is verified at its source before it is sent. Bytes that arrive late, of a write that was given up, are of the
same block for the same slot, so they do no harm there. Memory that such a write may still read must not change: that of
published blocks does not, and a buffer is lost, and not used again, when a transfer with it timed out.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from transfer.engine import Copy, TransferEngine
from transfer.errors import TransferFailed
from transfer.plan import Limits, sliced, split
from transfer.push.table import PushTable

READ_BACK_NBYTES = 16 << 20  # at a time: the first touch of memory takes longer than to read into it again
FAILED_WRITES_MAX = 2  # with none in between that went well: then the consumer is given up
BUFFERS_LOST_MAX = 8  # buffers that a stopped consumer may still reach, in the life of this process

_lost: list[Any] = []
_still_read: dict[int, memoryview] = {}
"""A view of each mapping that a write which timed out may still read from: to the process's end it stays mapped."""

_libc = ctypes.CDLL(None)
_libc.memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class WriteFailed(TransferFailed):
    """The consumer's memory could not be written or read. Never `timed_out`: bytes that land late are the right ones.

    With `is_unsettled`, the transfer may still be under way, and what it reads or writes here must be left alone.
    """

    def __init__(self, message: str, *, is_unsettled: bool = False) -> None:
        super().__init__(message)
        self.is_unsettled = is_unsettled


class Health:
    """Whether a consumer's memory answers, as all sources of one restore see it. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._failures = 0
        self._reason = ""
        self.answered = False

    def note(self, error: WriteFailed | None) -> None:
        """A push to it ended so."""
        with self._lock:
            if error is None:
                self._failures, self.answered = 0, True
            else:
                self._failures += 1
                self._reason = str(error)

    def check(self) -> None:
        """Raises TransferFailed once nothing more should be tried."""
        if self._failures >= FAILED_WRITES_MAX:
            raise TransferFailed(f"the consumer is given up: {self._reason}", is_destination_gone=True)

    @property
    def error(self) -> str | None:
        """Why the consumer seems gone; None if anything was written to it, or nothing was tried."""
        return self._reason if self._failures and not self.answered else None


class Writer:
    """Writes blocks to where a table says, and reads them back and compares them if `read_back`. Thread-safe."""

    def __init__(
        self,
        engine: TransferEngine,
        table: PushTable,
        *,
        read_back: bool,
        allowed_s: Callable[[], float] = lambda: math.inf,
    ) -> None:
        """`allowed_s` is asked before each transfer, for how many seconds it may go on; it raises what forbids it."""
        self.table = table
        self._engine = engine
        self._read_back = read_back
        self._allowed_s = allowed_s

    def write(self, blocks: Sequence[tuple[int, int]]) -> dict[int, str]:
        """Write blocks, given as (manifest row, address); returns why those differ that did when read back.

        The blocks lie in registered memory. Raises WriteFailed; then any slot of them may be half-written.
        """
        copies = {row: sliced(self.table.copies(row, address)) for row, address in blocks}
        self._transfer(self._write, [copy for each in copies.values() for copy in each], "write to")
        if not self._read_back:
            return {}
        return dict.fromkeys(self._differing(copies), "it differs when read back")

    def _write(self, session_id: str, call: Sequence[Copy]) -> None:
        self._engine.write(session_id, call, self._allowed_s())

    def _differing(self, written: Mapping[int, Sequence[Copy]]) -> set[int]:
        """The rows of which the consumer's memory has not what was written to it."""
        rows = [row for row, copies in written.items() for _ in copies]
        differing: set[int] = set()
        parts = split([copy for copies in written.values() for copy in copies], Limits(nbytes=READ_BACK_NBYTES))
        done = 0
        with buffer(self._engine, max(sum(copy.nbytes for copy in part) for part in parts)) as start:
            for part in parts:
                back, address = [], start
                for copy in part:
                    back.append(Copy(address, copy.destination, copy.nbytes))
                    address += copy.nbytes
                self._transfer(self._engine.read, back, "read of")
                for row, ours, read in zip(rows[done:], part, back, strict=False):
                    if _libc.memcmp(ours.source, read.destination, ours.nbytes):
                        differing.add(row)
                done += len(part)
        return differing

    def _transfer(self, verb: Any, copies: Sequence[Copy], what: str) -> None:
        try:
            for call in split(copies, Limits()):
                verb(self.table.session_id, call)
        except TransferFailed as error:
            raise WriteFailed(
                f"{what} {self.table.session_id} failed ({error}): is the process alive, its memory registered?",
                is_unsettled=error.timed_out,
            ) from error


@contextmanager
def buffer(engine: TransferEngine, nbytes: int) -> Iterator[int]:
    """Registered memory of ours for a while: its address. Never used again if a transfer may still be under way."""
    if len(_lost) >= BUFFERS_LOST_MAX:
        raise TransferFailed(
            f"{BUFFERS_LOST_MAX} buffers were lost to consumers that stopped answering: restart this node to go on"
        )
    memory = mmap.mmap(-1, nbytes)
    piece = (int(np.frombuffer(memory, np.uint8).ctypes.data), nbytes)
    engine.register([piece])
    is_lost = False
    try:
        yield piece[0]
    except WriteFailed as error:
        is_lost = error.is_unsettled
        raise
    except TransferFailed as error:
        is_lost = error.timed_out
        # Late bytes of a peer land in the buffer, never at the consumer: to a restore this is a failure like any other.
        raise TransferFailed(str(error)) from error
    finally:
        if is_lost:
            _lost.append(memory)
        else:
            engine.unregister([piece])


def keep_for_ever(views: Iterable[memoryview]) -> None:
    """Keep memory mapped that a write which timed out may still read from."""
    _still_read.update((id(each.obj), each) for each in views)

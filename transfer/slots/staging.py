"""A bounded ring of host buffers, for blocks that cannot land in their slots at once.

A buffer that a peer had timed out on may still be written to by the transfer engine, whenever that peer wakes up. It
is retired: nobody gets it again, and its memory is not given back while the engine lives.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from transfer.engine import TransferEngine
from transfer.errors import EngineRefused, TransferFailed

STAGING_NBYTES = 640 << 20  # of all buffers, unless two blocks are larger
BUFFER_NBYTES = 96 << 20  # small blocks share a buffer
SLACK_NBYTES = 64 << 10  # blocks are aligned when they share a buffer
BUFFERS_MIN = 2
WAIT_S_MAX = 60.0  # for a free buffer
PAGE_NBYTES = 4096

_never_freed: list[Any] = []
"""Memory that an engine which is not ours may still write to."""


@dataclass(slots=True)
class Buffer:
    """`nbytes` bytes at `address`. Set `is_retired` if bytes may still arrive in it."""

    address: int
    nbytes: int
    is_retired: bool = False


def host_memory(nbytes: int) -> tuple[int, Any]:
    """Plain memory, with every page touched: its address, and what keeps it alive."""
    memory = np.zeros(nbytes + PAGE_NBYTES, np.uint8)
    memory[::PAGE_NBYTES] = 1
    return -(-int(memory.ctypes.data) // PAGE_NBYTES) * PAGE_NBYTES, memory


class Staging:
    """Buffers of equal size, each large enough for the largest block; made when first needed. Thread-safe."""

    def __init__(
        self, block_nbytes_max: int, total_nbytes: int, allocate: Callable[[int], tuple[int, Any]] = host_memory
    ) -> None:
        """`total_nbytes` is the most that will ever pass at once: a small model gets a small ring."""
        self.capacity = max(block_nbytes_max, min(BUFFER_NBYTES, total_nbytes))
        self.nbytes = -(-(self.capacity + SLACK_NBYTES) // PAGE_NBYTES) * PAGE_NBYTES
        self.count = max(BUFFERS_MIN, min(STAGING_NBYTES // self.nbytes, -(-total_nbytes // self.capacity)))
        self._allocate = allocate
        self._memory: Any = None
        self._range = (0, 0)
        self._free: queue.LifoQueue[Buffer] = queue.LifoQueue()
        self._engine: TransferEngine | None = None
        self._retired = 0
        self._lock = threading.Lock()

    def prepare(self, engine: TransferEngine | None = None) -> None:
        """Make the buffers, and let the engine write to them; once is enough. Raises EngineRefused."""
        with self._lock:
            if self._memory is None:
                address, self._memory = self._allocate(self.nbytes * self.count)
                self._range = (address, self.nbytes * self.count)
                for number in range(self.count):
                    self._free.put(Buffer(address + number * self.nbytes, self.nbytes))
            if engine is not None and self._engine is not engine:
                engine.register([self._range])
                self._engine = engine

    @property
    def is_spent(self) -> bool:
        """Whether too few buffers are left to work with: make another ring."""
        return self.count - self._retired < BUFFERS_MIN

    @contextmanager
    def take(self) -> Iterator[Buffer]:
        """A buffer of one's own; waits for one. Raises TransferFailed where none comes free."""
        self.prepare()
        if self._retired >= self.count:
            raise TransferFailed("every staging buffer was lost to peers that stopped answering: restore again later")
        try:
            buffer = self._free.get(timeout=WAIT_S_MAX)
        except queue.Empty:
            raise TransferFailed(f"no staging buffer came free within {WAIT_S_MAX:.0f} s") from None
        try:
            yield buffer
        finally:
            if buffer.is_retired:
                with self._lock:
                    self._retired += 1
            else:
                self._free.put(buffer)

    def close(self, *, is_engine_gone: bool) -> None:
        """Give the memory back, unless bytes may still arrive in it: then it is kept to the process's end."""
        with self._lock:
            engine, self._engine = self._engine, None
            is_quiet = is_engine_gone or not self._retired
            if engine is not None and not is_engine_gone:
                try:
                    engine.unregister([self._range])
                except EngineRefused:
                    is_quiet = False
            if not is_quiet:
                _never_freed.append(self._memory)
            self._memory = None

"""Page-locking shared memory for CUDA, in the engine's process only.

A `PROT_READ`, `MAP_SHARED` mapping registers with the read-only flag and copies at the bus's speed. Some drivers
refuse hundreds of GiB in one call, so memory is registered in pieces, and unregistered before it is unmapped. CUDA
refuses a copy that crosses from one piece into another (error 1, also where they touch): pieces are of whole blocks.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from shm.errors import SegmentError

PIECE_NBYTES = 16 << 30
PAGE_NBYTES = mmap.PAGESIZE
PORTABLE = 1  # cudaHostRegisterPortable: good in every CUDA context of the process
READ_ONLY = 8  # cudaHostRegisterReadOnly


class PageLock:
    """Pieces of memory that are page-locked until `release`."""

    def __init__(self, pieces: Iterable[tuple[int, int]], device: str | int | None = None) -> None:
        """`pieces` are (address, nbytes), of whole pages; `device` locks them, by default the thread's current one.

        Raises SegmentError, with nothing left locked.
        """
        self.pieces: list[tuple[int, int]] = []
        self._device: str | int | None = device
        with _cudart(device) as (cudart, self._device):
            for address, nbytes in pieces:
                if code := int(cudart.cudaHostRegister(address, nbytes, PORTABLE | READ_ONLY)):
                    self.release()
                    raise SegmentError(
                        f"cudaHostRegister of {nbytes:,} bytes gave error {code}: raise the memory-lock limit (`ulimit "
                        "-l unlimited`, containers: `--ulimit memlock=-1`), or go on unpinned"
                    )
                self.pieces.append((address, nbytes))

    def release(self) -> None:
        """Undo it; before the memory is unmapped. Harmless when repeated."""
        pieces, self.pieces = self.pieces, []
        if pieces:
            with _cudart(self._device) as (cudart, _):
                for address, _ in pieces:
                    cudart.cudaHostUnregister(address)


def joined(spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Ascending (address, nbytes) of blocks as pieces of whole pages: those that touch become one.

    Of up to PIECE_NBYTES, and more where blocks share a page of the host: no page can be locked twice.
    """
    address = end = 0
    for start, nbytes in spans:
        first, last = start // PAGE_NBYTES * PAGE_NBYTES, -(-(start + nbytes) // PAGE_NBYTES) * PAGE_NBYTES
        if first > end or (first == end and last - address > PIECE_NBYTES):
            if end:
                yield address, end - address
            address = first
        end = last
    if end:
        yield address, end - address


@contextmanager
def _cudart(device: str | int | None) -> Iterator[tuple[Any, int]]:
    """The CUDA runtime with a device current, and its number.

    On a thread of its own device 0 is current: a call there would make this process a context of some 500 MB on a GPU
    that is another rank's.
    """
    import torch

    if not torch.cuda.is_available():
        raise SegmentError("there is no CUDA device here: pin() is for hosts with one, everything else works without")
    torch.cuda.init()  # type: ignore[no-untyped-call]
    with torch.cuda.device(device):
        yield torch.cuda.cudart(), torch.cuda.current_device()  # type: ignore[no-untyped-call]

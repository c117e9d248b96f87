"""Page-locking shared memory for CUDA, in the engine's process only.

A `PROT_READ`, `MAP_SHARED` mapping registers with the read-only flag and copies at the bus's speed. Some drivers
refuse hundreds of GiB in one call, so a range is registered in pieces, and unregistered before it is unmapped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from shm.errors import SegmentError

PIECE_NBYTES = 16 << 30
PORTABLE = 1  # cudaHostRegisterPortable: good in every CUDA context of the process
READ_ONLY = 8  # cudaHostRegisterReadOnly


class PageLock:
    """A range that is page-locked until `release`."""

    def __init__(self, address: int, nbytes: int, device: str | int | None = None) -> None:
        """Raises SegmentError, with nothing left locked. `device` does it; by default the thread's current one."""
        self._pieces: list[int] = []
        self._device: str | int | None = device
        with _cudart(device) as (cudart, self._device):
            for start in range(address, address + nbytes, PIECE_NBYTES):
                piece = min(PIECE_NBYTES, address + nbytes - start)
                if code := int(cudart.cudaHostRegister(start, piece, PORTABLE | READ_ONLY)):
                    self.release()
                    raise SegmentError(
                        f"cudaHostRegister of {piece:,} bytes gave error {code}: raise the memory-lock limit (`ulimit "
                        "-l unlimited`, containers: `--ulimit memlock=-1`), or go on unpinned"
                    )
                self._pieces.append(start)

    def release(self) -> None:
        """Undo it; before the range is unmapped. Harmless when repeated."""
        pieces, self._pieces = self._pieces, []
        if pieces:
            with _cudart(self._device) as (cudart, _):
                for address in pieces:
                    cudart.cudaHostUnregister(address)


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

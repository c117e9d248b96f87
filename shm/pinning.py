"""Page-locking shared memory for CUDA, in the engine's process only.

A `PROT_READ`, `MAP_SHARED` mapping registers with the read-only flag and copies at the bus's speed. Some drivers
refuse hundreds of GiB in one call, so a range is registered in pieces, and unregistered before it is unmapped.
"""

from __future__ import annotations

from typing import Any

from shm.errors import SegmentError

PIECE_NBYTES = 16 << 30
PORTABLE = 1  # cudaHostRegisterPortable: good in every CUDA context of the process
READ_ONLY = 8  # cudaHostRegisterReadOnly


def _cudart() -> Any:
    import torch

    if not torch.cuda.is_available():
        raise SegmentError("there is no CUDA device here: pin() is for hosts with one, everything else works without")
    torch.cuda.init()  # type: ignore[no-untyped-call]
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def pin(address: int, nbytes: int) -> list[int]:
    """Page-lock a range; the addresses to give to `unpin`. Raises SegmentError, with nothing left pinned."""
    cudart = _cudart()
    pinned: list[int] = []
    for start in range(address, address + nbytes, PIECE_NBYTES):
        piece = min(PIECE_NBYTES, address + nbytes - start)
        code = int(cudart.cudaHostRegister(start, piece, PORTABLE | READ_ONLY))
        if code:
            unpin(pinned)
            raise SegmentError(
                f"cudaHostRegister of {piece:,} bytes gave error {code}: raise the memory-lock limit (`ulimit -l "
                "unlimited`, containers: `--ulimit memlock=-1`), or go on unpinned"
            )
        pinned.append(start)
    return pinned


def unpin(addresses: list[int]) -> None:
    """Undo `pin`."""
    if not addresses:
        return
    cudart = _cudart()
    for address in addresses:
        cudart.cudaHostUnregister(address)

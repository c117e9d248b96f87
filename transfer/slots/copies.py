"""Copy instructions between an expert block and an engine's own memory, and carrying them out on the CPU.

A copy is `rows` runs of `run_nbytes` bytes. In the block they are `block_pitch` apart, at the destination
`address_pitch`: what cudaMemcpy2D takes. A single run has both pitches equal to its length.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from shm.errors import InvalidInput


class SlotCopy(NamedTuple):
    """One instruction. Bytes throughout; `tensor` is the index in `Slots.tensors` of the tensor it lands in."""

    block_offset: int
    address: int
    rows: int
    run_nbytes: int
    block_pitch: int
    address_pitch: int
    tensor: int

    @property
    def nbytes(self) -> int:
        return self.rows * self.run_nbytes


def normalise(copy: SlotCopy) -> SlotCopy:
    """The same copy with rows that touch on both sides as one run."""
    whole = copy.nbytes
    if copy.rows == 1 or copy.run_nbytes == copy.block_pitch == copy.address_pitch:
        return copy._replace(rows=1, run_nbytes=whole, block_pitch=whole, address_pitch=whole)
    return copy


def coalesce(copies: Iterable[SlotCopy]) -> tuple[SlotCopy, ...]:
    """The same bytes in ascending order of block offset, runs that touch on both sides made one."""
    out: list[SlotCopy] = []
    for copy in sorted(normalise(c) for c in copies if c.nbytes):
        last = out[-1] if out else None
        if (
            last is not None
            and last.rows == copy.rows == 1
            and last.tensor == copy.tensor
            and last.block_offset + last.run_nbytes == copy.block_offset
            and last.address + last.run_nbytes == copy.address
        ):
            out[-1] = normalise(last._replace(run_nbytes=last.run_nbytes + copy.run_nbytes))
        else:
            out.append(copy)
    return tuple(out)


def apply_copies(block: Any, copies: Sequence[SlotCopy]) -> None:
    """Copy a block's bytes to where `copies` say.

    `block` is any readable buffer of the whole block. The addresses must lie in this process's CPU memory, and
    what they point into must be alive. Large copies release the GIL. Raises InvalidInput, before a byte moves,
    if a copy reaches past the block's end.
    """
    base, held = _address_of(block, copies)
    for copy in copies:
        _move(copy.address, copy.address_pitch, base + copy.block_offset, copy.block_pitch, copy)
    del held


def gather_copies(block: Any, copies: Sequence[SlotCopy]) -> None:
    """The reverse: fill a writable block from the addresses, leaving bytes that no copy names as they are.

    On a zeroed buffer this gives back the block's own bytes if the copies hold it whole (`SlotPlan.is_whole`),
    so its checksum can be taken at the destination. Same terms as `apply_copies`.
    """
    if memoryview(block).readonly:
        raise InvalidInput("the buffer to gather into is read-only: give a writable one, such as a bytearray")
    base, held = _address_of(block, copies)
    for copy in copies:
        _move(base + copy.block_offset, copy.block_pitch, copy.address, copy.address_pitch, copy)
    del held


def holds_copies(block: Any, copies: Sequence[SlotCopy]) -> bool:
    """Whether the addresses have the block's bytes, as after `apply_copies`. Same terms."""
    base, held = _address_of(block, copies)
    same = all(
        np.array_equal(
            _rows_at(copy.address, copy.address_pitch, copy), _rows_at(base + copy.block_offset, copy.block_pitch, copy)
        )
        for copy in copies
    )
    del held
    return same


def _address_of(block: Any, copies: Sequence[SlotCopy]) -> tuple[int, npt.NDArray[np.uint8]]:
    held = np.frombuffer(block, np.uint8)
    end = max((c.block_offset + (c.rows - 1) * c.block_pitch + c.run_nbytes for c in copies), default=0)
    if end > held.nbytes:
        raise InvalidInput(f"a copy ends at byte {end} of a block of {held.nbytes}: the copies are of another block")
    return held.ctypes.data, held


def _move(to: int, to_pitch: int, source: int, source_pitch: int, copy: SlotCopy) -> None:
    if copy.rows == 1:
        ctypes.memmove(to, source, copy.run_nbytes)
    else:
        np.copyto(_rows_at(to, to_pitch, copy), _rows_at(source, source_pitch, copy))


def _rows_at(address: int, pitch: int, copy: SlotCopy) -> npt.NDArray[np.uint8]:
    span = (copy.rows - 1) * pitch + copy.run_nbytes
    memory = memoryview((ctypes.c_uint8 * span).from_address(address)).cast("B")
    return np.ndarray((copy.rows, copy.run_nbytes), np.uint8, memory, strides=(pitch, 1))

"""What lies in a segment, read from outside and by the rules of the format alone, against what should."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shm import posix
from shm.errors import SegmentError, SegmentNotFound
from shm.header import Header
from shm.layout import HEADER_NBYTES, BlockState, Entries, SegmentName, SegmentState, copy_offset
from shm.lookup import read_header, read_manifest
from shm.manifest import Manifest
from shm.table import read_entries, table_copies
from tests.soak.ground import MODEL
from transfer.checkpoint import read_checkpoint

LOOKS = 3  # at a block that differs: its owner may be mending it, and have it hidden, or whole again, a moment later
LOOK_PAUSE_S = 0.02


def manifest_of(checkpoint: Path) -> Manifest:
    return read_checkpoint(checkpoint, MODEL).manifest


def expected_blocks(checkpoint: Path) -> list[bytes]:
    """Every block's bytes by manifest row, read from the files one tensor at a time."""
    read = read_checkpoint(checkpoint, MODEL)
    blocks = []
    for row in range(len(read.manifest)):
        block = bytearray(int(read.manifest.nbytes[row]))
        for tensor in read.manifest.block(row).tensors:
            with read.path(tensor.file).open("rb") as file:
                file.seek(tensor.file_offset)
                block[tensor.offset : tensor.offset + tensor.nbytes] = file.read(tensor.nbytes)
        blocks.append(bytes(block))
    return blocks


@dataclass
class Image:
    """A node's segment, mapped; it stays readable when its name is gone."""

    header: Header
    manifest: Manifest
    memory: mmap.mmap
    _copies: tuple[Entries, ...]

    @property
    def is_sealed(self) -> bool:
        return self.header.state is SegmentState.SEALED

    def published(self) -> list[int]:
        """Manifest rows of the blocks that a reader would find."""
        entries, lost = read_entries(self._copies, np.arange(len(self.manifest)))
        rows: list[int] = np.flatnonzero(~lost & (entries["state"] == BlockState.PUBLISHED)).tolist()
        return rows

    def place(self, row: int) -> tuple[int, int]:
        """(offset, nbytes) of a block in the object."""
        entries, _ = read_entries(self._copies, np.array([row]))
        return int(entries["offset"][0]), int(entries["nbytes"][0])

    def block(self, row: int) -> bytes:
        return self._bytes(*self.place(row))

    def wrong(self, expected: Sequence[bytes]) -> list[int]:
        """Rows that are published and do not have the bytes that they should."""
        return [row for row in self.published() if self._differs(row, expected[row])]

    def _differs(self, row: int, expected: bytes) -> bool:
        for _ in range(LOOKS):
            if self.block(row) == expected or row not in self.published():
                return False
            time.sleep(LOOK_PAUSE_S)
        return True

    def sections(self) -> dict[str, tuple[int, int]]:
        """(offset, nbytes) of all that the object consists of, by name; blocks as `block ROW`."""
        header = self.header
        found = {"header": (0, HEADER_NBYTES), "second header": (HEADER_NBYTES, HEADER_NBYTES)}
        for name, offset, nbytes in (
            ("manifest", header.manifest_offset, header.manifest_nbytes),
            ("table", header.table_offset, header.table_nbytes),
        ):
            found |= {name: (offset, nbytes), f"second {name}": (copy_offset(offset, nbytes), nbytes)}
        return found | {f"block {row}": self.place(row) for row in self.published()}

    def unlike(self) -> list[str]:
        """The sections that are there twice, and not the same."""
        sections = self.sections()
        pairs = {name: (sections[name], sections[f"second {name}"]) for name in ("header", "manifest", "table")}
        return [name for name, (one, other) in pairs.items() if self._bytes(*one) != self._bytes(*other)]

    def _bytes(self, offset: int, nbytes: int) -> bytes:
        return self.memory[offset : offset + nbytes]


def look(namespace: str, node: str) -> Image | None:
    """The segment as it is now; None where there is none, or none with anything in it yet."""
    name = SegmentName(namespace, MODEL, node).object_name
    try:
        fd = posix.open_existing(name, read_only=True)
    except SegmentNotFound:
        return None
    try:
        header = read_header(fd, name)
        if header.state is SegmentState.CLAIMED:
            return None
        memory = mmap.mmap(fd, header.total_nbytes, access=mmap.ACCESS_READ)
    except SegmentError:
        return None
    finally:
        os.close(fd)
    view = memoryview(memory)
    manifest = read_manifest(view, header, name)
    return Image(header, manifest, memory, table_copies(view, header.table_offset, header.table_nbytes))


def flip(namespace: str, node: str, bit: int) -> None:
    """Flip a bit of a node's object behind its back, counted from the object's start."""
    fd = posix.open_existing(SegmentName(namespace, MODEL, node).object_name, read_only=False)
    try:
        with mmap.mmap(fd, 0) as memory:
            memory[bit // 8] ^= 1 << bit % 8
    finally:
        os.close(fd)

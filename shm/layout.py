"""What names a segment and where everything in it lies. docs/format.md is the format in full, with MUST and MAY.

    0                     two header pages (`shm.header`)
    manifest_offset       the manifest's canonical bytes (`shm.manifest`), and once more
    table_offset          one ENTRY a manifest row, in the same order (`shm.table`), and once more
    data_offset           blocks, each aligned to BLOCK_ALIGNMENT

Each part begins on the page after the one before. Whatever leads to a block is there twice and checked: a bit that
flips in it is found, and costs nothing. A block itself is there once, and its checksum finds what flips in it.
Blocks are placed in order of their rows, so a segment's plan follows from the manifest and the rows that it holds.

Names: `hotspare.<namespace>.<model>.<node>`, made safe. A part that had to be changed, or that has a dot of its own,
adds a digest of all three, so that no two segments share a name. What it holds, the header says; the name finds it.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from shm.manifest import Manifest, check_name

SHM_DIRECTORY = "/dev/shm"
MAGIC = b"HOTSPARE"
VERSION = 2
HEADER_NBYTES = 4096
COPIES = 2  # of the header, the manifest and the block table
MANIFEST_OFFSET = COPIES * HEADER_NBYTES
BLOCK_ALIGNMENT = 4096  # bytes; a page, so that no two blocks share one
PREFIX = "hotspare"
PART_CHARS_MAX = 64  # of each part of the object's name; NAME_MAX is 255

ENTRY = np.dtype(
    [("offset", "<u8"), ("nbytes", "<u8"), ("checksum", "V16"), ("state", "<u4"), ("reserved", "<u4"), ("check", "<u8")]
)
"""One row of the block table: offset from the start of the object, bytes, xxh3-128 big-endian of the block,
`BlockState`, zero, and `entry_checks` of the row number and the first three."""

_HALVES = struct.Struct("<QQ")  # of a block's checksum, as two words
_U64 = 0xFFFFFFFFFFFFFFFF


class SegmentState(IntEnum):
    CLAIMED = 0
    FILLING = 1
    SEALED = 2


class BlockState(IntEnum):
    """Any two differ in 16 of 32 bits, and each from none and all: no few flips make one of another."""

    ABSENT = 0x55555555
    RESERVED = 0x33333333
    PUBLISHED = 0x0F0F0F0F
    QUARANTINED = 0x00FF00FF


Int64s = npt.NDArray[np.int64]
Entries = npt.NDArray[np.void]


def _safe(part: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "_", part)[:PART_CHARS_MAX]


def object_prefix(namespace: str, model: str) -> str:
    """What the object names of all nodes' segments of a model begin with; those of others may too."""
    return f"{PREFIX}.{_safe(namespace)}.{_safe(model)}."


@dataclass(frozen=True, slots=True)
class SegmentName:
    """Who a segment belongs to. Each part is 1 to 200 printable characters."""

    namespace: str
    model: str
    node: str

    def __post_init__(self) -> None:
        for what, part in (("namespace", self.namespace), ("model", self.model), ("node", self.node)):
            check_name(what, part)

    @property
    def object_name(self) -> str:
        """The POSIX name, without the leading slash: its file name in /dev/shm."""
        parts = (self.namespace, self.model, self.node)
        safe = tuple(map(_safe, parts))
        name = ".".join((PREFIX, *safe))
        if safe == parts and not any("." in part for part in parts):
            return name
        return f"{name}.{xxhash.xxh3_64_hexdigest(chr(0).join(parts).encode())}"

    def __str__(self) -> str:
        return f"{self.model} on node {self.node} (namespace {self.namespace})"


def align(offset: int, to: int = BLOCK_ALIGNMENT) -> int:
    """The first multiple of `to` at or after `offset`."""
    return -(-offset // to) * to


def copy_offset(offset: int, nbytes: int) -> int:
    """Where the second copy of a section lies: on the page after the first."""
    return align(offset + nbytes)


def _mixed(word: Any) -> Any:
    """The finalizer of splitmix64: one to one, and each bit of what comes in moves half of those that go out."""
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & _U64
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & _U64
    return word ^ (word >> 31)


def _check(row: Any, words: Iterable[Any]) -> Any:
    check = _mixed(row + 1)
    for word in words:
        check = _mixed(check ^ word)
    return check


def entry_checks(rows: Int64s, entries: Entries) -> npt.NDArray[np.uint64]:
    """The check of each entry: over its row number, offset, nbytes and checksum; its state changes by itself.

    Each step is one to one, so a change that is confined to one of the words is always seen. All rows are taken at
    once, which a checksum of a library takes one by one: that would be most of the time of attaching.
    """
    words = np.ascontiguousarray(entries).view("<u8").reshape(len(entries), ENTRY.itemsize // 8)
    checks: npt.NDArray[np.uint64] = _check(rows.astype(np.uint64), (words[:, at] for at in range(4)))
    return checks


def entry_check(row: int, offset: int, nbytes: int, checksum: bytes) -> int:
    """The same of one entry, which is quicker than a table of one row."""
    return int(_check(row, (offset, nbytes, *_HALVES.unpack(checksum))))


def absent_entries(rows: Int64s) -> Entries:
    """Entries of blocks that have no place."""
    entries = np.zeros(len(rows), dtype=ENTRY)
    entries["state"] = BlockState.ABSENT
    entries["check"] = entry_checks(rows, entries)
    return entries


@dataclass(frozen=True, slots=True)
class Plan:
    """Where everything of a segment lies, before it exists. Offsets in bytes from its start."""

    manifest_nbytes: int
    table_offset: int
    table_nbytes: int
    data_offset: int
    total_nbytes: int
    table: Entries


def place_blocks(manifest: Manifest, indices: Iterable[int], start: int) -> tuple[Int64s, Int64s, int]:
    """Rows, their offsets from `start` on, and the end: blocks in ascending order, page by page."""
    rows = np.array(sorted(set(indices)), dtype=np.int64)
    spans = -(-manifest.nbytes[rows] // BLOCK_ALIGNMENT) * BLOCK_ALIGNMENT
    ends = start + np.cumsum(spans)
    return rows, ends - spans, int(ends[-1]) if len(rows) else start


def plan_segment(manifest: Manifest, indices: Iterable[int]) -> Plan:
    """Lay out a segment that holds the blocks of these manifest rows."""
    manifest_nbytes = len(manifest.to_bytes())
    table_offset = align(copy_offset(MANIFEST_OFFSET, manifest_nbytes) + manifest_nbytes)
    table = absent_entries(np.arange(len(manifest)))
    data_offset = align(copy_offset(table_offset, table.nbytes) + table.nbytes)
    rows, offsets, end = place_blocks(manifest, indices, data_offset)
    table["offset"][rows] = offsets
    table["nbytes"][rows] = manifest.nbytes[rows]
    table["state"][rows] = BlockState.RESERVED
    table["check"] = entry_checks(np.arange(len(table)), table)
    return Plan(manifest_nbytes, table_offset, table.nbytes, data_offset, end, table)

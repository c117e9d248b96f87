"""What names a segment and where everything in it lies. docs/format.md is the format in full, with MUST and MAY.

    0                     header page (`shm.header`)
    manifest_offset       the manifest's canonical bytes (`shm.manifest`)
    table_offset          one ENTRY a manifest row, in the same order
    data_offset           blocks, each aligned to BLOCK_ALIGNMENT

Each section begins on the page after the one before. Blocks are placed in order of their rows, so a segment's plan
follows from the manifest and the rows that it holds, before it exists.

Names: `hotspare.<namespace>.<model>.<node>`, made safe. A part that had to be changed, or that has a dot of its own,
adds a digest of all three, so that no two segments share a name. What it holds, the header says; the name finds it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import xxhash

from shm.manifest import Manifest, check_name

SHM_DIRECTORY = "/dev/shm"
MAGIC = b"HOTSPARE"
VERSION = 1
HEADER_NBYTES = 4096
STATE_OFFSET = 16
BLOCK_ALIGNMENT = 4096  # bytes; a page, so that no two blocks share one
PREFIX = "hotspare"
PART_CHARS_MAX = 64  # of each part of the object's name; NAME_MAX is 255

ENTRY = np.dtype(
    [("offset", "<u8"), ("nbytes", "<u8"), ("checksum", "V16"), ("state", "<u4"), ("reserved", "<u4", (3,))]
)
"""One row of the block table: offset from the start of the object, bytes, xxh3-128 big-endian, `BlockState`."""


class SegmentState(IntEnum):
    CLAIMED = 0
    FILLING = 1
    SEALED = 2


class BlockState(IntEnum):
    ABSENT = 0
    RESERVED = 1
    PUBLISHED = 2
    QUARANTINED = 3


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


@dataclass(frozen=True, slots=True)
class Plan:
    """Where everything of a segment lies, before it exists. Offsets in bytes from its start."""

    manifest_offset: int
    manifest_nbytes: int
    table_offset: int
    table_nbytes: int
    data_offset: int
    total_nbytes: int
    table: npt.NDArray[np.void]


Int64s = npt.NDArray[np.int64]


def place_blocks(manifest: Manifest, indices: Iterable[int], start: int) -> tuple[Int64s, Int64s, int]:
    """Rows, their offsets from `start` on, and the end: blocks in ascending order, page by page."""
    rows = np.array(sorted(set(indices)), dtype=np.int64)
    spans = -(-manifest.nbytes[rows] // BLOCK_ALIGNMENT) * BLOCK_ALIGNMENT
    ends = start + np.cumsum(spans)
    return rows, ends - spans, int(ends[-1]) if len(rows) else start


def plan_segment(manifest: Manifest, indices: Iterable[int]) -> Plan:
    """Lay out a segment that holds the blocks of these manifest rows."""
    manifest_nbytes = len(manifest.to_bytes())
    table_offset = align(HEADER_NBYTES + manifest_nbytes)
    table = np.zeros(len(manifest), dtype=ENTRY)
    data_offset = align(table_offset + table.nbytes)
    rows, offsets, end = place_blocks(manifest, indices, data_offset)
    table["offset"][rows] = offsets
    table["nbytes"][rows] = manifest.nbytes[rows]
    table["state"][rows] = BlockState.RESERVED
    return Plan(HEADER_NBYTES, manifest_nbytes, table_offset, table.nbytes, data_offset, end, table)

"""The bytes of a segment: the one place that knows the format. Version 1, little-endian.

    0                     header page, HEADER_NBYTES: the struct below, then zeros
    manifest_offset       the manifest's canonical bytes
    table_offset          one ENTRY a manifest row, in the same order
    data_offset           blocks, each aligned to BLOCK_ALIGNMENT

A segment MUST begin with MAGIC. A reader MUST refuse a version above its own and a header whose checksum differs.
The checksum covers every header byte but the state, which the owner writes last, in one aligned store. An entry
whose state is not PUBLISHED MUST NOT be read. A block MAY be absent: its entry is then all zeros. The object MAY be
longer than `total_nbytes` while its owner extends it.

Names: `hotspare.<namespace>.<model>.<node>`, made safe. A part that had to be changed, or that has a dot of its own,
adds a digest of all three, so that no two segments share a name. What it holds, the header says; the name finds it.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import xxhash

from shm.errors import (
    SegmentCorrupt,
    SegmentForeign,
    SegmentTooNew,
    SegmentTruncated,
    SegmentUnsealed,
)
from shm.manifest import Manifest, check_name

SHM_DIRECTORY = "/dev/shm"
MAGIC = b"HOTSPARE"
VERSION = 1
HEADER_NBYTES = 4096
STATE_OFFSET = 16
BLOCK_ALIGNMENT = 4096  # bytes; a page, so that no two blocks share one
PREFIX = "hotspare"
PART_CHARS_MAX = 64  # of each part of the object's name; NAME_MAX is 255

_FIXED = struct.Struct("<8sIII4x QQQQ QQQQQQQ 32s16s HHH2x")
_CHECKSUM = struct.Struct("<Q")
_CHECKSUM_OFFSET = HEADER_NBYTES - _CHECKSUM.size
_STATE = struct.Struct("<I")

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


@dataclass(frozen=True, slots=True)
class Header:
    """The header page. Offsets and sizes in bytes, times in ns since the epoch."""

    name: SegmentName
    state: SegmentState
    generation: int
    owner_pid: int
    created_ns: int
    sealed_ns: int
    manifest_offset: int = 0
    manifest_nbytes: int = 0
    table_offset: int = 0
    table_nbytes: int = 0
    data_offset: int = HEADER_NBYTES
    data_nbytes: int = 0
    total_nbytes: int = HEADER_NBYTES
    manifest_digest: bytes = bytes(32)
    origin: bytes = bytes(16)
    """Identity of the checkpoint files that the content came from or was compared with; zeros: none yet."""

    def pack(self) -> bytes:
        """The whole page. `state` is in it, but not under its checksum."""
        names = [part.encode() for part in (self.name.namespace, self.name.model, self.name.node)]
        fixed = _FIXED.pack(
            MAGIC, VERSION, HEADER_NBYTES, 0,
            self.generation, self.owner_pid, self.created_ns, self.sealed_ns,
            self.manifest_offset, self.manifest_nbytes, self.table_offset, self.table_nbytes,
            self.data_offset, self.data_nbytes, self.total_nbytes,
            self.manifest_digest, self.origin, *map(len, names),
        )  # fmt: skip
        page = (fixed + b"".join(names)).ljust(_CHECKSUM_OFFSET, b"\0")
        page += _CHECKSUM.pack(xxhash.xxh3_64_intdigest(page))
        return page[:STATE_OFFSET] + _STATE.pack(self.state) + page[STATE_OFFSET + _STATE.size :]

    @classmethod
    def unpack(cls, page: bytes, object_name: str, object_nbytes: int) -> Header:
        """Read a header page; raises the SegmentError that says what is wrong with it."""
        where = f"{SHM_DIRECTORY}/{object_name}"
        if len(page) < HEADER_NBYTES:
            raise SegmentTruncated(f"{where} has {object_nbytes} bytes, less than a header: `hotspare rm` it")
        if not any(page):  # reserved, and its owner stopped or killed before the header was written
            raise SegmentUnsealed(f"{where} has no header yet: wait until its node is ready, then try again")
        if page[:8] != MAGIC:
            raise SegmentForeign(f"{where} is not a Hotspare segment: it does not begin with {MAGIC.decode()}")
        version = int.from_bytes(page[8:12], "little")
        if version > VERSION:
            raise SegmentTooNew(
                f"{where} has format {version}, this Hotspare reads up to {VERSION}: upgrade the reading side"
            )
        state = _STATE.unpack_from(page, STATE_OFFSET)[0]
        stateless = page[:STATE_OFFSET] + bytes(_STATE.size) + page[STATE_OFFSET + _STATE.size : _CHECKSUM_OFFSET]
        if xxhash.xxh3_64_intdigest(stateless) != _CHECKSUM.unpack_from(page, _CHECKSUM_OFFSET)[0]:
            raise SegmentCorrupt(f"{where}: the header does not match its checksum: `hotspare rm` it, and refill")
        if state not in SegmentState._value2member_map_:
            raise SegmentCorrupt(f"{where}: unknown state {state}: `hotspare rm` it, and refill")
        try:
            header = cls._from_page(page, SegmentState(state))
        except ValueError as error:
            raise SegmentCorrupt(f"{where}: the header names nobody ({error}): `hotspare rm` it, and refill") from error
        if header.state is SegmentState.SEALED and object_nbytes < header.total_nbytes:
            raise SegmentTruncated(
                f"{where} has {object_nbytes} bytes, its header says {header.total_nbytes}: `hotspare rm` it, refill"
            )
        return header

    @classmethod
    def _from_page(cls, page: bytes, state: SegmentState) -> Header:
        (_, _, _, _, generation, pid, created, sealed, m_off, m_n, t_off, t_n, d_off, d_n, total, digest, origin,
         *lengths) = _FIXED.unpack_from(page)  # fmt: skip
        names, at = [], _FIXED.size
        for length in lengths:
            names.append(page[at : at + length].decode())
            at += length
        return cls(
            SegmentName(*names), state, generation, pid, created, sealed,
            m_off, m_n, t_off, t_n, d_off, d_n, total, digest, origin,
        )  # fmt: skip


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

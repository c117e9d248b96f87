"""The header page of a segment: what it says, its bytes, and what is refused of them. docs/format.md is the format.

There are two pages with the same content. The owner writes one after the other, so whenever it dies or is looked at,
one of them is whole; and a page that is damaged later is one of two.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import xxhash

from shm.errors import SegmentCorrupt, SegmentError, SegmentForeign, SegmentTooNew, SegmentTruncated, SegmentUnsealed
from shm.layout import HEADER_NBYTES, MAGIC, MANIFEST_OFFSET, SHM_DIRECTORY, VERSION, SegmentName, SegmentState

_FIXED = struct.Struct("<8sIII4x QQQQ QQQQQQQ 32s16s16s HHH2x")
_RESERVED = (20, 21, 22, 23, 182, 183)  # bytes that the struct leaves out
_CHECKSUM = struct.Struct("<Q")
_CHECKSUM_OFFSET = HEADER_NBYTES - _CHECKSUM.size


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
    data_offset: int = MANIFEST_OFFSET
    data_nbytes: int = 0
    total_nbytes: int = MANIFEST_OFFSET
    manifest_digest: bytes = bytes(32)
    origin: bytes = bytes(16)
    """Identity of the checkpoint files that the content came from or was compared with; zeros: none yet."""
    content_digest: bytes = bytes(16)
    """Identity of the content's bytes; zeros: not known."""

    def pack(self) -> bytes:
        """The whole page, its checksum over all that stands before it."""
        names = [part.encode() for part in (self.name.namespace, self.name.model, self.name.node)]
        fixed = _FIXED.pack(
            MAGIC, VERSION, HEADER_NBYTES, self.state,
            self.generation, self.owner_pid, self.created_ns, self.sealed_ns,
            self.manifest_offset, self.manifest_nbytes, self.table_offset, self.table_nbytes,
            self.data_offset, self.data_nbytes, self.total_nbytes,
            self.manifest_digest, self.origin, self.content_digest, *map(len, names),
        )  # fmt: skip
        page = (fixed + b"".join(names)).ljust(_CHECKSUM_OFFSET, b"\0")
        return page + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(page))

    @classmethod
    def read(cls, pages: bytes, object_name: str, object_nbytes: int) -> Header:
        """Read the first of the two pages that is whole. If none is, raises what is wrong with the first of ours."""
        first, second = pages[:HEADER_NBYTES], pages[HEADER_NBYTES:MANIFEST_OFFSET]
        try:
            return cls.unpack(first, object_name, object_nbytes)
        except SegmentError as error:
            try:
                return cls.unpack(second, object_name, object_nbytes)
            except SegmentError as other:
                raise (other if _is_ours(second) and not _is_ours(first) else error) from None

    @classmethod
    def unpack(cls, page: bytes, object_name: str, object_nbytes: int) -> Header:
        """Read a header page; raises the SegmentError that says what is wrong with it."""
        where = f"{SHM_DIRECTORY}/{object_name}"
        _check_kind(page, where, object_nbytes)
        _check_page(page, where)
        try:
            header = cls._from_page(page)
        except ValueError as error:
            raise corrupt(where, f"the header names nobody ({error})") from error
        if object_nbytes < header.total_nbytes:
            raise SegmentTruncated(
                f"{where} has {object_nbytes} bytes, its header says {header.total_nbytes}: `hotspare rm` it, refill"
            )
        return header

    @classmethod
    def _from_page(cls, page: bytes) -> Header:
        (_, _, _, state, generation, pid, created, sealed, m_off, m_n, t_off, t_n, d_off, d_n, total, digest, origin,
         content, *lengths) = _FIXED.unpack_from(page)  # fmt: skip
        names, at = [], _FIXED.size
        for length in lengths:
            names.append(page[at : at + length].decode())
            at += length
        if any(page[at:_CHECKSUM_OFFSET]):
            raise ValueError("more follows the names")
        return cls(
            SegmentName(*names), SegmentState(state), generation, pid, created, sealed,
            m_off, m_n, t_off, t_n, d_off, d_n, total, digest, origin, content,
        )  # fmt: skip


def corrupt(where: str, what: str) -> SegmentCorrupt:
    """The error for a segment that breaks a rule of the format."""
    return SegmentCorrupt(f"{where}: {what}: `hotspare rm` it, and refill")


def _check_kind(page: bytes, where: str, object_nbytes: int) -> None:
    """Whether this is a header of a format that we know: nothing else of the page means anything before that."""
    if len(page) < HEADER_NBYTES:
        raise SegmentTruncated(f"{where} has {object_nbytes} bytes, less than a header: `hotspare rm` it")
    if not any(page):  # reserved, and its owner stopped or killed before the header was written
        raise SegmentUnsealed(f"{where} has no header yet: wait until its node is ready, then try again")
    if not _is_ours(page):
        raise SegmentForeign(
            f"{where} is not a Hotspare segment: it does not begin with {MAGIC.decode()}; remove it (`rm`), or give "
            "the node another --node-id or --namespace"
        )
    version = int.from_bytes(page[8:12], "little")
    if version > VERSION:
        raise SegmentTooNew(
            f"{where} has format {version}, this Hotspare reads up to {VERSION}: upgrade the reading side, "
            "or `hotspare rm` it, and refill"
        )
    if version < VERSION:
        raise SegmentError(
            f"{where} has format {version}, and this Hotspare reads only {VERSION}: start its node with this Hotspare, "
            "which fills it anew, or `hotspare rm` it"
        )


def _check_page(page: bytes, where: str) -> None:
    _, _, header_nbytes, state = _FIXED.unpack_from(page)[:4]
    if xxhash.xxh3_64_intdigest(page[:_CHECKSUM_OFFSET]) != _CHECKSUM.unpack_from(page, _CHECKSUM_OFFSET)[0]:
        raise corrupt(where, "the header does not match its checksum")
    if header_nbytes != HEADER_NBYTES:
        raise corrupt(where, f"a header of {header_nbytes} bytes, not of {HEADER_NBYTES}")
    if state not in SegmentState._value2member_map_:
        raise corrupt(where, f"unknown state {state}")
    if any(page[at] for at in _RESERVED):
        raise corrupt(where, "reserved bytes of the header are not zero")


def _is_ours(page: bytes) -> bool:
    return page[: len(MAGIC)] == MAGIC

"""The rules of the format that a checksum cannot hold: what numbers of a segment must be, to be used as numbers.

A checksum says that bytes are those which were written, not that they make sense. So whoever maps a segment, to read
it or to own it, first asks here: a number that is out of its place would otherwise end as an exception of another kind,
as SIGBUS, or as bytes of a neighbour. Nothing here touches a block, and all rows are judged at once, so that attaching
to a large model stays quick. docs/format.md has the rules in words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from shm.block import NBYTES_MAX
from shm.header import Header, corrupt
from shm.layout import (
    BLOCK_ALIGNMENT,
    ENTRY,
    MANIFEST_OFFSET,
    BlockState,
    Entries,
    SegmentState,
    align,
    copy_offset,
)
from shm.manifest import Manifest

SEGMENT_NBYTES_MAX = NBYTES_MAX

Mask = npt.NDArray[np.bool_]


def _end_of_both(offset: int, nbytes: int) -> int:
    return align(copy_offset(offset, nbytes) + nbytes)


# What is said of a header that breaks the rule, and whether it does. All numbers are Python's: none overflows.
_SECTIONS: tuple[tuple[str, Callable[[Header], bool]], ...] = (
    ("it says to be larger than any segment", lambda h: h.total_nbytes > SEGMENT_NBYTES_MAX),
    ("its manifest is not on the page after the headers", lambda h: h.manifest_offset != MANIFEST_OFFSET),
    ("it has no manifest", lambda h: h.manifest_nbytes == 0),
    (
        "its block table is not on the page after the manifests",
        lambda h: h.table_offset != _end_of_both(h.manifest_offset, h.manifest_nbytes),
    ),
    ("its block table is not of whole entries", lambda h: h.table_nbytes == 0 or h.table_nbytes % ENTRY.itemsize != 0),
    (
        "its blocks do not begin on the page after the block tables",
        lambda h: h.data_offset != _end_of_both(h.table_offset, h.table_nbytes),
    ),
    ("its blocks do not end where it ends", lambda h: h.data_offset + h.data_nbytes != h.total_nbytes),
    ("it does not end with a page", lambda h: h.total_nbytes % BLOCK_ALIGNMENT != 0),
)


def check_sections(header: Header, where: str) -> None:
    """The sections follow one another, each on the page after the one before. Raises SegmentCorrupt."""
    if header.state is SegmentState.CLAIMED:
        if _extent(header) != (0, 0, 0, 0, MANIFEST_OFFSET, 0, MANIFEST_OFFSET):
            raise corrupt(where, "it has sections, and is not filled")
        return
    for what, is_broken in _SECTIONS:
        if is_broken(header):
            raise corrupt(where, what)


def _extent(header: Header) -> tuple[int, ...]:
    return (
        header.manifest_offset, header.manifest_nbytes, header.table_offset, header.table_nbytes,
        header.data_offset, header.data_nbytes, header.total_nbytes,
    )  # fmt: skip


def check_length(header: Header, manifest: Manifest, where: str) -> None:
    """The table has an entry a block. Raises SegmentCorrupt."""
    n_entries = header.table_nbytes // ENTRY.itemsize
    if n_entries != len(manifest):
        raise corrupt(where, f"its block table has {n_entries} entries, its manifest {len(manifest)} blocks")


def check_entries(entries: Entries, lost: Mask, manifest: Manifest, header: Header, where: str) -> None:
    """Every entry that is not lost is one that an owner writes. Raises SegmentCorrupt."""
    is_placed = ~lost & (entries["state"] != BlockState.ABSENT)
    for what, broken in _entry_faults(entries, is_placed, manifest.nbytes.astype(np.uint64), header):
        if broken.any():
            layer, expert = manifest.keys[int(broken.argmax())]
            raise corrupt(where, f"the table's entry for expert {expert} of layer {layer} has {what}")


def _entry_faults(entries: Entries, is_placed: Mask, sizes: Any, header: Header) -> Iterator[tuple[str, Mask]]:
    """What is said of entries that break a rule, and which do. Later rules count on the ones before."""
    offset = entries["offset"]
    yield "another size than the manifest says", is_placed & (entries["nbytes"] != sizes)
    yield "a place that is not on a page", is_placed & (offset % BLOCK_ALIGNMENT != 0)
    is_outside = (offset < header.data_offset) | (offset > header.total_nbytes)
    yield "a place outside the segment", is_placed & (is_outside | (offset + sizes > header.total_nbytes))
    yield "a place that is another block's", _overlapping(offset, sizes, is_placed & (sizes > 0))


def _overlapping(offset: Any, sizes: Any, is_placed: Mask) -> Mask:
    """Blocks that begin before one with a lower offset ends; those without a byte are in nobody's way."""
    rows = np.flatnonzero(is_placed)
    rows = rows[np.argsort(offset[rows], kind="stable")]
    broken = np.zeros(len(offset), dtype=bool)
    broken[rows[1:][offset[rows[1:]] < (offset + sizes)[rows[:-1]]]] = True
    return broken

"""Mappings of a segment's object in its owner's process: one of what it was, and one more each time it was extended.

The owner maps it writable to fill it, and once more read-only to serve it: a transfer engine that was given read-only
memory serves whoever reads, and refuses whoever would write, whatever address they name.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import numpy as np

from shm.errors import SegmentError

GRANULARITY = mmap.ALLOCATIONGRANULARITY  # 4 KiB, or 64 on some hosts; the format's pages have 4 KiB on all of them


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes [start, end) of the object lie at `address`; the mapping may begin before that, and `view` with it."""

    start: int
    end: int
    address: int
    view: memoryview


class Extents:
    """The object from its start to `end`, in one mapping or several."""

    def __init__(self, prot: int) -> None:
        """`prot` is mmap's, PROT_READ with or without PROT_WRITE."""
        self._prot = prot
        self._extents: list[Extent] = []

    @property
    def end(self) -> int:
        return self._extents[-1].end if self._extents else 0

    def cover(self, fd: int, end: int) -> None:
        """Map what of the object, up to `end`, is not mapped yet. What is mapped stays where it is."""
        start = self.end
        if start >= end:
            return
        if fd < 0:  # mmap would take it for memory of no object
            raise SegmentError("the segment was given up: claim it again before more of it is mapped")
        first = start // GRANULARITY * GRANULARITY
        mapping = mmap.mmap(fd, end - first, flags=mmap.MAP_SHARED, prot=self._prot, offset=first)
        for advice in ("MADV_HUGEPAGE", "MADV_DONTDUMP"):  # both only advice: an old kernel may refuse
            try:
                mapping.madvise(getattr(mmap, advice))
            except (AttributeError, OSError):
                continue
        address = int(np.frombuffer(mapping, np.uint8).ctypes.data) + start - first
        self._extents.append(Extent(start, end, address, memoryview(mapping)))

    def _find(self, offset: int, nbytes: int) -> Extent:
        """The mapping that has these bytes of the object; no block lies in two."""
        for extent in reversed(self._extents):
            if extent.start <= offset and offset + nbytes <= extent.end:
                return extent
        raise SegmentError(f"bytes {offset:,} to {offset + nbytes:,} of the segment are not mapped: it was given up")

    def address(self, offset: int, nbytes: int) -> int:
        """Where these bytes of the object lie in this process's memory. Raises SegmentError where nothing has them."""
        extent = self._find(offset, nbytes)
        return extent.address + offset - extent.start

    def view(self, offset: int, nbytes: int) -> memoryview:
        """These bytes of the object. Raises SegmentError where nothing has them."""
        extent = self._find(offset, nbytes)
        at = len(extent.view) - (extent.end - offset)
        return extent.view[at : at + nbytes]

    def ranges(self, start: int) -> list[tuple[int, int]]:
        """(address, nbytes) of all that is mapped of the object from `start` on."""
        cut = [(extent, max(extent.start, start)) for extent in self._extents]
        return [(extent.address + at - extent.start, extent.end - at) for extent, at in cut if at < extent.end]

    def views(self) -> tuple[memoryview, ...]:
        """While they live, its addresses stay mapped."""
        return tuple(extent.view for extent in self._extents)

    def clear(self) -> None:
        self._extents.clear()

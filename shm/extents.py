"""Mappings of a segment's object in its owner's process: one of what it was, and one more each time it was extended.

The owner maps it writable to fill it, and once more read-only to serve it: a transfer engine that was given read-only
memory serves whoever reads, and refuses whoever would write, whatever address they name.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import numpy as np

from shm.errors import SegmentError


@dataclass(frozen=True, slots=True)
class Extent:
    """One mapping: bytes [start, end) of the object lie at `address`."""

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
        mapping = mmap.mmap(fd, end - start, flags=mmap.MAP_SHARED, prot=self._prot, offset=start)
        for advice in ("MADV_HUGEPAGE", "MADV_DONTDUMP"):  # both only advice: an old kernel may refuse
            try:
                mapping.madvise(getattr(mmap, advice))
            except (AttributeError, OSError):
                continue
        address = int(np.frombuffer(mapping, np.uint8).ctypes.data)
        self._extents.append(Extent(start, end, address, memoryview(mapping)))

    def find(self, offset: int, nbytes: int) -> tuple[Extent, int]:
        """The mapping that has these bytes of the object, and where in it they begin. No block lies in two."""
        extent = next(e for e in reversed(self._extents) if e.start <= offset and offset + nbytes <= e.end)
        return extent, offset - extent.start

    def ranges(self, start: int) -> list[tuple[int, int]]:
        """(address, nbytes) of all that is mapped of the object from `start` on."""
        cut = [(extent, max(extent.start, start)) for extent in self._extents]
        return [(extent.address + at - extent.start, extent.end - at) for extent, at in cut if at < extent.end]

    def views(self) -> tuple[memoryview, ...]:
        """While they live, its addresses stay mapped."""
        return tuple(extent.view for extent in self._extents)

    def clear(self) -> None:
        self._extents.clear()

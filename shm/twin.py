"""A part of a segment's object that is there twice, so that damage to one is no loss: header, manifest, block table."""

from __future__ import annotations

import os
from dataclasses import dataclass

from shm.layout import copy_offset


@dataclass(frozen=True, slots=True)
class Twin:
    """The bytes of the part as its owner knows them, and where in the object the first of them begins."""

    what: str
    content: bytes
    start: int

    def _places(self) -> tuple[tuple[str, int], tuple[str, int]]:
        return (self.what, self.start), (f"second {self.what}", copy_offset(self.start, len(self.content)))

    def write(self, fd: int) -> None:
        """One after the other: whoever looks, or finds what a killed owner left, finds one that is whole."""
        for _, at in self._places():
            os.pwrite(fd, self.content, at)

    def is_whole(self, fd: int) -> bool:
        """Whether at least one of the two is as it was written."""
        return any(os.pread(fd, len(self.content), at) == self.content for _, at in self._places())

    def mend(self, fd: int) -> list[str]:
        """Write anew what of the two differs; what did."""
        differing = [(what, at) for what, at in self._places() if os.pread(fd, len(self.content), at) != self.content]
        for _, at in differing:
            os.pwrite(fd, self.content, at)
        return [what for what, _ in differing]

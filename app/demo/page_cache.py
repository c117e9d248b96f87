"""How much of some files the kernel keeps in memory, and making it keep none or all of them."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

READ_NBYTES = 4 << 20

_libc = ctypes.CDLL(None, use_errno=True)


def resident_share(paths: Sequence[Path]) -> float:
    """The share of the files' pages that are in memory, 0 to 1. Raises OSError."""
    pages = [_resident(path) for path in paths if path.stat().st_size]
    return sum(there for there, _ in pages) / max(1, sum(total for _, total in pages))


def _resident(path: Path) -> tuple[int, int]:
    """(pages in memory, pages) of one file."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
        view = np.frombuffer(mapping, np.uint8)
        try:
            vector = np.zeros(-(-len(view) // mmap.PAGESIZE), np.uint8)
            where = [ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(len(view)), ctypes.c_void_p(vector.ctypes.data)]
            if _libc.mincore(*where):
                raise OSError(ctypes.get_errno(), "mincore", str(path))
        finally:
            del view  # or the mapping cannot be closed
        return int((vector & 1).sum()), len(vector)


def drop(paths: Sequence[Path]) -> None:
    """Write the files out and ask the kernel to forget their pages; a file system in memory cannot."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def warm(paths: Sequence[Path]) -> None:
    """Read the files, so that the kernel keeps their pages."""
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.read(READ_NBYTES):
                continue

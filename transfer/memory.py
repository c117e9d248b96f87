"""Host memory by address: the one place that turns numbers into buffers."""

from __future__ import annotations

import ctypes
import mmap

MADV_POPULATE_WRITE = 23  # of Linux 5.14; Python has no name for it

_libc = ctypes.CDLL(None)


def view(address: int, nbytes: int) -> memoryview:
    """A writable view of this process's memory. The caller keeps what lies there alive."""
    return memoryview((ctypes.c_ubyte * nbytes).from_address(address)).cast("B")


def populate(address: int, nbytes: int) -> None:
    """Have the pages of writable memory mapped in one go, before bytes are copied in: one fault a page is slower.

    Only advice: a kernel that refuses it maps them as they are touched, and a shortage shows then. Memory that is not
    the host's is passed over.
    """
    if nbytes:
        start = address // mmap.PAGESIZE * mmap.PAGESIZE
        _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(address + nbytes - start), MADV_POPULATE_WRITE)


def address_of(buffer: memoryview) -> int:
    """Where a writable buffer lies."""
    return ctypes.addressof(ctypes.c_ubyte.from_buffer(buffer))

"""Host memory by address: the one place that turns numbers into buffers."""

from __future__ import annotations

import ctypes
import mmap

from transfer.plan import Piece

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


def gather(pieces: tuple[Piece, ...]) -> memoryview | None:
    """The pieces of a block as one view, where they lie in one run; None where they do not."""
    first = pieces[0]
    end = first.destination
    for piece in pieces:
        if piece.destination != end or piece.offset != end - first.destination:
            return None
        end += piece.nbytes
    return view(first.destination, end - first.destination)


def scatter(block: memoryview, pieces: tuple[Piece, ...]) -> None:
    """Copy a block's bytes to where its pieces belong."""
    for piece in pieces:
        view(piece.destination, piece.nbytes)[:] = block[piece.offset : piece.offset + piece.nbytes]

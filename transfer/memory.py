"""Host memory by address: the one place that turns numbers into buffers."""

from __future__ import annotations

import ctypes

from transfer.plan import Piece


def view(address: int, nbytes: int) -> memoryview:
    """A writable view of this process's memory. The caller keeps what lies there alive."""
    return memoryview((ctypes.c_ubyte * nbytes).from_address(address)).cast("B")


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

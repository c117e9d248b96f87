"""What is wanted, what is offered, and the batches that bring one to the other. Pure: nothing here moves a byte.

Batches are bounded in blocks and bytes, and so are the calls that move one; ranges that touch on both sides become one.
Which offer is taken, and what becomes of a block whose source fails, is decided in `transfer.ledger`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import NamedTuple

from transfer.engine import BATCH_NBYTES_MAX, ITEMS_PER_BATCH_MAX, Copy, Watch

LAST_BATCHES_NBYTES_MIN = 8 << 20  # a smaller batch costs more to order than it evens out
ITEM_NBYTES_MAX = 8 << 20  # TCP moves the items of a call side by side, and each item through one connection


class Offer(NamedTuple):
    """A source that has a block, at `address` there; for the disk, any number that puts its reads in order."""

    source: Hashable
    address: int


class Want(NamedTuple):
    """A block to bring: its manifest row, its size, and the checksum it must have; None: take the disk's word."""

    row: int
    nbytes: int
    checksum: bytes | None


class Piece(NamedTuple):
    """Bytes [offset, offset + nbytes) of a block belong at `destination`."""

    destination: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What one source is asked for at a time: whole blocks, and where each lies there. Equal to itself alone.

    `watch` says how far it is, and whether it was recalled: whoever brings it writes the one, who ordered it the other.
    """

    source: Hashable
    wants: tuple[Want, ...]
    addresses: tuple[int, ...]
    nbytes: int
    watch: Watch = field(default_factory=Watch, repr=False)


@dataclass(frozen=True, slots=True)
class Limits:
    """How large a batch may be, in blocks and bytes, and a call, in copies and bytes. A larger block goes alone.

    The last batches of a source are smaller, so that its lanes end together, but not less than `last_nbytes`.
    """

    items: int = ITEMS_PER_BATCH_MAX
    nbytes: int = BATCH_NBYTES_MAX
    last_nbytes: int = LAST_BATCHES_NBYTES_MIN


def coalesce(copies: Iterable[Copy]) -> list[Copy]:
    """Join copies that touch on both sides, in the order given."""
    joined: list[Copy] = []
    for copy in copies:
        if joined:
            last = joined[-1]
            if last.destination + last.nbytes == copy.destination and last.source + last.nbytes == copy.source:
                joined[-1] = Copy(last.destination, last.source, last.nbytes + copy.nbytes)
                continue
        joined.append(copy)
    return joined


class Queue:
    """The blocks that wait for one source, in ascending order of address there. Those that come again go last."""

    def __init__(self) -> None:
        self._heap: list[tuple[bool, int, int, Want]] = []
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._heap)

    def put(self, want: Want, address: int, *, is_again: bool = False) -> None:
        """Let a block wait. One that comes again is cut alone: so what is wrong with it costs no other block."""
        heappush(self._heap, (is_again, address, want.row, want))
        self.nbytes += want.nbytes

    def cut(self, source: Hashable, limits: Limits) -> Batch:
        """Take the next batch of whole blocks. Somebody must wait."""
        wants: list[Want] = []
        addresses: list[int] = []
        nbytes = 0
        while self._heap:
            is_again, address, _, want = self._heap[0]
            if wants and (is_again or nbytes + want.nbytes > limits.nbytes or len(wants) >= limits.items):
                break
            heappop(self._heap)
            wants.append(want)
            addresses.append(address)
            nbytes += want.nbytes
        self.nbytes -= nbytes
        return Batch(source, tuple(wants), tuple(addresses), nbytes)

    def take_last(self, is_wanted: Callable[[int], bool], nbytes: int) -> list[Want]:
        """Send away the last of those rows that are wanted elsewhere, up to so many bytes, but one at least."""
        taken: list[Want] = []
        left = nbytes
        for _, _, row, want in sorted(self._heap, reverse=True):
            if taken and want.nbytes > left:
                break
            if is_wanted(row):
                taken.append(want)
                left -= want.nbytes
        gone = {want.row for want in taken}
        self._heap = [each for each in self._heap if each[2] not in gone]
        heapify(self._heap)
        self.nbytes -= sum(want.nbytes for want in taken)
        return taken

    def clear(self) -> list[int]:
        """Send all away; their rows."""
        rows = [row for _, _, row, _ in self._heap]
        self._heap, self.nbytes = [], 0
        return rows


def in_pieces(wants: Iterable[Want], nbytes: int) -> list[list[Want]]:
    """The wants in their order, in pieces of at most so many bytes each, or of one block that is larger."""
    pieces: list[list[Want]] = []
    left = 0
    for want in wants:
        if not pieces or want.nbytes > left:
            pieces.append([])
            left = nbytes
        pieces[-1].append(want)
        left -= want.nbytes
    return pieces


def sliced(copies: Iterable[Copy]) -> list[Copy]:
    """Cut copies into items that can go side by side."""
    return [
        Copy(to + at, source + at, min(ITEM_NBYTES_MAX, nbytes - at))
        for to, source, nbytes in copies
        for at in range(0, nbytes, ITEM_NBYTES_MAX)
    ]


def split(copies: Sequence[Copy], limits: Limits) -> list[list[Copy]]:
    """Cut copies into calls within the limits."""
    calls: list[list[Copy]] = []
    nbytes = 0
    for copy in copies:
        for at in range(0, copy.nbytes, limits.nbytes):
            size = min(limits.nbytes, copy.nbytes - at)
            if not calls or nbytes + size > limits.nbytes or len(calls[-1]) >= limits.items:
                calls.append([])
                nbytes = 0
            calls[-1].append(Copy(copy.destination + at, copy.source + at, size))
            nbytes += size
    return calls

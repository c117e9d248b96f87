"""Which source serves which block into which addresses, in what batches. Pure: nothing here moves a byte.

Replicas share the load by bytes; ranges that touch on both sides become one; batches are bounded in items and bytes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transfer.engine import BATCH_NBYTES_MAX, ITEMS_PER_BATCH_MAX, Copy


class Piece(NamedTuple):
    """Bytes [offset, offset + nbytes) of a block belong at `destination`."""

    destination: int
    offset: int
    nbytes: int


class Offer(NamedTuple):
    """A source that has a block, at `address` there; for the disk, any number that puts its reads in order."""

    source: str
    address: int


class Want(NamedTuple):
    """A block to bring: its manifest row, size, and where its pieces belong. `checksum` None: take the disk's word."""

    row: int
    nbytes: int
    pieces: tuple[Piece, ...]
    checksum: bytes | None


@dataclass(frozen=True, slots=True)
class Batch:
    """What one call moves: whole blocks, and the copies that bring them, from one source."""

    source: str
    wants: tuple[Want, ...]
    copies: tuple[Copy, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Limits:
    """How large a batch may be. A block larger than either limit is a batch of its own, sent in several calls."""

    items: int = ITEMS_PER_BATCH_MAX
    nbytes: int = BATCH_NBYTES_MAX


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """Batches by source, in the order in which they should go, and the rows that nobody offers."""

    batches: Mapping[str, tuple[Batch, ...]]
    unserved: tuple[int, ...]


def assign(wants: Iterable[Want], offers: Mapping[int, Sequence[Offer]]) -> dict[str, list[tuple[Want, Offer]]]:
    """Give every block to the offering source with the fewest bytes so far; ties go to the one offered first.

    Blocks with the fewest offers go first: those with a choice then even out what those without have left uneven.
    """
    load: dict[str, int] = defaultdict(int)
    work: dict[str, list[tuple[Want, Offer]]] = defaultdict(list)
    for want in sorted(wants, key=lambda want: len(offers.get(want.row, ()))):
        offered = offers.get(want.row)
        if not offered:
            continue
        offer = offered[0] if len(offered) == 1 else min(offered, key=lambda o: load[o.source])
        load[offer.source] += want.nbytes
        work[offer.source].append((want, offer))
    return work


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


def batches(source: str, work: Sequence[tuple[Want, Offer]], limits: Limits) -> tuple[Batch, ...]:
    """Cut one source's work into bounded batches of whole blocks, in ascending order of address there."""
    made: list[Batch] = []
    wants: list[Want] = []
    copies: list[Copy] = []
    nbytes = 0
    for want, offer in sorted(work, key=lambda pair: (pair[1].address, pair[0].row)):
        if wants and (nbytes + want.nbytes > limits.nbytes or len(copies) + len(want.pieces) > limits.items):
            made.append(Batch(source, tuple(wants), tuple(coalesce(copies)), nbytes))
            wants, copies, nbytes = [], [], 0
        wants.append(want)
        copies.extend(Copy(p.destination, offer.address + p.offset, p.nbytes) for p in want.pieces)
        nbytes += want.nbytes
    if wants:
        made.append(Batch(source, tuple(wants), tuple(coalesce(copies)), nbytes))
    return tuple(made)


def plan(wants: Iterable[Want], offers: Mapping[int, Sequence[Offer]], limits: Mapping[str, Limits]) -> RestorePlan:
    """Plan one round: `offers` by row, equally near; `limits` by source, the defaults where none are given."""
    wants = list(wants)
    work = assign(wants, offers)
    default = Limits()
    planned = {source: batches(source, work[source], limits.get(source, default)) for source in sorted(work)}
    unserved = tuple(want.row for want in wants if not offers.get(want.row))
    return RestorePlan(planned, unserved)


def split(copies: Sequence[Copy], limits: Limits) -> list[list[Copy]]:
    """Cut a batch that is one oversized block into calls within the limits."""
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

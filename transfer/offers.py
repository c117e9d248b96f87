"""Who offers which block, out of what everybody says that they have. Pure, and the only place where it is decided.

Replicas may disagree: a node was filled from another fine-tune, or its memory has rotted. Where we have a checksum on
record it decides; else the content that more than half of the holders have is taken; else none of them is, for there
is no telling who is right, and the disk may serve. Whoever is left aside is named, for a log or a report to say so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from transfer.plan import Offer


class Named(Protocol):
    """A source, as far as this module is concerned: an object, with a name for people."""

    @property
    def name(self) -> str: ...
    def __hash__(self) -> int: ...


class Holder(NamedTuple):
    """A source, and what it has: manifest row → (address there, checksum on record there). The disk has no checksum."""

    source: Named
    has: Mapping[int, tuple[int, bytes | None]]


@dataclass(frozen=True, slots=True)
class Offers:
    """What may be taken from whom, the checksums that it must have, and who was left aside for having another."""

    by_row: Mapping[int, Sequence[Offer]]
    expected: Mapping[int, bytes]
    aside: Mapping[int, tuple[str, ...]]

    @property
    def left_aside(self) -> Mapping[str, int]:
        """How many blocks were not taken of each holder, by its name."""
        return Counter(name for names in self.aside.values() for name in names)

    @property
    def reasons(self) -> Mapping[int, str]:
        """What a report says of the rows that somebody has with another content."""
        return {row: f"left aside, for other content than is wanted: {', '.join(n)}" for row, n in self.aside.items()}


def offers(rows: Iterable[int], holders: Sequence[Holder], expected: Mapping[int, bytes]) -> Offers:
    """Sort out these rows. `expected` are the checksums on our own record; holders that stand first are asked first."""
    by_row: dict[int, list[Offer]] = {}
    wanted: dict[int, bytes] = {}
    aside: dict[int, tuple[str, ...]] = {}
    for row in rows:
        held = [(holder.source, *holder.has[row]) for holder in holders if row in holder.has]
        checksum = expected.get(row) or _agreed([said for _, _, said in held if said is not None])
        if checksum is not None:
            wanted[row] = checksum
        by_row[row] = [Offer(source, address) for source, address, said in held if said is None or said == checksum]
        if len(by_row[row]) < len(held):
            aside[row] = tuple(source.name for source, _, said in held if said not in (None, checksum))
    return Offers(by_row, wanted, aside)


def _agreed(said: Sequence[bytes]) -> bytes | None:
    """What more than half of them say."""
    if not said:
        return None
    checksum, count = Counter(said).most_common(1)[0]
    return checksum if 2 * count > len(said) else None

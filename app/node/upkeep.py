"""When a node has something brought, and from where: pure, asked again after everything that happened.

What is missing is tried for at once, again whenever the peers have something new, and again after RETRY_INTERVAL_S,
since what failed may have been a passing thing. What is lost anew is missing for the first time, however often it was.
So is what waits for room, or for its name in /dev/shm, tried again. There is no "done": blocks may be found wrong at
any later time, and a source for them may appear long after the first try.

    nothing is missing ──▶ rest          missing, and nothing new since the last try ──▶ rest until it is due
    missing, and due ──▶ bring
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from shm.block import ExpertKey
from transfer.sources import SourceKind

RETRY_INTERVAL_S = 30.0  # after which what failed is tried again, although nothing new was seen

KINDS = {
    "auto": frozenset({SourceKind.PEER, SourceKind.DISK}),
    "disk": frozenset({SourceKind.DISK}),
    "peer": frozenset({SourceKind.PEER}),
    "none": frozenset({SourceKind.PEER, SourceKind.DISK}),  # of what was here, was found wrong, and is mended
}


@dataclass(frozen=True, slots=True)
class Seen:
    """What a node knows at one moment."""

    has_manifest: bool
    can_begin: bool
    """Whether a restore has anything to go by: a manifest, ours or a peer's."""
    missing: tuple[ExpertKey, ...]
    """Blocks that belong here and are not published."""
    damaged: tuple[ExpertKey, ...]
    """Those among them that were published once, and then found wrong."""
    sources: str
    """Differs whenever what peers offer does."""
    is_displaced: bool = False
    """Whether something waits for room, or the segment for its name: whatever is restored, that is looked at first."""
    left_behind: tuple[ExpertKey, ...] = ()
    """Blocks that were published here, and are in the memory of a segment that lost its name."""


@dataclass(frozen=True, slots=True)
class Task:
    """A restore to start. `experts` None: all that belongs here, whatever that will be once there is a manifest."""

    experts: tuple[ExpertKey, ...] | None
    kinds: Collection[SourceKind]


class Upkeep:
    """One node's. `fill` is what it was told: auto, disk, peer, or none, which brings nothing that was never here."""

    def __init__(self, fill: str) -> None:
        self._fill = fill
        self._kinds = KINDS[fill]
        self._tried: tuple[str, bool, bool] | None = None
        self._tried_for: frozenset[ExpertKey] = frozenset()
        self._due_at = float("-inf")

    def brought(self) -> None:
        """The last task did all that it was to do: what is missing from now on was lost anew."""
        self._tried_for = frozenset()

    def next(self, seen: Seen, now: float) -> Task | None:
        """What is to be started now, if anything. Asked while nothing that it started before is under way."""
        wanted = tuple(sorted({*seen.damaged, *seen.left_behind})) if self._fill == "none" else seen.missing
        self._tried_for &= frozenset(wanted)
        if seen.has_manifest and not wanted and not seen.is_displaced:
            return None
        if not seen.can_begin or (not seen.has_manifest and self._fill == "none"):
            return None
        news = seen.sources, seen.is_displaced, bool(seen.left_behind)
        if news == self._tried and self._tried_for.issuperset(wanted) and now < self._due_at:
            return None
        self._tried, self._tried_for, self._due_at = news, frozenset(wanted), now + RETRY_INTERVAL_S
        # What came with an earlier attempt was verified then, and is not read again.
        return Task(wanted if seen.has_manifest else None, self._kinds)

"""What can go wrong, in one tree. Every error says what to do about it.

HotspareError
├── InvalidInput               a name, number or option that is out of its limits
├── ManifestError              a manifest that contradicts itself or its digest
├── BlockUnavailable           the block or tensor is not (or no longer) published here; also a KeyError
└── SegmentError
    ├── SegmentNotFound        no such object in /dev/shm
    ├── SegmentAmbiguous       several nodes of this host hold the model: name one
    ├── SegmentUnsealed        its owner has not finished filling it
    ├── SegmentForeign         not a Hotspare segment, or another model's
    ├── SegmentTruncated       shorter than its header says
    ├── SegmentTooNew          written by a newer Hotspare
    ├── SegmentCorrupt         header or manifest right in no copy, or a rule broken
    ├── SegmentForbidden       another user's, or open to others: neither attached nor adopted
    ├── SegmentBusy            owned by a living daemon
    └── SharedMemoryFull       /dev/shm, the control group or the host has not the space

`transfer.errors` goes on with what can go wrong while bytes move.
"""

from __future__ import annotations


class HotspareError(Exception):
    """Root of every error that Hotspare raises on purpose."""


class InvalidInput(HotspareError, ValueError):
    """A name, number or option out of its limits."""


class ManifestError(HotspareError):
    """A manifest that contradicts itself, its limits or its digest."""


class BlockUnavailable(HotspareError, KeyError):
    """A block or tensor that is not published in this segment."""

    def __str__(self) -> str:  # KeyError would print the repr
        return str(self.args[0]) if self.args else ""


class SegmentError(HotspareError):
    """A shared-memory object that cannot be used as asked."""


class SegmentNotFound(SegmentError):
    """No object of that name in /dev/shm."""


class SegmentAmbiguous(SegmentError):
    """More than one segment answers to the name given."""


class SegmentUnsealed(SegmentError):
    """The owner has not finished filling the segment."""


class SegmentForeign(SegmentError):
    """Not a Hotspare segment, or one of another model, node or namespace."""


class SegmentTruncated(SegmentError):
    """The object is shorter than its header says."""


class SegmentTooNew(SegmentError):
    """The segment's format is newer than this Hotspare."""


class SegmentCorrupt(SegmentError):
    """The header or the manifest is right in no copy, or a number breaks a rule of the format."""


class SegmentForbidden(SegmentError):
    """The object is another user's, or others may write to it: whoever wrote it may have forged it."""


class SegmentBusy(SegmentError):
    """A living daemon owns the segment."""

    def __init__(self, message: str, owner_pid: int) -> None:
        super().__init__(message)
        self.owner_pid = owner_pid


class SharedMemoryFull(SegmentError):
    """Shared memory lacks the space; `needed` and `free` are bytes, and `where` is what has no more of them."""

    def __init__(
        self,
        needed: int,
        free: int,
        where: str = "/dev/shm",
        remedy: str = "enlarge it (`mount -o remount,size=… /dev/shm`; containers: `--shm-size`)",
    ) -> None:
        super().__init__(
            f"{where} has {free:,} bytes free, {needed:,} are needed: {remedy}, remove segments nobody "
            "owns (`hotspare rm`), or keep fewer replicas"
        )
        self.needed = needed
        self.free = free

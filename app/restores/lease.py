"""The right to write into a consumer's memory: for a while, and for one registration of it.

A node that was asked to push may be paused before it begins, for seconds or for an hour, and goes on as if nothing had
happened when it wakes. What it was told when it was asked says nothing then. So it asks the consumer's node for a lease
just before it writes, counts it from before it asked, by a clock that runs on while a process or a whole machine is
paused, and looks at it again before each transfer. A lease names the epoch of the registration: one that was taken
back, or made again, gives no more of the old.

The consumer's node keeps account of what it granted. A registration is not given back before every push that had a
lease has said that it ended, or its lease has run out.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from app.errors import Conflict

LEASE_S = 5.0  # of one grant; a push takes a second, and asks again if it takes longer
WITHDRAWN_MAX = 1024  # pushes of one registration that are remembered for having been recalled
# That the granting side waits longer: for the transfer begun last to be cut off, or its engine to be dropped, which
# takes most of a second, and three on a busy host. With 1 s, bytes once arrived after a registration was taken back.
MARGIN_S = 4.0


class LeaseEnded(Conflict):
    """The time to write has run out."""


def boot_time() -> float:
    """Seconds since the host booted: runs on while a process is stopped and while the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True, slots=True)
class Lease:
    """Until when this process may write, in seconds of its own `clock`."""

    until_s: float
    clock: Callable[[], float] = boot_time

    @property
    def remaining_s(self) -> float:
        return max(0.0, self.until_s - self.clock())

    def check(self) -> None:
        """Raises LeaseEnded once it has run out."""
        if not self.remaining_s:
            raise LeaseEnded("the time in which the consumer may be written to has run out: nothing more is written")


class HeldLease:
    """A push's lease as the one who writes has it: asked for when it is first needed, and again once half is gone."""

    def __init__(self, ask: Callable[[], float], clock: Callable[[], float] = boot_time) -> None:
        """`ask` returns for how many seconds from when it was called one may write; it raises what forbids it."""
        self._ask = ask
        self._clock = clock
        self._lease = Lease(0.0, clock)

    def allowed_s(self) -> float:
        """Seconds in which a transfer that begins now must end. Raises LeaseEnded, or what asking raises."""
        if self._lease.remaining_s < LEASE_S / 2:
            asked_at = self._clock()
            self._lease = Lease(asked_at + self._ask(), self._clock)
        self._lease.check()
        return self._lease.remaining_s


class Grants:
    """The leases of one registration that may still be written under. The caller's lock keeps it; times are its own."""

    def __init__(self) -> None:
        self._until: dict[str, float] = {}
        self._withdrawn: deque[str] = deque(maxlen=WITHDRAWN_MAX)

    def give(self, push_id: str, seconds: float, now: float) -> None:
        """A push may write for that long from now on; one that has a lease already may write for longer.

        Raises Conflict for one that was recalled.
        """
        if push_id in self._withdrawn:
            raise Conflict("the push was recalled: what it has not begun to write is not wanted any more")
        self._until[push_id] = max(self._until.get(push_id, 0.0), now + seconds + MARGIN_S)

    def end(self, push_id: str) -> None:
        """The push has ended."""
        self._until.pop(push_id, None)

    def withdraw(self, push_id: str) -> None:
        """The push is wanted no longer: it is given no more time. What it has runs out, or it says that it ended."""
        self._withdrawn.append(push_id)

    def left_s(self, now: float) -> float:
        """Seconds until the last of them has run out; 0 once none may be written under."""
        return max(0.0, max(self._until.values(), default=now) - now)

"""How many copies may be under way with one session: as many as arrive promptly, so that they can still be recalled.

What waits for a connection inside Mooncake cannot be recalled: it takes the next one. So a slow session has one copy
that moves over each connection, and one behind it. But two of 8 MiB are over in milliseconds where a session is fast,
and then its connections idle until somebody looks: a restore over loopback lost a sixth of its speed by that. So the
window of a session opens by one copy with each that arrives within PROMPT_S, and is as narrow as at first after one
that took longer. Small copies wait so briefly that many may.
"""

from __future__ import annotations

import threading

from transfer.engine.environment import TCP_LANES_PER_PEER

COPIES_MIN, COPIES_MAX = 2 * TCP_LANES_PER_PEER, 5 * TCP_LANES_PER_PEER
PROMPT_S = 0.1  # from a copy's beginning to its arrival
SMALL_NBYTES = 64 << 10
SMALL_PER_COPY = 32  # of which as many take the room of one larger copy


class Window:
    """Of one session. Thread-safe."""

    def __init__(self) -> None:
        self.copies = COPIES_MIN
        """How many large ones there is room for in all."""
        self._taken = 0
        self._lock = threading.Lock()

    def enter(self, nbytes: int) -> bool:
        """Whether there is room for a copy of this size, which is taken then."""
        with self._lock:
            has_room = self._taken + _room_of(nbytes) <= self.copies * SMALL_PER_COPY
            self._taken += _room_of(nbytes) if has_room else 0
            return has_room

    def leave(self, nbytes: int) -> None:
        """It has ended, whatever became of it, or is left to itself."""
        with self._lock:
            self._taken -= _room_of(nbytes)

    def arrived(self, nbytes: int, within_s: float) -> None:
        """It ended well, so long after it was begun."""
        if nbytes <= SMALL_NBYTES:
            return
        with self._lock:
            is_prompt = within_s <= PROMPT_S
            self.copies = min(self.copies + 1, COPIES_MAX) if is_prompt else COPIES_MIN

    def narrow(self) -> None:
        """Something did not arrive: nothing is known of how fast it is now."""
        with self._lock:
            self.copies = COPIES_MIN


def _room_of(nbytes: int) -> int:
    return 1 if nbytes <= SMALL_NBYTES else SMALL_PER_COPY

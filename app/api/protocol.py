"""HTTP/1.1 on a connection, with an end to everything that who asks may drag out, and a limit on how many there are.

uvicorn ends a connection that is idle after an answer, and nothing else: one that was opened and says nothing, or a
byte of its head a minute, stays for ever, and 1,000 of them leave a node no descriptor to answer its peers with.
Others (hypercorn's read timeout, gunicorn's in front of it, granian's header timeout) bound the head; here the body and
the taking of the answer are bounded too. Where there are too many connections all the same, the one that has been
waiting longest to be asked something makes room, so that a new one is always heard.

    head ──▶ body ──▶ answer ──▶ head        head: also while idle, and from the first moment
"""

from __future__ import annotations

import asyncio
import resource
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

HEAD_TIMEOUT_S = 10.0  # from when a connection is there, or its last answer was sent, to the end of the next head
BODY_TIMEOUT_S = 30.0  # from there to the end of the body: 32 MB at 10 Mbit/s
TAKE_TIMEOUT_S = 30.0  # for what is in the buffers of the connection to be taken
HEAD_NBYTES_MAX = 16 << 10  # the request line and its headers, of which a token has 1 KB
CONNECTIONS_MAX = 2048
CONNECTIONS_MIN = 64
DESCRIPTORS_PER_CONNECTION = 2  # of those that the process may have, so many for each: the rest is for other things


def connections_max() -> int:
    """How many connections a process may have that also needs descriptors for files, memory and peers."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(CONNECTIONS_MIN, min(CONNECTIONS_MAX, soft // DESCRIPTORS_PER_CONNECTION))


class BoundedProtocol(H11Protocol):
    """One connection."""

    transport: asyncio.Transport

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._awaited: tuple[str, RequestResponseCycle | None] | None = None
        """What we wait for, and of which request; None while it is the other side that waits."""
        self._since = 0.0
        self._expiry: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        super().connection_made(transport)
        self._watch()
        if len(self.connections) > connections_max():
            self._make_room()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._awaited = None  # what is waited for now is another request's
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._expiry, self._stall):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """What was sent is not taken."""
        super().pause_writing()
        self._stall = self.loop.call_later(TAKE_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()

    @property
    def is_waiting(self) -> bool:
        """Whether no request is under way: it is idle, or its head has not come yet."""
        return self.cycle is None or self.cycle.response_complete

    def _watch(self) -> None:
        """Give what we wait for now its time, unless that has been given already."""
        if self.is_waiting:
            awaited, timeout_s = ("head", self.cycle), HEAD_TIMEOUT_S
        elif self.cycle.more_body:
            awaited, timeout_s = ("body", self.cycle), BODY_TIMEOUT_S
        else:
            awaited, timeout_s = None, 0.0
        if awaited == self._awaited:
            return
        self._awaited, self._since = awaited, self.loop.time()
        if self._expiry is not None:
            self._expiry.cancel()
        self._expiry = None if awaited is None else self.loop.call_later(timeout_s, self._expire)

    def _expire(self) -> None:
        """Hang up; at once where nothing is left to be taken, else when that has been, or has not for too long."""
        if self.is_waiting and self.transport.get_write_buffer_size():
            self.transport.close()
            self._expiry = self.loop.call_later(TAKE_TIMEOUT_S, self.transport.abort)
        else:
            self.transport.abort()

    def _make_room(self) -> None:
        """Hang up on the one that has waited longest; where all are being dealt with, on this one."""
        waiting = [each for each in self.connections if isinstance(each, BoundedProtocol) and each.is_waiting]
        oldest = min(waiting, key=lambda each: each._since, default=self)
        self.connections.discard(oldest)  # it is gone a moment later, and must not be counted until then
        oldest.transport.abort()

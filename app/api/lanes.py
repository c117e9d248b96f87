"""How many requests of a kind are dealt with at once: those that wait for others must not take all threads.

Every kind of request has a lane. A request that finds its lane full waits for its turn before its body is read and
before it costs a thread, and is told to come again if that takes too long. The lanes together have fewer places than
there are threads, and the probes need no lane: so they answer while sixty engines that do not let go are waited for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.problems import answer_problem
from app.errors import Unavailable

LANE_WAIT_S = 10.0
RETRY_AFTER_S = 5
SEND_PIECE_NBYTES = 256 << 10  # handed to the connection at a time: the rest waits here until that was taken
ANSWER_TIMEOUT_S = 60.0  # for who asked to take it: a place is held for so long at most


class Lane(NamedTuple):
    """A kind of request. `places` are dealt with at once."""

    name: str
    places: int
    takes: Callable[[str, str], bool]
    """Whether a request of this method and path is of the kind."""
    is_stream: bool = False


LANES = (
    Lane("documents", 8, lambda method, path: path in ("/v1/shard-map", "/v1/manifest", "/v1/coverage", "/metrics")),
    Lane("registrations", 8, lambda method, path: method == "PUT"),  # large, and wait for those they take the place of
    Lane("removals", 24, lambda method, path: method == "DELETE"),  # wait for pushes and leases to end
    Lane("pushes", 24, lambda method, path: path == "/v1/pushes"),  # of which 16 are served
    Lane("events", 64, lambda method, path: path.endswith("/events"), is_stream=True),  # need no thread
    Lane("restores", 24, lambda method, path: path.startswith("/v1/restores")),  # may ask other nodes
    Lane("others", 24, lambda method, path: path.startswith("/v1/")),
)
THREADS = 128  # more than the lanes have places: what is left is the probes'


class Lanes:
    """ASGI: lets a request through when its lane has a place."""

    def __init__(self, app: ASGIApp, lanes: tuple[Lane, ...] = LANES) -> None:
        self._app = app
        self._lanes = [(lane, asyncio.Semaphore(lane.places)) for lane in lanes]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = self._lane_of(scope)
        if found is None:
            await self._app(scope, receive, send)
            return
        lane, places = found
        try:
            await asyncio.wait_for(places.acquire(), LANE_WAIT_S)
        except TimeoutError:
            refusal = Unavailable(
                f"{lane.places} requests of its kind ({lane.name}) are being dealt with: ask again",
                retry_after_s=RETRY_AFTER_S,
            )
            await answer_problem(refusal, scope, receive, send)
            return
        try:
            await self._app(scope, receive, send if lane.is_stream else _Sender(send).send)
        finally:
            places.release()

    def _lane_of(self, scope: Scope) -> tuple[Lane, asyncio.Semaphore] | None:
        if scope["type"] != "http":
            return None
        method, path = scope["method"], scope["path"]
        return next(((lane, places) for lane, places in self._lanes if lane.takes(method, path)), None)


class _Sender:
    """Hands a large body over in pieces, so that one who reads slowly holds a place, and not memory without end."""

    def __init__(self, send: Send) -> None:
        self._send = send

    async def send(self, message: Message) -> None:
        body: bytes = message.get("body", b"")
        if len(body) <= SEND_PIECE_NBYTES:
            await self._send(message)
            return
        with suppress(TimeoutError):  # the answer is left unfinished, and so the connection ends
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                for start in range(0, len(body), SEND_PIECE_NBYTES):
                    end = start + SEND_PIECE_NBYTES
                    more = end < len(body) or message.get("more_body", False)
                    await self._send({**message, "body": body[start:end], "more_body": more})

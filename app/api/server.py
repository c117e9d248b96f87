"""The server of a node's application: uvicorn, with our limits."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from app.api.protocol import HEAD_NBYTES_MAX, BoundedProtocol

ACCEPTED_AT_ONCE = 32  # before the loop turns to anything else, such as to hang up on those that are too many
QUEUED_MAX = 1024  # connections that the kernel holds until they are accepted
KEEP_IDLE_S = 5  # longer than nodes keep theirs (`transfer.client.http.IDLE_S`), who would find it gone as they ask


class Server(uvicorn.Server):
    """One that leaves signals to whoever made it, who had them before there was a server: set `should_exit`."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for each in sockets or ():
            each.listen(QUEUED_MAX)  # asyncio has one number for both, and set it to the smaller


def make_server(app: ASGIApp, *, access_log: bool = False, graceful_s: int = 1) -> Server:
    """A server that has yet to be run. `graceful_s` is for requests under way when it is told to stop."""
    config = uvicorn.Config(
        app,
        loop="asyncio",
        http=BoundedProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=access_log,
        server_header=False,
        proxy_headers=False,  # what a client says of itself is not believed
        backlog=ACCEPTED_AT_ONCE,
        timeout_keep_alive=KEEP_IDLE_S,
        timeout_graceful_shutdown=graceful_s,
        h11_max_incomplete_event_size=HEAD_NBYTES_MAX,
    )
    return Server(config)

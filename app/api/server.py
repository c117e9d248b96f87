"""The server of a node's application: uvicorn, with our limits."""

from __future__ import annotations

import uvicorn
from starlette.types import ASGIApp

from app.api.protocol import HEAD_NBYTES_MAX, BoundedProtocol

ACCEPTED_AT_ONCE = 128  # before those too many are dealt with; also the kernel's queue of who waits to be accepted
KEEP_IDLE_S = 5  # longer than nodes keep theirs (`transfer.client.http.IDLE_S`), who would find it gone as they ask


def make_server(app: ASGIApp, *, access_log: bool = False, graceful_s: int = 1) -> uvicorn.Server:
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
    return uvicorn.Server(config)

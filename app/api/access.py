"""Who may ask: with a token set, whoever shows it; without one, no web page; and how large a request may be.

A browser asks whom a page tells it to, also on this host, where a node without a token answers everybody. Two things
tell such requests. `Origin` names the page's own host where it asks another. And a page whose host name was made to
point at this host (DNS rebinding) asks its own host, but by a name that this one does not go by.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
import socket

from fastapi import Request
from fastapi.security import HTTPBearer
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.problems import Forbidden, TooLarge, Unauthorized, answer_problem
from app.errors import Unavailable
from app.settings import Settings
from shm.errors import HotspareError

BODY_NBYTES_MAX = 32 << 20  # the largest table of a consumer is some 20 MB; a restore of 131,072 experts is 4 MB
BODIES_NBYTES_MAX = 256 << 20  # of all requests together, from when they arrive to their answer
RETRY_AFTER_S = 5
OPEN_PATHS = frozenset({"/livez", "/readyz", "/openapi.json", "/docs"})  # for probes, and to read how to ask
OPEN_PREFIX = "/docs/"
HOST = re.compile(r"(?P<name>\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")

token_scheme = HTTPBearer(auto_error=False, description="HOTSPARE_TOKEN of the node, where it has one.")
"""A dependency that only says in the OpenAPI document what `Gate` wants."""


class Gate:
    """Looks at who asks before anything of the body is read, and ends a body above its limit as it arrives.

    ASGI of its own, not a dependency of the routes: those run after the body was read and parsed. What is not named
    open is closed, also what is not there.
    """

    def __init__(self, app: ASGIApp, nbytes_max: int = BODY_NBYTES_MAX) -> None:
        self._app = app
        self._nbytes_max = nbytes_max
        self._held_nbytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            _check(Request(scope))
        except HotspareError as error:
            await answer_problem(error, scope, receive, send)
            return
        await self._pass(scope, receive, send)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        seen = 0
        refusal: HotspareError | None = None

        async def receive_bounded() -> Message:
            nonlocal seen, refusal
            message = await receive()
            nbytes = len(message.get("body", b""))
            seen += nbytes
            self._held_nbytes += nbytes
            refusal = refusal or self._refusal(seen)
            if refusal is not None:
                raise refusal
            return message

        async def send_unless_refused(message: Message) -> None:
            if refusal is None:  # what the routes make of a body that broke off is not the answer
                await send(message)

        try:
            await self._app(scope, receive_bounded, send_unless_refused)
        except HotspareError as error:
            if error is not refusal:
                raise
        finally:
            self._held_nbytes -= seen
        if refusal is not None:
            await answer_problem(refusal, scope, receive, send)

    def _refusal(self, seen: int) -> HotspareError | None:
        """What to say to a request of whose body so many bytes have come."""
        if seen > self._nbytes_max:
            return TooLarge(f"the body is larger than {self._nbytes_max:,} bytes: name fewer experts at a time")
        if self._held_nbytes > BODIES_NBYTES_MAX:
            return Unavailable("too many large requests are under way: ask again", retry_after_s=RETRY_AFTER_S)
        return None


def _check(request: Request) -> None:
    settings: Settings = request.app.state.settings
    if settings.token is None:
        _require_no_page(request, settings)
    else:
        _require_token(request, settings.token.get_secret_value())


def _require_token(request: Request, token: str) -> None:
    """Raises Unauthorized unless the path is open or the request shows the node's token."""
    path = request.scope["path"]
    if path in OPEN_PATHS or path.startswith(OPEN_PREFIX):
        return
    scheme, _, shown = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not shown:
        raise Unauthorized("this node wants a token: send `Authorization: Bearer TOKEN`")
    if not hmac.compare_digest(shown.strip().encode(), token.encode()):
        raise Unauthorized("the token is not this node's")


def _require_no_page(request: Request, settings: Settings) -> None:
    """Raises Forbidden for what a browser sends on behalf of a page that is not this node's own.

    A node that listens beyond its host is known to others by names that it cannot know: there only a request that is a
    browser's for certain, since it names its origin, must call it by one of ours.
    """
    host, origin = request.headers.get("host"), request.headers.get("origin")
    if host is None:  # no browser leaves it out
        return
    match = HOST.fullmatch(host)
    if match is None:
        raise Forbidden(f"Host: {host[:80]!r} is not HOST:PORT")
    if origin is not None and origin.lower() not in (f"http://{host}".lower(), f"https://{host}".lower()):
        raise Forbidden(f"a page of {origin[:80]} may not ask this node: set HOTSPARE_TOKEN to let it in by that")
    if (origin is not None or settings.address.is_loopback) and not _is_ours(match["name"].lower(), settings):
        raise Forbidden(
            f"this node does not go by the name {match['name'][:80]!r}: ask it by an IP address, localhost or the name "
            "of its host, or set HOTSPARE_TOKEN"
        )


def _is_ours(name: str, settings: Settings) -> bool:
    """Whether a name is one that nobody else can have."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    if name in (settings.address.host.lower(), socket.gethostname().lower()):
        return True
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True

"""Who may ask: with a token set, whoever shows it; and how large a request may be."""

from __future__ import annotations

import hmac

from fastapi import Request
from fastapi.security import HTTPBearer
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.problems import TooLarge, Unauthorized
from shm.errors import HotspareError

BODY_NBYTES_MAX = 32 << 20  # the largest table of a consumer is some 20 MB; a restore of 131,072 experts is 4 MB
OPEN_PATHS = frozenset({"/livez", "/readyz", "/openapi.json", "/docs"})  # for probes, and to read how to ask
OPEN_PREFIX = "/docs/"

token_scheme = HTTPBearer(auto_error=False, description="HOTSPARE_TOKEN of the node, where it has one.")
"""A dependency that only says in the OpenAPI document what `Gate` wants."""


class Gate:
    """Asks for the token before anything of the body is read, and ends a body above its limit as it arrives.

    ASGI of its own, not a dependency of the routes: those run after the body was read and parsed. What is not named
    open is closed, also what is not there.
    """

    def __init__(self, app: ASGIApp, nbytes_max: int = BODY_NBYTES_MAX) -> None:
        self._app = app
        self._nbytes_max = nbytes_max

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            _require_token(Request(scope))
        except Unauthorized as error:
            await _refuse(error, scope, receive, send)
            return
        await self._pass(scope, receive, send)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        seen = 0
        refusal = TooLarge(f"the body is larger than {self._nbytes_max:,} bytes: name fewer experts at a time")

        async def receive_bounded() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._nbytes_max:
                raise refusal
            return message

        async def send_unless_refused(message: Message) -> None:
            if seen <= self._nbytes_max:  # what the routes make of a body that broke off is not the answer
                await send(message)

        try:
            await self._app(scope, receive_bounded, send_unless_refused)
        except TooLarge as error:
            if error is not refusal:
                raise
        if seen > self._nbytes_max:
            await _refuse(refusal, scope, receive, send)


def _require_token(request: Request) -> None:
    """Raises Unauthorized unless the path is open, the node has no token, or the request shows the node's."""
    token = request.app.state.settings.token
    path = request.scope["path"]
    if token is None or path in OPEN_PATHS or path.startswith(OPEN_PREFIX):
        return
    scheme, _, shown = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not shown:
        raise Unauthorized("this node wants a token: send `Authorization: Bearer TOKEN`")
    if not hmac.compare_digest(shown.strip().encode(), token.get_secret_value().encode()):
        raise Unauthorized("the token is not this node's")


async def _refuse(error: HotspareError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with the error's problem document, as the routes' errors are."""
    answer = await scope["app"].exception_handlers[HotspareError](Request(scope), error)
    await answer(scope, receive, send)

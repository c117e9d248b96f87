"""Who may ask: with a token set, whoever shows it; and how large a request may be. Plain ASGI, no work on the loop."""

from __future__ import annotations

import hmac
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.problems import TooLarge, Unauthorized

BODY_NBYTES_MAX = 64 << 20  # a restore that names a million experts is 32 MB

_bearer = HTTPBearer(auto_error=False, description="HOTSPARE_TOKEN of the node, where it has one.")


def require_token(
    request: Request, shown: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)] = None
) -> None:
    """Let the request through if the node has no token, or if it shows the node's."""
    token = request.app.state.settings.token
    if token is None:
        return
    if shown is None:
        raise Unauthorized("this node wants a token: send `Authorization: Bearer TOKEN`")
    if not hmac.compare_digest(shown.credentials.encode(), token.get_secret_value().encode()):
        raise Unauthorized("the token is not this node's")


class BodyLimit:
    """Refuses a body above the limit as it arrives, whatever its headers said."""

    def __init__(self, app: ASGIApp, limit: int = BODY_NBYTES_MAX) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._limit:
                raise TooLarge(f"the body is larger than {self._limit:,} bytes: name fewer experts at a time")
            return message

        await self._app(scope, counted, send)

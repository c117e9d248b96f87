"""How a route gets at its daemon's `Context`: the one place where FastAPI and the rooms below it meet."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from app.api.context import Context
from app.errors import Unavailable


def _context(request: Request) -> Context:
    context = getattr(request.app.state, "context", None)
    if not isinstance(context, Context):
        raise Unavailable("the node is starting", retry_after_s=1)
    return context


CurrentContext = Annotated[Context, Depends(_context)]

"""Reading large bodies without holding the event loop up: in a thread, one at a time, and giving way as it goes.

The parser and the validators are Rust, and hold Python's lock for as long as one call of theirs takes: in a thread of
its own a document of 10 MB would still stop everything for a second. So the validators are made to call back into
Python for every object (`app.documents.give_way`), which is where Python lets other threads in. The text itself is
parsed at once, in a few hundredths of a second: into Rust's own values, since hundreds of thousands of Python's had
its cyclic garbage collector hold the lock for longer than all else. For the same reason what is validated is kept as
plain tuples where there may be many (`app.documents.kept_as`).
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import cached_property
from typing import Any

from anyio import CapacityLimiter, to_thread
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError

SMALL_NBYTES = 16 << 10  # read where it is, in well under a millisecond
PARSED_AT_ONCE = 1  # a parsed document takes ten times its bytes
# By its commas. The largest table of a consumer has some 1.3 million. Numbers in a row are parsed and validated without
# giving way: 13 million of them, 26 MB, stopped everything for 2 s.
VALUES_MAX = 2_000_000


class _Parsed(Request):
    """A request whose body has been read, and made into what the route takes."""

    def __init__(self, request: Request, document: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._document = document

    async def body(self) -> bytes:
        return b"{}"  # nobody looks at it, but at whether there is one

    async def json(self) -> Any:
        return self._document


class BodyRoute(APIRoute):
    """A route whose JSON body may be large. Whatever is wrong with it is a RequestValidationError."""

    _limiter = CapacityLimiter(PARSED_AT_ONCE)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def read_first(request: Request) -> Response:
            if self.body_field is not None and _is_json(request):
                body = await request.body()
                if len(body) > SMALL_NBYTES:
                    document = await to_thread.run_sync(self._read, body, limiter=self._limiter)
                else:
                    document = self._read(body) if body else None
                if body:
                    request = _Parsed(request, document)
                del body
            return await handle(request)

        return read_first

    def _read(self, body: bytes) -> Any:
        """The document, which FastAPI takes as it is then. Raises RequestValidationError."""
        if (values := body.count(b",")) > VALUES_MAX:
            message = f"{values:,} values, and no document of ours has more than {VALUES_MAX:,}: name less at a time"
            raise RequestValidationError([{"type": "too_many_values", "loc": ("body",), "msg": message}])
        try:
            return self._adapter.validate_json(body)
        except ValidationError as error:  # not JSON, not UTF-8, too deep, or not what the route takes
            found = error.errors(include_url=False, include_input=False)
            raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in found]) from None

    @cached_property
    def _adapter(self) -> TypeAdapter[Any]:
        taken: Any = self.body_field and self.body_field.field_info.annotation
        return TypeAdapter(taken)


def _is_json(request: Request) -> bool:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return media_type == "application/json" or (media_type.startswith("application/") and media_type.endswith("+json"))

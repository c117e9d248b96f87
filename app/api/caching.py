"""ETags: a document that has not changed is not sent again."""

from __future__ import annotations

from fastapi import Request, Response


def etag(value: str) -> str:
    """A strong ETag of anything that names a version."""
    return '"' + value.replace('"', "'") + '"'


def not_modified(request: Request, tag: str) -> Response | None:
    """304 where the request's If-None-Match has this tag, else None."""
    asked = ",".join(request.headers.getlist("if-none-match"))
    tags = {candidate.strip().removeprefix("W/") for candidate in asked.split(",")}
    return Response(status_code=304, headers={"ETag": tag}) if tags & {tag, "*"} else None

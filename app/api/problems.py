"""Every error of the API as an RFC 9457 problem document, from one table of error classes. HTTP words begin here.

An error that has no row of its own takes its nearest ancestor's. What the table says, docs/problems.md explains.

Three errors are of this floor alone: what is wrong with a request before any room of the domain hears of it.

HotspareError
├── Unauthorized
├── Forbidden
└── TooLarge
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, NamedTuple

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Match, Mount
from starlette.types import Receive, Scope, Send

from app import errors as app_errors
from shm import errors as shm_errors
from shm.errors import HotspareError
from transfer import errors as transfer_errors

MEDIA_TYPE = "application/problem+json"
TYPE_PREFIX = "urn:hotspare:problem:"
METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")
FIELD_ERRORS_MAX = 100  # of one request; a body of many thousand wrong experts says no more than the first hundred

_log = logging.getLogger("hotspare.api")


class Unauthorized(HotspareError):
    """No token, or not this node's."""


class Forbidden(HotspareError):
    """It comes from a web page of somebody else's, as far as one can tell, or names a host that is none."""


class TooLarge(HotspareError):
    """The body is over its limit."""


class ProblemType(NamedTuple):
    """A row of the table. `slug` ends the type URI."""

    status: int
    slug: str
    title: str

    @property
    def uri(self) -> str:
        return TYPE_PREFIX + self.slug


_INVALID = ProblemType(422, "invalid-input", "The request is well formed, but a value is out of its limits")
_TRANSFER_FAILED = ProblemType(502, "transfer-failed", "Bytes did not come from a peer")
_NOT_FOUND = ProblemType(404, "not-found", "No such thing")
NO_THREAD = "can't start new thread"  # what Python's RuntimeError says, which has no type of its own
OUT_OF_THREADS = (
    "the system gives this process no more threads: raise its limit (`ulimit -u`, a container's pids.max, systemd's "
    "TasksMax)"
)
RETRY_AFTER_S = 1

_UNEXPECTED = ProblemType(500, "unexpected", "The node failed in a way nobody foresaw")

PROBLEM_TYPES: Mapping[type[HotspareError], ProblemType] = {
    HotspareError: ProblemType(500, "failed", "The node could not do it"),
    shm_errors.InvalidInput: _INVALID,
    shm_errors.ManifestError: ProblemType(500, "manifest-invalid", "A manifest contradicts itself or its digest"),
    shm_errors.BlockUnavailable: ProblemType(404, "block-unavailable", "The block is not published here"),
    shm_errors.SegmentError: ProblemType(500, "segment-failed", "The shared memory cannot be used as asked"),
    shm_errors.SegmentNotFound: ProblemType(404, "segment-not-found", "No such segment on this host"),
    shm_errors.SegmentAmbiguous: ProblemType(409, "segment-ambiguous", "More than one segment answers to the name"),
    shm_errors.SegmentUnsealed: ProblemType(503, "segment-unsealed", "The segment is still being filled"),
    shm_errors.SegmentForeign: ProblemType(409, "segment-foreign", "The segment is another's"),
    shm_errors.SegmentTruncated: ProblemType(500, "segment-truncated", "The segment is shorter than its header says"),
    shm_errors.SegmentTooNew: ProblemType(500, "segment-too-new", "The segment was written by a newer Hotspare"),
    shm_errors.SegmentCorrupt: ProblemType(500, "segment-corrupt", "The segment fails its checksum"),
    shm_errors.SegmentForbidden: ProblemType(500, "segment-forbidden", "The node may not open the segment"),
    shm_errors.SegmentBusy: ProblemType(409, "segment-busy", "A living daemon owns the segment"),
    shm_errors.SharedMemoryFull: ProblemType(507, "shared-memory-full", "/dev/shm lacks the space"),
    transfer_errors.CheckpointError: ProblemType(500, "checkpoint-unusable", "The checkpoint cannot be used"),
    transfer_errors.EngineError: ProblemType(500, "engine-failed", "The transfer engine failed"),
    transfer_errors.EngineMissing: ProblemType(503, "engine-missing", "The transfer engine is not installed"),
    transfer_errors.EngineRefused: ProblemType(
        503, "engine-refused", "The transfer engine refused to start or register"
    ),
    transfer_errors.TransferFailed: _TRANSFER_FAILED,
    transfer_errors.SomeLost: _TRANSFER_FAILED,
    transfer_errors.RestoreError: ProblemType(409, "restore-refused", "The restore cannot be done as asked"),
    transfer_errors.SomeLost: ProblemType(502, "transfer-failed", "Bytes did not come from a peer"),
    transfer_errors.NothingToRestore: ProblemType(422, "nothing-to-restore", "The request names no block of the model"),
    app_errors.NodeError: ProblemType(500, "failed", "The node could not do it"),
    app_errors.NotFound: _NOT_FOUND,
    app_errors.Conflict: ProblemType(409, "conflict", "Its state forbids it"),
    app_errors.LimitReached: ProblemType(429, "too-many-requests", "Too much is running already"),
    app_errors.Unavailable: ProblemType(503, "unavailable", "Not now"),
    app_errors.PeerFailed: ProblemType(502, "peer-failed", "Another node did not do its part"),
    Unauthorized: ProblemType(401, "unauthorized", "A token is needed"),
    Forbidden: ProblemType(403, "forbidden", "The request is another web page's, or names another host"),
    TooLarge: ProblemType(413, "too-large", "The request is over its limit"),
}

# Errors that are not of our tree: the router's, the validation's and the unforeseen.
_METHOD_NOT_ALLOWED = ProblemType(405, "method-not-allowed", "The path has no such method")
OTHER_PROBLEM_TYPES: Sequence[ProblemType] = (_METHOD_NOT_ALLOWED, _UNEXPECTED)


class FieldError(BaseModel):
    """One value of the request that was refused."""

    model_config = ConfigDict(extra="forbid")

    location: str = Field(description="Where it was: body, query, path or header", examples=["body"])
    field: str = Field(description="Its name, with dots between levels", examples=["target.node_id"])
    message: str


class Problem(BaseModel):
    """An error, after RFC 9457."""

    type: str = Field(description="What kind of error, as a URI: the same one for the same kind, always",
                      examples=[_NOT_FOUND.uri])  # fmt: skip
    title: str = Field(description="The kind of error in words", examples=[_NOT_FOUND.title])
    status: int = Field(description="The HTTP status", examples=[404])
    detail: str = Field(description="What went wrong this time, and what to do about it")
    instance: str = Field(description="The path of the request", examples=["/v1/restores/7"])
    errors: list[FieldError] | None = Field(
        default=None, description="The values that were refused, of a validation error"
    )


def problem_type(error: HotspareError) -> ProblemType:
    """The row of the error's class, or of its nearest ancestor that has one."""
    return next(PROBLEM_TYPES[cls] for cls in type(error).__mro__ if cls in PROBLEM_TYPES)


def problem_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route gives as `responses`, so that the OpenAPI document names its errors."""
    return {status: {"model": Problem, "description": HTTPStatus(status).phrase} for status in statuses}


def _response(
    request: Request,
    kind: ProblemType,
    detail: str,
    *,
    headers: Mapping[str, str] | None = None,
    errors: list[FieldError] | None = None,
    uri: str | None = None,
) -> JSONResponse:
    problem = Problem(
        type=uri or kind.uri, title=kind.title, status=kind.status, detail=detail,
        instance=request.scope["path"], errors=errors,
    )  # fmt: skip
    return JSONResponse(problem.model_dump(exclude_none=True), kind.status, headers, MEDIA_TYPE)


async def _on_hotspare_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HotspareError)
    kind = problem_type(error)
    if kind.status >= 500:
        _log.warning("%s %s: %s: %s", request.method, request.scope["path"], type(error).__name__, error)
    return _response(request, kind, str(error), headers=_headers(error))


async def answer_problem(error: HotspareError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request that reaches no route with the error's problem document, as the routes' errors are."""
    answer = await _on_hotspare_error(Request(scope), error)
    await answer(scope, receive, send)


def _headers(error: HotspareError) -> dict[str, str]:
    if isinstance(error, Unauthorized):
        return {"WWW-Authenticate": 'Bearer realm="hotspare"'}
    wait_s = error.retry_after_s if isinstance(error, app_errors.NodeError) else None
    return {} if wait_s is None else {"Retry-After": str(wait_s)}


def _field_error(error: Mapping[str, Any]) -> FieldError:
    location, *path = error["loc"] or ("body",)
    cause = error.get("ctx", {}).get("error")  # what a validator of ours raised; `msg` says "Value error, " before it
    message = str(cause) if isinstance(cause, ValueError) else error["msg"]
    return FieldError(location=str(location), field=".".join(map(str, path)), message=message)


async def _on_validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    fields = [_field_error(each) for each in found[:FIELD_ERRORS_MAX]]
    shown = "; ".join(f"{f.field or f.location}: {f.message}" for f in fields[:3])
    more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
    return _response(request, _INVALID, shown + more, errors=fields)


def _allowed(request: Request, said: str) -> str:
    """Every method of the request's path. The router says only what the first of its routes takes."""
    scope = request.scope
    root_path = scope.get("app_root_path", scope.get("root_path", ""))  # routing has changed the latter under a mount
    asked = {"type": "http", "path": scope["path"], "root_path": root_path, "headers": scope["headers"]}
    routes = [route for route in request.app.routes if not isinstance(route, Mount)]  # that would match any method
    taken = {m for m in METHODS for r in routes if r.matches({**asked, "method": m})[0] is Match.FULL}
    return ", ".join(sorted(taken.union(said.split(", ")) - {""}))


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        detail = f"nothing is at {request.scope['path']}: GET /openapi.json lists what there is"
        return _response(request, _NOT_FOUND, detail, headers=error.headers)
    if error.status_code == 405:
        headers = dict(error.headers or {})
        headers["Allow"] = _allowed(request, headers.get("Allow", ""))
        detail = f"{request.scope['path']} does not take {request.method}: it takes {headers['Allow'] or 'no method'}"
        return _response(request, _METHOD_NOT_ALLOWED, detail, headers=headers)
    # RFC 9457, 4.2.1: a problem that says no more than its status is of type about:blank.
    kind = ProblemType(error.status_code, "", HTTPStatus(error.status_code).phrase)
    return _response(request, kind, error.detail, headers=error.headers, uri="about:blank")


async def _on_runtime_error(request: Request, error: Exception) -> JSONResponse:
    """Routes run in threads, and the system may have none to give: that is no failure of ours, and passes."""
    if str(error) != NO_THREAD:
        raise error
    return await _on_hotspare_error(request, app_errors.Unavailable(OUT_OF_THREADS, retry_after_s=RETRY_AFTER_S))


async def _on_unexpected(request: Request, error: Exception) -> JSONResponse:
    # The server logs the traceback when the error reaches it; this line says which request it belongs to.
    _log.error("%s %s failed: %r", request.method, request.scope["path"], error)
    return _response(request, _UNEXPECTED, "an unexpected error: the node's log has what happened")


def _describe(document: dict[str, Any]) -> dict[str, Any]:
    """Give every error response of an OpenAPI document the problem's media type and schema, FastAPI's own 422 too."""
    reference = {"schema": {"$ref": "#/components/schemas/Problem"}}
    schema = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas.update(schema.pop("$defs"), Problem=schema)
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    document["components"]["schemas"] = dict(sorted(schemas.items()))
    for operation in (op for path in document["paths"].values() for op in path.values()):
        for status, response in operation.get("responses", {}).items():
            content = response.get("content", {}).get("application/json", {})
            named = content.get("schema", {}).get("$ref", "").rsplit("/", 1)[-1]
            if named in ("Problem", "HTTPValidationError"):
                response["content"] = {MEDIA_TYPE: reference}
                response["description"] = HTTPStatus(int(status)).phrase
    _write_whole_numbers(document)
    return document


def _write_whole_numbers(part: Any) -> None:
    """Write limits that are whole numbers as such: FastAPI writes 2^62 as 4.611686018427388e+18, which is another."""
    for key, value in part.items() if isinstance(part, dict) else enumerate(part):
        if isinstance(value, float) and value.is_integer():
            part[key] = int(value)
        elif isinstance(value, dict | list):
            _write_whole_numbers(value)


def install(app: FastAPI) -> None:
    """Make every error of `app`, and every error in its OpenAPI document, a problem document."""
    app.add_exception_handler(HotspareError, _on_hotspare_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RuntimeError, _on_runtime_error)
    app.add_exception_handler(Exception, _on_unexpected)
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _describe(generate())
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]

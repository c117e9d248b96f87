"""Starting restores, watching them, stopping them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

import anyio
from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Header, Path, Response
from fastapi.responses import StreamingResponse

from app.api.bodies import BodyRoute
from app.api.current import CurrentContext
from app.api.problems import problem_responses
from app.documents import RestoreDocument, RestoreRequest, Restores
from app.restores.store import AnyRestore

router = APIRouter(prefix="/v1/restores", tags=["restores"], route_class=BodyRoute)

EVENT_INTERVAL_S = 0.25
EVENTS_MAX = 4 * 3600 * 4  # four hours of events; who still listens then asks again

WATCHING_AT_ONCE = 8  # threads of their own for events: one of a silent node takes one for two seconds

RestoreId = Annotated[str, Path(min_length=1, max_length=64)]
IdempotencyKey = Annotated[
    str | None,
    Header(min_length=1, max_length=255, description="A second request with the same key makes no second restore."),
]


@router.post(
    "",
    status_code=202,
    summary="Bring back what a node, or an engine's slots, should hold",
    responses=problem_responses(401, 404, 409, 413, 422, 429, 502, 503),
)
def start_restore(
    context: CurrentContext, request: RestoreRequest, response: Response, idempotency_key: IdempotencyKey = None
) -> RestoreDocument:
    """Any node takes it for any node. Blocks that are there and whole are only verified; the others come from the
    target's own host, from peers, then from disk. Nothing is published before its checksum matched."""
    document = context.restores.submit(request, idempotency_key)
    response.headers["Location"] = f"/v1/restores/{document.id}"
    return document


@router.get("", summary="The restores this node knows of, newest first", responses=problem_responses(401))
def list_restores(context: CurrentContext) -> Restores:
    return Restores(restores=context.restores.documents())


@router.get("/{restore_id}", summary="How far it is", responses=problem_responses(401, 404, 422))
def get_restore(context: CurrentContext, restore_id: RestoreId) -> RestoreDocument:
    return context.restores.get(restore_id).document()


@router.post("/{restore_id}/cancel", summary="Stop it", responses=problem_responses(401, 404, 422, 502, 503))
def cancel_restore(context: CurrentContext, restore_id: RestoreId) -> RestoreDocument:
    """It stops after the batches under way. What was published stays, and nothing half-written is."""
    restore = context.restores.get(restore_id)
    restore.cancel()
    return restore.document()


_watching = CapacityLimiter(WATCHING_AT_ONCE)


async def _events(restore: AnyRestore) -> AsyncIterator[str]:
    last = ""
    for _ in range(EVENTS_MAX):
        document = await to_thread.run_sync(restore.document, limiter=_watching)
        text = document.model_dump_json()
        if text != last:
            last = text
            yield f"event: restore\ndata: {text}\n\n"
        if document.state.is_final:
            return
        await anyio.sleep(EVENT_INTERVAL_S)


@router.get(
    "/{restore_id}/events",
    summary="How far it is, as server-sent events until it ends",
    response_class=StreamingResponse,
    responses={
        200: {"content": {"text/event-stream": {}}, "description": "`event: restore`, its data the restore document."},
        **problem_responses(401, 404, 422),
    },
)
def watch_restore(context: CurrentContext, restore_id: RestoreId) -> StreamingResponse:
    restore = context.restores.get(restore_id)
    return StreamingResponse(_events(restore), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

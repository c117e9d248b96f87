"""Engines that registered where their expert slots lie, and the pushes into them that nodes ask of each other."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Path, Response

from app.api.bodies import BodyRoute
from app.api.context import Context
from app.api.current import CurrentContext
from app.api.problems import problem_responses
from app.documents import (
    ConsumerDocument,
    ConsumerRequest,
    Consumers,
    LeaseDocument,
    LeaseRequest,
    PushDocument,
    PushRequest,
)
from app.restores.consumers import Consumer
from app.restores.pushes import build_table, held

router = APIRouter(prefix="/v1", tags=["consumers"], route_class=BodyRoute)

ConsumerId = Annotated[str, Path(min_length=1, max_length=200, pattern=r"^[!-~]+$")]


def _document(context: Context, consumer: Consumer) -> ConsumerDocument:
    table = consumer.table
    return ConsumerDocument(
        id=consumer.id,
        node_id=context.node.settings.node_id,
        session_id=table.session_id,
        manifest_digest=consumer.manifest_digest,
        content_digest=consumer.content_digest,
        epoch=consumer.epoch,
        blocks=len(table.rows),
        slots=table.slot_count,
        ranges=table.range_count,
        bytes=table.nbytes,
        ttl_s=consumer.ttl_s,
        registered_at=datetime.fromtimestamp(consumer.registered_at, UTC),
        expires_in_s=context.consumers.seconds_left(consumer),
        error=consumer.error,
    )


@router.put(
    "/consumers/{consumer_id}",
    summary="Register where an engine's expert slots lie",
    responses={201: {"model": ConsumerDocument}, **problem_responses(401, 404, 409, 413, 422, 429, 503)},
)
def put_consumer(
    context: CurrentContext, consumer_id: ConsumerId, request: ConsumerRequest, response: Response
) -> ConsumerDocument:
    """From then on `POST /v1/restores` on this node, with it as the target, has its slots written with no code of the
    engine running. Takes the place of an earlier registration of that id, once pushes to it have ended."""
    holding = held(context.node)
    table = build_table(context.node, holding, request)
    manifest, content = holding.manifest.digest, holding.content_digest
    consumer, is_new = context.consumers.put(consumer_id, table, manifest, content, request.ttl_s)
    if is_new:
        response.status_code = 201
    return _document(context, consumer)


@router.post(
    "/consumers/{consumer_id}/renew",
    summary="Let it live for its ttl_s from now",
    responses=problem_responses(401, 404),
)
def renew_consumer(context: CurrentContext, consumer_id: ConsumerId) -> ConsumerDocument:
    return _document(context, context.consumers.renew(consumer_id))


@router.post(
    "/consumers/{consumer_id}/lease",
    summary="Between nodes: the right to write to it for a while",
    responses=problem_responses(401, 404, 409, 422),
)
def lease_consumer(context: CurrentContext, consumer_id: ConsumerId, request: LeaseRequest) -> LeaseDocument:
    """A node that was asked to push asks for this just before it writes, and again before its time runs out. While one
    lasts, DELETE does not answer."""
    return LeaseDocument(ttl_s=context.consumers.lease(consumer_id, request.epoch, request.push_id))


@router.get("/consumers", summary="The engines registered with this node", responses=problem_responses(401))
def list_consumers(context: CurrentContext) -> Consumers:
    return Consumers(consumers=[_document(context, consumer) for consumer in context.consumers.all()])


@router.get("/consumers/{consumer_id}", summary="One of them", responses=problem_responses(401, 404))
def get_consumer(context: CurrentContext, consumer_id: ConsumerId) -> ConsumerDocument:
    return _document(context, context.consumers.get(consumer_id))


@router.delete(
    "/consumers/{consumer_id}",
    status_code=204,
    response_model=None,  # or fastapi before 0.117 takes the annotation for a body
    summary="End a registration",
    responses=problem_responses(401, 404, 503),
)
def delete_consumer(context: CurrentContext, consumer_id: ConsumerId) -> None:
    """Waits for pushes under way: when it has answered 204, nothing is written to the engine any more."""
    context.consumers.remove(consumer_id)


@router.post(
    "/pushes",
    summary="Between nodes: write blocks held here into a consumer's memory",
    responses=problem_responses(401, 404, 409, 413, 422, 429, 502, 503),
)
def push_blocks(context: CurrentContext, request: PushRequest) -> PushDocument:
    """Each block is verified before it is sent. Answers when the bytes are in place, or why they are not."""
    return context.pushes.serve(request)

"""What this node is and has."""

from __future__ import annotations

import numpy as np
import orjson
from fastapi import APIRouter, Request, Response

from app.api.bodies import BodyRoute
from app.api.caching import etag, not_modified
from app.api.context import Context
from app.api.current import CurrentContext
from app.api.problems import problem_responses
from app.cluster.namesakes import ASKER_HEADER, Asker
from app.documents import DoubtRequest, ManifestDocument, NodeDocument
from app.errors import Unavailable
from app.node.holding import proofs_of
from app.version import VERSION
from shm.block import ExpertKey

router = APIRouter(prefix="/v1", tags=["node"], route_class=BodyRoute)


def node_document(context: Context) -> NodeDocument:
    node, holding = context.node, context.node.holding
    published = holding.published() if holding else np.zeros(0, dtype=np.int64)
    unproved, oldest = proofs_of(holding)
    return NodeDocument(
        node_id=node.settings.node_id,
        model=node.name.model,
        namespace=node.name.namespace,
        state=node.state,
        manifest_digest=holding.manifest.digest if holding else None,
        content_digest=holding.content_digest if holding else None,
        session_id=node.engine.session_id if node.engine else "",
        segment=node.name.object_name,
        bytes=int(holding.manifest.nbytes[published].sum()) if holding else 0,
        blocks=len(published),
        blocks_unproved=unproved,
        proved_oldest=oldest,
        version=VERSION,
        revision=holding.revision if holding else "",
        shortage=node.shortage,
        replicas=node.settings.replica_count,
        placement_digest=holding.placement.digest if holding else None,
        started_at=context.started_at,
    )


@router.get("/node", summary="This node", responses=problem_responses(401))
def get_node(context: CurrentContext, request: Request) -> NodeDocument:
    asker = Asker.read(request.headers.get(ASKER_HEADER, ""))
    if asker is not None and request.client is not None:
        context.cluster.was_asked(asker, request.client.host)
    return node_document(context)


@router.post(
    "/doubts",
    status_code=204,
    response_model=None,
    summary="Have blocks proved next that arrived wrong",
    responses=problem_responses(401, 404, 409, 413, 422, 503),
)
def doubt_blocks(context: CurrentContext, request: DoubtRequest) -> None:
    """Nodes and engines send it that read a block here and found another checksum. If the block is wrong in this node's
    memory it is hidden, and brought back from where it is right."""
    context.scrubber.doubt(request.content_digest, [ExpertKey(each.layer, each.expert) for each in request.blocks])


@router.get(
    "/manifest",
    summary="Every block of the model, its tensors, and where in the checkpoint they lie",
    response_class=Response,
    responses={
        200: {"model": ManifestDocument},
        304: {"description": "It is still the one of If-None-Match."},
        **problem_responses(401, 503),
    },
)
def get_manifest(context: CurrentContext, request: Request) -> Response:
    manifest = context.node.manifest
    if manifest is None:
        raise Unavailable("this node has no manifest yet", retry_after_s=1)
    tag = etag(manifest.digest)
    unchanged = not_modified(request, tag)
    if unchanged is not None:
        return unchanged
    return Response(orjson.dumps(manifest.to_json()), media_type="application/json", headers={"ETag": tag})

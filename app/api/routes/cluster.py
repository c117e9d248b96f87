"""Where every block is, who the nodes are, and what would be lost."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Literal

import numpy as np
import orjson
from fastapi import APIRouter, Query, Request, Response
from pydantic import StringConstraints

from app.api.caching import etag, not_modified
from app.api.context import Context
from app.api.current import CurrentContext
from app.api.problems import problem_responses
from app.cluster import shard_map
from app.cluster.cluster import Cluster
from app.cluster.coverage import CoverageCount, cover
from app.cluster.membership import Peer, PeerState
from app.documents import (
    CoverageCounts,
    CoverageDocument,
    ExpertRef,
    LayerCoverage,
    Nodes,
    PeerDocument,
    ShardMap,
)
from app.errors import Unavailable
from app.node.holding import Holding, proofs_of
from app.node.node import NodeState
from shm.block import ExpertKey

router = APIRouter(prefix="/v1", tags=["cluster"])

LayerFilter = Annotated[int | None, Query(ge=0, le=2**31 - 1, description="Only this layer.")]
BLOCKS_ASKED_MAX = 256
BlockName = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}\.[0-9]{1,9}$")]
BlockFilter = Annotated[
    Sequence[BlockName],
    Query(max_length=BLOCKS_ASKED_MAX, description="Only these, as LAYER.EXPERT: `block=3.7&block=3.8`."),
]
ExpertFilter = Annotated[int | None, Query(ge=0, le=2**31 - 1, description="Only this expert of each layer.")]


def _holding(context: Context) -> Holding:
    if context.node.holding is None:
        raise Unavailable("this node has no manifest yet", retry_after_s=1)
    return context.node.holding


@router.get(
    "/shard-map",
    summary="Which block is where, and with which checksum",
    response_class=Response,
    responses={
        200: {"model": ShardMap},
        304: {"description": "It is still the one of If-None-Match."},
        **problem_responses(401, 404, 422, 503),
    },
)
def get_shard_map(
    context: CurrentContext,
    request: Request,
    scope: Annotated[
        Literal["node", "cluster"], Query(description="This node's own blocks, or every node's that it can reach.")
    ] = "cluster",
    layer: LayerFilter = None,
    expert: ExpertFilter = None,
    block: BlockFilter = (),
) -> Response:
    holding = _holding(context)
    manifest, revision = holding.manifest, holding.revision
    if scope == "cluster":
        known = f"{holding.node_id}={revision};{context.cluster.revision()}"
        revision = hashlib.sha256(known.encode()).hexdigest()[:16]
    asked = hashlib.sha256(f"{scope}:{layer}:{expert}:{','.join(block)}".encode()).hexdigest()[:16]
    tag = etag(f"{asked}:{manifest.digest[:16]}:{revision}")
    unchanged = not_modified(request, tag)
    if unchanged is not None:
        return unchanged
    blocks = [ExpertKey(*map(int, name.split("."))) for name in block]
    rows = shard_map.select(manifest, layer, expert, blocks)
    session_id = context.node.engine.session_id if context.node.engine else ""
    held_by = [shard_map.Holder(holding.node_id, session_id, holding.held(rows))]
    if scope == "cluster":
        held_by += shard_map.holders(context.cluster)
    experts, dense = shard_map.entries(manifest, rows, held_by)
    body = orjson.dumps(
        {
            "model": manifest.model,
            "node_id": holding.node_id,
            "manifest_digest": manifest.digest,
            "content_digest": holding.content_digest,
            "revision": revision,
            "experts": experts,
            "dense": dense,
        }
    )
    return Response(body, media_type="application/json", headers={"ETag": tag})


def _node_state(state: str | None) -> NodeState | None:
    return next((known for known in NodeState if known == state), None)


def _peer_document(peer: Peer, cluster: Cluster) -> PeerDocument:
    warnings = filter(None, (peer.warning, cluster.namesake_warning(peer.node_id)))
    return PeerDocument(
        node_id=peer.node_id,
        url=peer.url,
        state=peer.state,
        last_seen=cluster.last_seen(peer.node_id),
        node_state=_node_state(peer.report.state if peer.report else None),
        blocks_unproved=peer.report.blocks_unproved if peer.report else None,
        proved_oldest=peer.report.proved_oldest if peer.report else None,
        conflict=peer.conflict,
        warning="; ".join(warnings) or None,
        error=peer.error,
    )


@router.get("/nodes", summary="The nodes, as this one sees them", responses=problem_responses(401))
def get_nodes(context: CurrentContext, request: Request) -> Nodes:
    unproved, oldest = proofs_of(context.node.holding)
    cluster = context.cluster
    own = PeerDocument(
        node_id=context.node.settings.node_id,
        url=str(request.base_url).rstrip("/"),
        state=PeerState.ALIVE,
        last_seen=datetime.now(UTC),
        self=True,
        node_state=context.node.state,
        blocks_unproved=unproved,
        proved_oldest=oldest,
        warning=cluster.namesake_warning(context.node.settings.node_id),
    )
    documents = [_peer_document(peer, cluster) for peer in cluster.peers()]
    return Nodes(nodes=sorted([own, *documents], key=lambda d: d.node_id))


def _counts(count: CoverageCount) -> CoverageCounts:
    return CoverageCounts(blocks=count.blocks, by_replicas=dict(count.by_replicas))


@router.get(
    "/coverage",
    summary="How many live replicas every block has, and what is lost",
    responses=problem_responses(401, 503),
)
def get_coverage(context: CurrentContext) -> CoverageDocument:
    holding = _holding(context)
    manifest, held = holding.manifest, {holding.node_id: holding.published()}
    for node_id, blocks in context.cluster.holdings().items():
        held[node_id] = np.fromiter(sorted(blocks.blocks), np.int64)
    coverage = cover(manifest, held, context.node.settings.replica_count)
    return CoverageDocument(
        model=manifest.model,
        manifest_digest=manifest.digest,
        replicas=context.node.settings.replica_count,
        total=_counts(coverage.total),
        layers=[LayerCoverage(layer=layer, **_counts(c).model_dump()) for layer, c in coverage.layers.items()],
        lost=[ExpertRef(layer=key.layer, expert=key.expert) for key in coverage.lost if key.is_expert],
        lost_dense=[key.layer for key in coverage.lost if not key.is_expert],
    )

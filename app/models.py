"""The documents of the API, as the OpenAPI document describes them. Sizes in bytes, checksums xxh3-128 in hex."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from app.membership import PeerState
from app.node import NodeState
from transfer.progress import RestoreState
from transfer.sources import SourceKind

EXPERTS_MAX = 1 << 20  # named in one request

NodeId = Annotated[str, Field(min_length=1, max_length=200, examples=["node-a"])]
Layer = Annotated[int, Field(ge=0, le=2**31 - 1)]


class Document(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Live(Document):
    status: Literal["ok"] = "ok"


class Readiness(Document):
    ready: bool
    state: NodeState
    checks: dict[str, bool] = Field(
        description="Each must hold: `manifest` is known, every block placed here is `published` (so verified), the "
        "segment is `sealed`, its memory is `registered` with the transfer engine."
    )
    missing: int = Field(description="Blocks placed here that are not published.")


class NodeDocument(Document):
    node_id: str
    model: str
    namespace: str
    state: NodeState
    manifest_digest: str | None
    session_id: str = Field(description="What peers call this node's transfer engine. Another after each restart.")
    segment: str = Field(description="Name of the shared-memory object in /dev/shm.")
    bytes: int = Field(description="Bytes of the published blocks.")
    blocks: int = Field(description="Published blocks.")
    version: str
    revision: str = Field(description="Changes whenever what the node publishes does.")
    replicas: int
    placement_digest: str | None
    started_at: datetime


class ManifestFile(Document):
    name: str
    nbytes: int
    header_digest: str


class ManifestTensor(Document):
    name: str = Field(description="`{layer}` and `{expert}` stand for the block's numbers.")
    dtype: str
    shape: list[int]
    offset: int = Field(description="Within the block.")
    nbytes: int


class ManifestSchema(Document):
    nbytes: int
    tensors: list[ManifestTensor]


class ManifestBlock(Document):
    layer: int = Field(description="-1: outside any layer.")
    expert: int = Field(description="-1: the dense tensors of the layer.")
    schema_: int = Field(alias="schema", description="Index into `schemas`.")
    ranges: list[tuple[int, int]] = Field(description="[file, offset] of each tensor of the schema.")


class ManifestDocument(Document):
    model: str
    family: str
    include: Literal["experts", "all"]
    digest: str
    files: list[ManifestFile]
    schemas: list[ManifestSchema]
    blocks: list[ManifestBlock]


class Replica(Document):
    node_id: str
    session_id: str
    address: int = Field(description="Of the block in the memory of that session's process.")


class MappedExpert(Document):
    layer: int
    expert: int
    nbytes: int
    checksum: str
    replicas: list[Replica]


class MappedDense(Document):
    layer: int | None
    nbytes: int
    checksum: str
    replicas: list[Replica]


class ShardMap(Document):
    model: str
    manifest_digest: str
    revision: str
    experts: list[MappedExpert]
    dense: list[MappedDense] = Field(description="Dense tensors, by layer; only with `--include all`.")


class PeerDocument(Document):
    node_id: str
    url: str
    state: PeerState
    last_seen: datetime | None
    self_: bool = Field(False, alias="self", description="The node that answers.")
    node_state: NodeState | None = Field(None, description="What it last said of itself.")
    conflict: str | None = Field(None, description="Why nothing is taken from it, although it answers.")
    warning: str | None = Field(None, description="What its options and ours disagree on, without harm to any byte.")
    error: str | None = Field(None, description="Why it last did not answer.")


class Nodes(Document):
    nodes: list[PeerDocument]


class CoverageCounts(Document):
    blocks: int
    by_replicas: dict[int, int] = Field(description="Number of live replicas → number of blocks that have so many.")


class LayerCoverage(CoverageCounts):
    layer: int


class ExpertRef(Document):
    layer: Layer
    expert: Annotated[int, Field(ge=0, le=2**31 - 1)]


class CoverageDocument(Document):
    model: str
    manifest_digest: str
    replicas: int = Field(description="How many every block should have.")
    total: CoverageCounts
    layers: list[LayerCoverage]
    lost: list[ExpertRef] = Field(description="Experts that no live node has: only the disk can bring them back.")
    lost_dense: list[int] = Field(
        description="Layers whose dense tensors no live node has; -1: those outside any layer."
    )


class RestoreTarget(Document):
    """One of the two."""

    node_id: NodeId | None = None
    consumer_id: NodeId | None = None

    @model_validator(mode="after")
    def _one(self) -> RestoreTarget:
        if (self.node_id is None) == (self.consumer_id is None):
            raise ValueError("give node_id or consumer_id, one of them")
        return self


class RestoreRequest(Document):
    target: RestoreTarget
    experts: Annotated[list[ExpertRef], Field(min_length=1, max_length=EXPERTS_MAX)] | None = Field(
        None, description="null: every block that belongs to the target."
    )
    sources: Annotated[list[Literal["peer", "disk"]], Field(min_length=1)] | None = Field(
        None, description="null: peers, then disk. Memory of the target's own host is always used."
    )


class FailedExpert(Document):
    layer: int
    expert: int
    reason: str


class RestoreDocument(Document):
    id: str
    target: RestoreTarget
    state: RestoreState
    blocks_total: int
    blocks_done: int
    bytes_total: int
    bytes_done: int
    bytes_by_source: dict[SourceKind, int]
    failed: list[FailedExpert] = Field(description="Blocks that could not be had; the first 1,000.")
    failed_total: int
    error: str | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class Restores(Document):
    restores: list[RestoreDocument] = Field(description="Newest first.")

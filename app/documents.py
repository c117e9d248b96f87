"""The documents of the API, as the OpenAPI document describes them. Sizes in bytes, checksums xxh3-128 in hex.

They are below the restores, not in `app.api`: nodes speak to each other in the same documents as people do.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetPydanticSchema,
    model_validator,
)
from pydantic_core import core_schema

from app.cluster.membership import PeerState
from app.node.node import NodeState
from shm.block import NBYTES_MAX
from transfer.progress import RestoreState
from transfer.push.destination import PUSH_LIMITS
from transfer.push.table import (
    ADDRESS_MAX,
    BASES_MAX,
    COPIES_PER_FORM_MAX,
    FORMS_MAX,
    RANGES_MAX,
    RUNS_PER_SLOT_MAX,
    SLOTS_MAX,
    FormCopy,
    SlotBases,
)
from transfer.sources import SourceKind

TTL_S_MIN = 1.0
TTL_S_MAX = 7 * 86400.0
TTL_S_DEFAULT = 300.0
EPOCH_MAX = 1 << 62  # epochs count from a node's start in ns since 1970; a power of two, which a float has exactly
EXPERTS_MAX = 1 << 17  # named in one request; DeepSeek-V3 has 14,848

Item = TypeVar("Item")


def give_way(value: Any) -> Any:
    """What it is given. A parser or validator in C or Rust that calls this for each of many objects lets other threads
    run meanwhile: the event loop, above all."""
    return value


Many = Annotated[list[Annotated[Item, BeforeValidator(give_way)]], Field(fail_fast=True)]
"""A list that may be long: it is refused at its first fault, for to name all of many takes longer than to be wrong."""


def kept_as(kind: type[NamedTuple], document: type[BaseModel]) -> GetPydanticSchema:
    """For `Annotated[kind, …]`: what is said is a document, and what is kept of it a tuple of values.

    Python's cyclic garbage collector looks through all that is alive, again and again while much is made, and holds all
    threads up meanwhile. A document of numbers and a list is four things to it, a tuple of numbers and a tuple one."""

    def keep(said: Any) -> Any:
        return kind(*(getattr(said, name) for name in kind._fields))

    return GetPydanticSchema(lambda _, make: core_schema.no_info_after_validator_function(keep, make(document)))


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
        "segment is `sealed`, its memory is `registered` with the transfer engine, and readers find it: it is "
        "`attachable`."
    )
    missing: int = Field(description="Blocks placed here that are not published.")
    detail: str | None = Field(None, description="What readers would stumble over, or what has no room in memory.")


class NodeDocument(Document):
    node_id: str
    model: str
    namespace: str
    state: NodeState
    manifest_digest: str | None
    content_digest: str | None = Field(
        description="Identity of the weights' bytes, xxh3-128 of a sample of every tensor: two nodes share blocks only "
        "if theirs are equal. null while it is not known."
    )
    session_id: str = Field(description="What peers call this node's transfer engine. Another after each restart.")
    segment: str = Field(description="Name of the shared-memory object in /dev/shm.")
    bytes: int = Field(description="Bytes of the published blocks.")
    blocks: int = Field(description="Published blocks.")
    blocks_unproved: int = Field(description="Published blocks not proved against their checksums since it started.")
    proved_oldest: datetime | None = Field(
        description="When the oldest proof of a published block was: rot older than that was found. null while one was "
        "never proved."
    )
    version: str
    revision: str = Field(description="Changes whenever what the node publishes does.")
    shortage: str | None = Field(
        None, description="What of this node has no room in memory, and why. What it has goes on being served."
    )
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
    node_id: str = Field(description="The node that answers.")
    manifest_digest: str
    content_digest: str
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
    blocks_unproved: int | None = Field(None, description="As in its own document, when it last said so.")
    proved_oldest: datetime | None = Field(None, description="Likewise.")
    conflict: str | None = Field(None, description="Why nothing is taken from it, although it answers.")
    warning: str | None = Field(
        None,
        description="That its memory cannot be read from here, what its options and ours disagree on, or that two run "
        "under its id.",
    )
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

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"properties": {name: {"type": "string"}}, "required": [name]} for name in ("node_id", "consumer_id")
            ]
        }
    )

    node_id: NodeId | None = None
    consumer_id: NodeId | None = None

    @model_validator(mode="after")
    def _one(self) -> RestoreTarget:
        if (self.node_id is None) == (self.consumer_id is None):
            raise ValueError("give node_id or consumer_id, one of them")
        return self


class RestoreRequest(Document):
    model_config = ConfigDict(
        json_schema_extra={
            "not": {
                "properties": {
                    "read_back": {"const": True},
                    "target": {"properties": {"node_id": {"type": "string"}}, "required": ["node_id"]},
                },
                "required": ["read_back", "target"],
            }
        }
    )

    target: RestoreTarget
    experts: Annotated[Many[ExpertRef], Field(min_length=1, max_length=EXPERTS_MAX)] | None = Field(
        None, description="null: every block that belongs to the target."
    )
    sources: Annotated[list[Literal["peer", "disk"]], Field(min_length=1)] | None = Field(
        None, description="null: peers, then disk. Memory of the target's own host is always used."
    )
    read_back: bool = Field(
        False, description="Of a consumer: read what was written back, and compare it. Takes about twice as long."
    )

    @model_validator(mode="after")
    def _read_back_of_consumer(self) -> RestoreRequest:
        if self.read_back and self.target.consumer_id is None:
            raise ValueError("read_back is for consumers: a node verifies its own memory anyway")
        return self


class FailedExpert(Document):
    layer: int
    expert: int
    reason: str


class RestoreDocument(Document):
    id: Annotated[str, Field(pattern="^[0-9A-Za-z_-]{1,64}$")]
    target: RestoreTarget
    state: RestoreState
    blocks_total: int
    blocks_done: int
    bytes_total: int
    bytes_done: int
    bytes_by_source: dict[SourceKind, int]
    failed: list[FailedExpert] = Field(
        description="Blocks that could not be had; the first 1,000, in a list of restores 10."
    )
    failed_total: int
    error: str | None
    created_at: AwareDatetime
    started_at: AwareDatetime | None
    finished_at: AwareDatetime | None


class Restores(Document):
    restores: list[RestoreDocument] = Field(description="Newest first.")


# -- consumers -------------------------------------------------------------------------------------------------

Address = Annotated[int, Field(ge=1, le=ADDRESS_MAX)]
Offset = Annotated[int, Field(ge=0, le=NBYTES_MAX)]
Length = Annotated[int, Field(ge=1, le=NBYTES_MAX)]
TtlS = Annotated[float, Field(ge=TTL_S_MIN, le=TTL_S_MAX)]


class FormCopyDocument(Document):
    """`rows` runs of `run_nbytes`: `block_pitch` apart in the block, `pitch` apart at bases[`base`] + `offset`."""

    block_offset: Offset
    base: Annotated[int, Field(ge=0, lt=BASES_MAX, description="Index into the slot's `bases`.")]
    offset: Offset
    rows: Annotated[int, Field(ge=1, le=RUNS_PER_SLOT_MAX)]
    run_nbytes: Length
    block_pitch: Offset
    pitch: Offset


class SlotDocument(Document):
    """A place that holds one expert. Two slots of one expert are siblings: both are written."""

    layer: Layer
    expert: Annotated[int, Field(ge=0, le=2**31 - 1)]
    form: Annotated[int, Field(ge=0, lt=FORMS_MAX, description="Index into `forms`.")]
    bases: Annotated[tuple[Address, ...], Field(min_length=1, max_length=BASES_MAX)]


KeptCopy = Annotated[FormCopy, kept_as(FormCopy, FormCopyDocument)]
KeptSlot = Annotated[SlotBases, kept_as(SlotBases, SlotDocument)]


class PushTableDocument(Document):
    """Where blocks belong in an engine's memory. Nothing outside `ranges` is ever written."""

    session_id: Annotated[
        str, Field(pattern=r"^[^\s/@]{1,255}:[0-9]{1,5}$", description="Of the engine's transfer engine: host:port.")
    ]
    manifest_digest: Annotated[str, Field(pattern="^[0-9a-f]{64}$", description="The manifest that it was made for.")]
    content_digest: Annotated[str, Field(pattern="^[0-9a-f]{32}$")] | None = Field(
        None, description="The weights that the slots hold; null: those that the node has now. No others are written."
    )
    ranges: Annotated[
        Many[tuple[Address, Length]],
        Field(min_length=1, max_length=RANGES_MAX, description="[address, nbytes] registered with that engine."),
    ]
    forms: Annotated[
        Many[Annotated[Many[KeptCopy], Field(min_length=1, max_length=COPIES_PER_FORM_MAX)]],
        Field(min_length=1, max_length=FORMS_MAX, description="What slots that look alike share."),
    ]
    slots: Annotated[Many[KeptSlot], Field(min_length=1, max_length=SLOTS_MAX)]


class ConsumerRequest(PushTableDocument):
    ttl_s: TtlS = Field(TTL_S_DEFAULT, description="It is forgotten that long after it was last registered or renewed.")


class ConsumerDocument(Document):
    id: str
    node_id: str = Field(description="The node it is registered with, which plans its restores.")
    session_id: str
    manifest_digest: str
    content_digest: str = Field(description="Of the weights that it is restored with, and of no others.")
    epoch: int = Field(description="Of this registration: another one for each. Leases to write to it name it.")
    blocks: int = Field(description="Experts that have a slot.")
    slots: int
    ranges: int
    bytes: int = Field(description="That a restore of all of it writes.")
    ttl_s: float
    registered_at: datetime
    expires_in_s: float
    error: str | None = Field(description="Why its memory could not be written last time.")


class Consumers(Document):
    consumers: list[ConsumerDocument]


class LeaseRequest(Document):
    epoch: Annotated[int, Field(ge=0, le=EPOCH_MAX, description="Of the registration that is to be written to.")]
    push_id: Annotated[str, Field(min_length=1, max_length=64, pattern="^[!-~]+$")]


class LeaseDocument(Document):
    ttl_s: float = Field(description="For so long the push may write, from when it asked.")


class DoubtedBlock(Document):
    layer: Annotated[int, Field(ge=-1, le=2**31 - 1)]
    expert: Annotated[int, Field(ge=-1, le=2**31 - 1, description="-1: the dense tensors of the layer.")]


class DoubtRequest(Document):
    content_digest: Annotated[str, Field(pattern="^[0-9a-f]{32}$", description="Of the weights that were read.")]
    blocks: Annotated[list[DoubtedBlock], Field(min_length=1, max_length=EXPERTS_MAX)]


class WantedExpert(ExpertRef):
    checksum: Annotated[str, Field(pattern="^[0-9a-f]{32}$", description="That the block must have.")]


class PushLease(Document):
    """Where the node that is asked to push gets the right to write: from the consumer's own node."""

    node_id: NodeId
    consumer_id: Annotated[str, Field(min_length=1, max_length=200, pattern="^[!-~]+$")]
    epoch: Annotated[int, Field(ge=0, le=EPOCH_MAX)]
    push_id: Annotated[str, Field(min_length=1, max_length=64, pattern="^[!-~]+$")]


class PushRequest(PushTableDocument):
    lease: PushLease
    blocks: Annotated[Many[WantedExpert], Field(min_length=1, max_length=PUSH_LIMITS.items)]
    read_back: bool = False


class PushedExpert(Document):
    layer: int
    expert: int
    said: str = Field(description="The checksum that was verified; of a failed one, the reason.")


class PushDocument(Document):
    """What became of a push. With `consumer_error` nothing is known to be in place."""

    pushed: list[PushedExpert]
    failed: list[PushedExpert]
    consumer_error: str | None

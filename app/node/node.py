"""The node: its engine, what it holds, and the one place that says READY.

    STARTING ──▶ WAITING ──▶ FILLING ──▶ READY          WAITING: no manifest yet, or told to wait for a restore
                    ▲           │▲          │           DEGRADED: a restore ended and blocks are still missing
                    └─ renew ───┴DEGRADED ◀─┘           STOPPING: from every state, at the end

Ready means: every block placed here is published (so it was verified), the segment is sealed, and its memory is
registered with the transfer engine. It is derived from those three, never remembered.

What the node has is its `holding`, replaced whole. One thread changes it, the restore worker's, and `open` and `close`
while that one does not run; every other thread reads it. So there is no lock here, and nothing that reads waits for a
reservation of hundreds of gigabytes or for a comparison with files.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from dataclasses import replace
from enum import StrEnum
from functools import partial

import numpy as np

from app.cluster.cluster import Cluster
from app.cluster.peers import PeerBlocks
from app.cluster.placement import Int64s, Placement
from app.cluster.prober import Prober
from app.node.adoption import OwnCheckpoint, difference, is_content_of
from app.node.destination import SegmentDestination
from app.node.holding import NOTHING, Holding
from app.node.offering import DISK, offer
from app.settings import Settings
from shm.block import ExpertKey
from shm.errors import InvalidInput, ManifestError
from shm.layout import BlockState, SegmentName, SegmentState
from shm.manifest import Manifest
from shm.segment import Segment
from transfer.engine import MooncakeEngine, TransferEngine
from transfer.errors import NothingToRestore
from transfer.plan import Want
from transfer.progress import Progress
from transfer.restore import Restore
from transfer.sources import Disk, HostMemory, PeerMemory, SourceKind, reading

IN_PLACE = "in place"

_log = logging.getLogger("hotspare.node")


class NodeState(StrEnum):
    STARTING = "starting"
    WAITING = "waiting"
    FILLING = "filling"
    READY = "ready"
    DEGRADED = "degraded"
    STOPPING = "stopping"


class Node:
    """One node. `open`, `plan_restore` and `run` block; what is read of it is for any thread."""

    def __init__(self, settings: Settings, cluster: Cluster, prober: Prober) -> None:
        self.settings = settings
        self.cluster = cluster
        self.name = SegmentName(settings.namespace, settings.require_model(), settings.node_id)
        self.checkpoint = OwnCheckpoint(settings.checkpoint, self.name.model, settings.include)
        self.engine: TransferEngine | None = None
        self.holding: Holding | None = None
        """None while there is no manifest. Read it once, and go by what was read."""
        self._prober = prober
        self._segment: Segment | None = None
        self.is_restoring = False
        """Whether a restore into the segment is under way."""
        self._is_stopping = False

    # -- starting --------------------------------------------------------------------------------------------

    def open(self, engine: TransferEngine | None = None) -> None:
        """Claim the segment, start an engine if none is given, and adopt what a predecessor left, if it is right.

        Raises SegmentBusy, EngineError, CheckpointError, SharedMemoryFull: none of them leaves a segment behind.
        """
        self._segment = Segment.claim(self.name)
        try:
            self.engine = engine or MooncakeEngine(self.settings.engine_host, self.settings.transport)
            if self._segment.is_allocated:
                self._adopt(self._segment)
            elif (checkpoint := self.checkpoint.open()) is not None:
                self.use_manifest(checkpoint.manifest)
        except BaseException:
            self.close()
            raise

    def _adopt(self, segment: Segment) -> None:
        self.checkpoint.open_beside(segment.manifest)
        checkpoint = self.checkpoint.read
        if checkpoint is None or is_content_of(checkpoint, segment):
            self.use_manifest(segment.manifest)
        else:
            _log.warning("the sealed segment is of another checkpoint than %s: filling anew", checkpoint.directory)
            self.start_over(checkpoint.manifest)

    def use_manifest(self, manifest: Manifest) -> None:
        """Take this manifest for the model's: place its blocks, make room for ours, open it to the engine."""
        settings, segment = self.settings, self.segment
        if manifest.model != self.name.model:
            raise ManifestError(f"the manifest is of {manifest.model!r}, this node serves {self.name.model!r}")
        placement = Placement.compute(manifest, settings.node_ids, settings.replica_count)
        rows = placement.rows_of(settings.node_id).tolist()
        if segment.is_allocated:
            segment.extend(rows)
        else:
            segment.allocate(manifest, rows)
        holding = Holding(settings.node_id, segment, manifest, placement, ())
        self.holding = replace(holding, registered=self._register(segment))
        self.cluster.use_manifest(manifest, placement.digest)

    def _register(self, segment: Segment) -> tuple[tuple[int, int], ...]:
        """Open the segment's memory to the engine, as far as it is not yet; what is open then."""
        before, ranges = self.holding.registered if self.holding else (), segment.data_ranges()
        if self.engine is not None:
            self.engine.register([each for each in ranges if each not in before])
        return tuple(ranges)

    def start_over(self, manifest: Manifest) -> None:
        """Give the segment's content up, and make room for that of this manifest in a new one."""
        before, self.holding = self.holding, None
        if self.engine is not None and before is not None:
            self.engine.unregister(before.registered)
        self._segment = self.segment.renew()
        self.use_manifest(manifest)

    # -- what is so ------------------------------------------------------------------------------------------

    @property
    def segment(self) -> Segment:
        """The segment that the node owns, which has no content while there is no holding."""
        if self._segment is None:
            raise InvalidInput("the node has not been opened, or is closed")
        return self._segment

    @property
    def manifest(self) -> Manifest | None:
        return self.holding.manifest if self.holding else None

    @property
    def revision(self) -> str:
        """Changes whenever what this node publishes does."""
        return self.holding.revision if self.holding else ""

    def published(self) -> Int64s:
        return self.holding.published() if self.holding else np.zeros(0, dtype=np.int64)

    def missing(self) -> Int64s:
        """Rows that belong here and are not published."""
        return self.holding.missing() if self.holding else np.zeros(0, dtype=np.int64)

    def checks(self) -> dict[str, bool]:
        """What READY consists of."""
        return self.holding.checks() if self.holding else dict(NOTHING)

    @property
    def state(self) -> NodeState:
        if self._is_stopping:
            return NodeState.STOPPING
        if self._segment is None:
            return NodeState.STARTING
        if all(self.checks().values()):
            return NodeState.READY
        if self.is_restoring:
            return NodeState.FILLING
        return NodeState.DEGRADED if len(self.published()) else NodeState.WAITING

    def look(self) -> None:
        """Ask the peers what they have now. Blocks."""
        self._prober.look()

    # -- restoring -------------------------------------------------------------------------------------------

    def rows_of(self, experts: Iterable[ExpertKey] | None) -> Int64s:
        """Manifest rows of these experts, or of all that belong here.

        Raises NothingToRestore without a manifest, BlockUnavailable for an expert that the model lacks, InvalidInput
        for one that is placed elsewhere.
        """
        return self._held().rows_of(experts)

    def _held(self) -> Holding:
        if self.holding is None:
            raise NothingToRestore("this node has no manifest yet: no peer that answers has one, and no --checkpoint")
        return self.holding

    def plan_restore(
        self, experts: Iterable[ExpertKey] | None, kinds: Collection[SourceKind], progress: Progress
    ) -> Restore:
        """A restore of these experts into our segment, ready to run. Asks the peers what they have now."""
        if SourceKind.PEER in kinds:
            self._prober.look()
        if self.holding is None and (manifest := self._prober.fetch_manifest()) is not None:
            self.use_manifest(manifest)
            self._prober.look()
        holding = self._held()
        rows = holding.rows_of(experts).tolist()
        checkpoint = self.checkpoint.serving(holding.manifest) if SourceKind.DISK in kinds else None
        tiers, offered = offer(
            holding,
            rows,
            self.cluster,
            HostMemory(IN_PLACE, holding.segment, lanes=1),
            self._reach if SourceKind.PEER in kinds else None,
            None if checkpoint is None else Disk(DISK, lambda: checkpoint),
        )
        nbytes, keys = holding.manifest.nbytes, holding.manifest.keys
        return Restore(
            [Want(row, int(nbytes[row]), offered.expected.get(row)) for row in rows],
            offered.by_row,
            tiers,
            SegmentDestination(holding.segment),
            keys.__getitem__,
            progress,
            partial(self._settle, holding),
            offered.reasons,
        )

    def _reach(self, node_id: str, held: PeerBlocks) -> PeerMemory:
        assert self.engine is not None
        return PeerMemory(node_id, reading(self.engine, held.session_id))

    def run(self, restore: Restore) -> None:
        """Run a planned restore to its end. What is complete then is sealed before the restore says it is over."""
        self.is_restoring = True
        try:
            restore.run()
        finally:
            self.is_restoring = False

    def _settle(self, holding: Holding) -> None:
        segment = holding.segment
        if holding is not self.holding or len(holding.missing()):
            return
        differs = self._difference(holding) is not None
        if differs and self.settings.fill == "auto" and segment.state is not SegmentState.SEALED:
            return  # no reader may find what the caretaker is about to replace by the checkpoint's own
        if not len(segment.rows(BlockState.RESERVED, BlockState.QUARANTINED)):
            segment.seal()

    def _difference(self, holding: Holding) -> ExpertKey | None:
        """A block of ours that is not the checkpoint's; None where none is seen to differ."""
        checkpoint = self.checkpoint.read
        if checkpoint is None or checkpoint.manifest.digest != holding.manifest.digest:
            return None
        return difference(checkpoint, holding.segment)

    def replace_foreign(self) -> None:
        """Start over, for the checkpoint's content, where what is complete here and unsealed is other content.

        Peers hold it when a model was exchanged under its name: the checkpoint wins.
        """
        holding, checkpoint = self._held(), self.checkpoint.read
        if checkpoint is None or holding.segment.state is SegmentState.SEALED:
            return
        if (key := self._difference(holding)) is not None:
            _log.error("peers hold other weights than %s (first %s): filling from disk", checkpoint.directory, key)
            self.start_over(checkpoint.manifest)

    # -- stopping --------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Let everything go. A sealed segment stays for the next daemon; an unsealed one is removed."""
        self._is_stopping = True
        holding, self.holding = self.holding, None
        segment, self._segment = self._segment, None
        if segment is None:
            return
        try:
            if self.engine is not None and holding is not None:
                self.engine.unregister(holding.registered)
        except Exception:  # what it will not give back must not keep the segment owned
            _log.exception("the engine did not let go of the segment's memory: closing the segment all the same")
        if segment.state is SegmentState.SEALED:
            segment.close()
        else:
            segment.unlink()

"""The node: its segment, its engine, its manifest, and the one place that says READY.

    STARTING ──▶ WAITING ──▶ FILLING ──▶ READY          WAITING: no manifest yet, or told to wait for a restore
                    ▲           │▲          │           DEGRADED: a restore ended and blocks are still missing
                    └─ renew ───┴DEGRADED ◀─┘           STOPPING: from every state, at the end

Ready means: every block placed here is published (so it was verified), the segment is sealed, and its memory is
registered with the transfer engine. It is derived from those three, never remembered.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path

import numpy as np

from app.cluster.cluster import Cluster
from app.cluster.membership import PeerState
from app.cluster.placement import Int64s, Placement
from app.node.destination import SegmentDestination
from app.settings import Settings
from shm.block import ExpertKey
from shm.checksum import CHECKSUM_NBYTES
from shm.errors import InvalidInput, ManifestError
from shm.layout import BlockState, SegmentName, SegmentState
from shm.manifest import Manifest
from shm.segment import Segment
from transfer.checkpoint import Checkpoint, changed_files, read_checkpoint
from transfer.checkpoint.origin import first_difference, identity
from transfer.engine import MooncakeEngine, TransferEngine
from transfer.errors import CheckpointError, NothingToRestore
from transfer.plan import Offer, Piece, Want
from transfer.progress import Progress
from transfer.restore import Restore
from transfer.sources import DiskSource, InPlace, PeerSource, Source, SourceKind

UNKNOWN_CHECKSUM = bytes(CHECKSUM_NBYTES)  # of a block that was never published here
IN_PLACE = "in place"
DISK = "disk"

_log = logging.getLogger("hotspare.node")


class NodeState(StrEnum):
    STARTING = "starting"
    WAITING = "waiting"
    FILLING = "filling"
    READY = "ready"
    DEGRADED = "degraded"
    STOPPING = "stopping"


class Node:
    """One node. `open` and `restore` block; the properties are for any thread."""

    def __init__(self, settings: Settings, cluster: Cluster) -> None:
        self.settings = settings
        self.cluster = cluster
        self.name = SegmentName(settings.namespace, settings.require_model(), settings.node_id)
        self.checkpoint: Checkpoint | None = None
        self.manifest: Manifest | None = None
        self.placement: Placement | None = None
        self.engine: TransferEngine | None = None
        self._segment: Segment | None = None
        self._registered: list[tuple[int, int]] = []
        self._changes = 0
        self._restoring = False
        self._stopping = False
        self._lock = threading.RLock()

    # -- starting --------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Claim the segment, start the engine, and adopt what a predecessor left, if it is right.

        Raises SegmentBusy, EngineError, CheckpointError, SharedMemoryFull: none of them leaves a segment behind.
        """
        self._segment = Segment.claim(self.name)
        try:
            self.engine = MooncakeEngine(self.settings.engine_host, self.settings.transport)
            if self._segment.is_allocated:
                self._open_sealed(self._segment)
            elif self.settings.checkpoint is not None:
                self.checkpoint = self._read_checkpoint(self.settings.checkpoint)
                self.use_manifest(self.checkpoint.manifest)
        except BaseException:
            self.close()
            raise

    def _read_checkpoint(self, directory: object) -> Checkpoint:
        return read_checkpoint(str(directory), self.name.model, self.settings.include)

    def _compare_checkpoint(self, directory: Path, manifest: Manifest) -> Checkpoint:
        """The checkpoint, whose headers are parsed only if they are not those that the manifest was made of.

        Parsing DeepSeek-V3's takes a second or two, which a restart has not.
        """
        with suppress(CheckpointError):  # also where files have other names now
            if manifest.include == self.settings.include and not changed_files(directory, manifest):
                # A copy: a manifest on the segment's own pages would keep them mapped when the segment is given up.
                return Checkpoint(directory, Manifest.from_bytes(manifest.to_bytes(), manifest.digest))
        return self._read_checkpoint(directory)

    def _open_sealed(self, segment: Segment) -> None:
        if self.settings.checkpoint is not None:
            try:
                self.checkpoint = self._compare_checkpoint(self.settings.checkpoint, segment.manifest)
            except CheckpointError as error:
                _log.warning("adopting the sealed segment without its checkpoint: %s", error)
        if self.checkpoint is None or self._is_content_of(self.checkpoint, segment):
            self.use_manifest(segment.manifest)
        else:
            _log.warning("the sealed segment is of another checkpoint than %s: filling anew", self.checkpoint.directory)
            self.renew()
            self.use_manifest(self.checkpoint.manifest)

    @staticmethod
    def _is_content_of(checkpoint: Checkpoint, segment: Segment) -> bool:
        """Whether the segment was filled from these files, or from others with the same bytes."""
        if checkpoint.manifest.digest != segment.manifest.digest:
            return False
        try:
            origin = identity(checkpoint)
            if segment.header.origin == origin:
                return True
            if (key := first_difference(checkpoint, segment)) is not None:
                _log.warning("%s differs between the segment and %s", key, checkpoint.directory)
                return False
        except CheckpointError as error:
            _log.warning("adopting the sealed segment without comparing it: %s", error)
            return True
        segment.record_origin(origin)
        return True

    def use_manifest(self, manifest: Manifest) -> None:
        """Take this manifest for the model's: place its blocks, make room for ours, open it to the engine."""
        settings = self.settings
        if manifest.model != self.name.model:
            raise ManifestError(f"the manifest is of {manifest.model!r}, this node serves {self.name.model!r}")
        placement = Placement.compute(manifest, settings.node_ids, settings.replica_count)
        with self._lock:
            segment = self.segment
            rows = placement.rows_of(settings.node_id)
            if segment.is_allocated:
                segment.extend(rows.tolist())
            else:
                segment.allocate(manifest, rows.tolist())
            self.manifest, self.placement = manifest, placement
            self._register()
            self._changes += 1
        self.cluster.use_manifest(manifest, placement.digest)

    def _register(self) -> None:
        """Open the segment's memory to the engine, as far as it is not yet."""
        engine, ranges = self.engine, self.segment.data_ranges()
        if engine is not None:
            engine.register([r for r in ranges if r not in self._registered])
            self._registered = ranges

    def renew(self) -> None:
        """Give the segment's content up and start with an empty one."""
        with self._lock:
            if self.engine is not None:
                self.engine.unregister(self._registered)
            self._registered = []
            self._segment = self.segment.renew()
            self.manifest = self.placement = None
            self._changes += 1

    # -- what is so ------------------------------------------------------------------------------------------

    @property
    def segment(self) -> Segment:
        if self._segment is None:
            raise InvalidInput("the node has not been opened, or is closed")
        return self._segment

    @property
    def revision(self) -> str:
        """Changes whenever what this node publishes does."""
        return f"{self._segment.header.generation if self._segment else 0:x}-{self._changes}"

    def _note_change(self) -> None:
        self._changes += 1

    def placed(self) -> Int64s:
        """Manifest rows that belong here."""
        if self.placement is None:
            return np.zeros(0, dtype=np.int64)
        return self.placement.rows_of(self.settings.node_id)

    def published(self) -> Int64s:
        with self._lock:
            if self._segment is None or not self._segment.is_allocated:
                return np.zeros(0, dtype=np.int64)
            return self._segment.published()

    def missing(self) -> Int64s:
        """Rows that belong here and are not published."""
        return np.setdiff1d(self.placed(), self.published(), assume_unique=True)

    def checks(self) -> dict[str, bool]:
        """What READY consists of."""
        segment = self._segment
        has_content = segment is not None and segment.is_allocated and self.manifest is not None
        return {
            "manifest": self.manifest is not None,
            "published": has_content and not len(self.missing()),
            "sealed": has_content and segment is not None and segment.state is SegmentState.SEALED,
            "registered": has_content and bool(self._registered),
        }

    @property
    def state(self) -> NodeState:
        if self._stopping:
            return NodeState.STOPPING
        if self._segment is None:
            return NodeState.STARTING
        if all(self.checks().values()):
            return NodeState.READY
        if self._restoring:
            return NodeState.FILLING
        return NodeState.DEGRADED if len(self.published()) else NodeState.WAITING

    # -- restoring -------------------------------------------------------------------------------------------

    def rows_of(self, experts: Iterable[ExpertKey] | None) -> Int64s:
        """Manifest rows of these experts, or of all that belong here.

        Raises BlockUnavailable for an expert that the model lacks, InvalidInput for one that is placed elsewhere.
        """
        if self.manifest is None:
            raise NothingToRestore("this node has no manifest yet: no peer that answers has one, and no --checkpoint")
        if experts is None:
            return self.placed()
        rows = sorted({self.manifest.index(*key) for key in experts})
        strangers = [row for row in rows if not self.segment.holds(row)]
        if strangers:
            layer, expert = self.manifest.keys[strangers[0]]
            raise InvalidInput(
                f"expert {expert} of layer {layer} is not placed on node {self.settings.node_id}: restore it on "
                f"{', '.join(self.placement.nodes_of(strangers[0])) if self.placement else 'its own nodes'}"
            )
        return np.array(rows, dtype=np.int64)

    def plan_restore(
        self, experts: Iterable[ExpertKey] | None, kinds: Collection[SourceKind], progress: Progress
    ) -> Restore:
        """A restore of these experts into our segment, ready to run. Asks the peers what they have now."""
        if SourceKind.PEER in kinds:
            self.cluster.refresh()
        if self.manifest is None and (manifest := self.cluster.fetch_manifest()) is not None:
            self.use_manifest(manifest)
            self.cluster.refresh()
        rows = self.rows_of(experts).tolist()
        with self._lock:
            tiers, offers, expected = self._offers(rows, kinds)
            wants = [self._want(row, expected.get(row)) for row in rows]
        destination = SegmentDestination(self.segment, self._note_change)
        return Restore(wants, offers, tiers, destination, self._key_of, progress, self._settle)

    def _key_of(self, row: int) -> ExpertKey:
        assert self.manifest is not None
        return self.manifest.keys[row]

    def _want(self, row: int, expected: bytes | None) -> Want:
        nbytes = int(self.segment.manifest.nbytes[row])
        return Want(row, nbytes, (Piece(self.segment.address(row), 0, nbytes),), expected)

    def _offers(
        self, rows: Sequence[int], kinds: Collection[SourceKind]
    ) -> tuple[list[list[Source]], dict[int, list[Offer]], dict[int, bytes]]:
        """Who has what, and the checksum that each row must have.

        In place, then peers, then disk; last, peers that did not answer just now: the engine would wait for them, up to
        a minute, and move nothing else meanwhile.
        """
        segment = self.segment
        published = set(segment.rows(BlockState.PUBLISHED).tolist())
        expected = {row: c for row in rows if (c := segment.checksum(row)) != UNKNOWN_CHECKSUM}
        offers = {row: [Offer(IN_PLACE, segment.address(row))] if row in published else [] for row in rows}
        tiers: list[list[Source]] = [[InPlace(IN_PLACE)]]
        peers: list[Source] = []
        if SourceKind.PEER in kinds:
            peers = self._offer_peers(rows, offers, expected)
            alive = {peer.node_id for peer in self.cluster.peers() if peer.state is PeerState.ALIVE}
            tiers.append([source for source in peers if source.name in alive])
            peers = [source for source in peers if source.name not in alive]
        if SourceKind.DISK in kinds and (checkpoint := self._reachable_checkpoint()) is not None:
            disk = DiskSource(checkpoint, DISK)
            tiers.append([disk])
            for row in rows:
                offers[row].append(Offer(DISK, disk.position(row)))
        tiers.append(peers)
        return tiers, offers, expected

    def _offer_peers(
        self, rows: Sequence[int], offers: dict[int, list[Offer]], expected: dict[int, bytes]
    ) -> list[Source]:
        assert self.engine is not None
        holdings = self.cluster.holdings()
        for row in rows:
            held = [(node, block) for node, peer in holdings.items() if (block := peer.blocks.get(row)) is not None]
            if row not in expected:
                said = {block[1] for _, block in held}
                if len(said) != 1:
                    if said:
                        _log.error("replicas of %s disagree: %s", self._key_of(row), ", ".join(n for n, _ in held))
                    continue
                expected[row] = said.pop()
            offers[row].extend(Offer(node, block[0]) for node, block in held if block[1] == expected[row])
        return [PeerSource(node, peer.session_id, self.engine) for node, peer in holdings.items()]

    def _reachable_checkpoint(self) -> Checkpoint | None:
        """The checkpoint, looked for again if it could not be read before; None where it is not ours or not there."""
        if self.checkpoint is None and self.settings.checkpoint is not None:
            try:
                self.checkpoint = self._read_checkpoint(self.settings.checkpoint)
            except CheckpointError as error:
                _log.warning("the disk cannot serve: %s", error)
        if self.checkpoint is None or self.manifest is None:
            return None
        return self.checkpoint if self.checkpoint.manifest.digest == self.manifest.digest else None

    def run(self, restore: Restore) -> None:
        """Run a planned restore to its end. What is complete then is sealed before the restore says it is over."""
        self._restoring = True
        try:
            restore.run()
        finally:
            self._restoring = False

    def _settle(self) -> None:
        with self._lock:
            if self._segment is None or self.manifest is None or len(self.missing()):
                return
            checkpoint = self.checkpoint
            differs = False
            if checkpoint is not None and checkpoint.manifest.digest == self.manifest.digest:
                differs = self._record_origin(checkpoint) is not None
            if differs and self.settings.fill == "auto" and self.segment.state is not SegmentState.SEALED:
                return  # no reader may find what the filler is about to replace by the checkpoint's own
            if not len(self.segment.rows(BlockState.RESERVED, BlockState.QUARANTINED)):
                self.segment.seal()
            self._changes += 1

    def _record_origin(self, checkpoint: Checkpoint) -> ExpertKey | None:
        """Note whose content this is, if it is the checkpoint's; else the first block that differs."""
        try:
            origin = identity(checkpoint)
            if self.segment.header.origin == origin:
                return None
            key = first_difference(checkpoint, self.segment)
            if key is None:
                self.segment.record_origin(origin)
        except CheckpointError as error:
            _log.warning("the content was not compared with the checkpoint: %s", error)
            return None
        return key

    # -- stopping --------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Let everything go. A sealed segment stays for the next daemon; an unsealed one is removed."""
        with self._lock:
            self._stopping = True
            segment, self._segment = self._segment, None
            if segment is None:
                return
            try:
                if self.engine is not None:
                    self.engine.unregister(self._registered)
            except Exception:  # what it will not give back must not keep the segment owned
                _log.exception("the engine did not let go of the segment's memory: closing the segment all the same")
            self._registered = []
            if segment.state is SegmentState.SEALED:
                segment.close()
            else:
                segment.unlink()

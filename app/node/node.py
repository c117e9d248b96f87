"""The node: its engine, what it holds, and the one place that says READY.

    STARTING ──▶ WAITING ──▶ FILLING ──▶ READY          WAITING: no manifest yet, or told to wait for a restore
                    ▲           │▲          │           DEGRADED: a restore ended and blocks are still missing
                    └─ renew ───┴DEGRADED ◀─┘           STOPPING: from every state, at the end

Ready means: every block placed here is published (so it was verified), the segment is sealed, its memory is
registered with the transfer engine, and readers find it in /dev/shm. It is derived from those four, never remembered.

What is good is never given up for want of room: where a share that grew, or a new checkpoint, has none, what is here
goes on being served, and the shortage is told and tried again. A segment whose name is gone from /dev/shm can be
attached by nobody, but is mapped still: another takes the name, filled out of that memory.

What the node has is its `holding`, replaced whole. One thread changes it, the restore worker's, and `open` and `close`
while that one does not run; every other thread reads it. So there is no lock here, and nothing that reads waits for a
reservation of hundreds of gigabytes or for a comparison with files.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from functools import partial

import numpy as np

from app.cluster.cluster import Cluster
from app.cluster.peers import PeerBlocks
from app.cluster.placement import Int64s, Placement
from app.cluster.prober import Prober
from app.node.adoption import OwnCheckpoint
from app.node.destination import SegmentDestination
from app.node.holding import NOTHING, Holding
from app.node.offering import DISK, SecondLook, offer
from app.node.proofs import Proofs
from app.settings import Settings
from shm.block import ExpertKey
from shm.errors import InvalidInput, ManifestError, SharedMemoryFull
from shm.layout import BlockState, SegmentName, SegmentState
from shm.manifest import Manifest
from shm.segment import Damage, Segment
from transfer.checkpoint.content import DIGEST_NBYTES, PinnedCheckpoint
from transfer.engine import DisposableEngine, TransferEngine
from transfer.errors import CheckpointError, NothingToRestore
from transfer.plan import Want
from transfer.progress import Progress
from transfer.restore import Restore
from transfer.sources import Disk, HostMemory, PeerMemory, SourceKind, reading

LEFT_S = 30.0  # a predecessor's memory is served on for so long: who fetched a map before reads by it
UNKNOWN_ORIGIN = bytes(DIGEST_NBYTES)  # of content that came from peers

IN_PLACE = "in place"
NAMELESS = "the segment that lost its name"
SHARE = "all of this node's share"
CHECKPOINT = "the checkpoint's weights beside those that are here"
NAME = "a segment in place of the one that lost its name"
CUT_OFF = "what was cut off the segment"
"""What there may be no room for."""
RDMA = "rdma"

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

    def __init__(
        self, settings: Settings, cluster: Cluster, prober: Prober, start_engine: Callable[[], TransferEngine]
    ) -> None:
        """`start_engine` starts a transfer engine, and raises EngineError where it cannot."""
        self.settings = settings
        self.cluster = cluster
        self.name = SegmentName(settings.namespace, settings.require_model(), settings.node_id)
        self.checkpoint = OwnCheckpoint(settings.checkpoint, self.name.model, settings.include)
        self.engine: TransferEngine | None = None
        """Serves what is published to peers. None until `open`."""
        self.holding: Holding | None = None
        """None while there is no manifest. Read it once, and go by what was read."""
        self._prober = prober
        self._start_engine = start_engine
        self._reader = DisposableEngine(start_engine)
        """Reads from peers. Thrown away after a transfer that was given up on, and by `close`."""
        self.writer = DisposableEngine(start_engine)
        """Writes into consumers' memory. Thrown away after a write that was given up on."""
        self._segment: Segment | None = None
        self.is_restoring = False
        """Whether a restore into the segment is under way."""
        self._is_stopping = False
        self._shortages: dict[str, str] = {}
        self._settled_at = 0.0

    # -- starting --------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Claim the segment, start an engine, and adopt what a predecessor left, if it is right.

        Raises SegmentBusy, EngineError, CheckpointError, SharedMemoryFull: none of them leaves a segment behind.
        """
        self._segment = Segment.claim(self.name)
        if found := self._segment.found:
            _log.error("%s: %s was damaged in memory; what could be made again was", self.name, found)
        try:
            self.engine = self._start_engine()
            if self._segment.is_allocated:
                self._adopt(self._segment)
            elif (pinned := self.checkpoint.pinned(self._segment)) is not None:
                self._take(pinned)
        except BaseException:
            self.close()
            raise

    def _adopt(self, segment: Segment) -> None:
        try:
            pinned = self.checkpoint.pinned(segment)
        except CheckpointError as error:
            _log.warning("adopting the sealed segment without its checkpoint: %s", error)
            pinned = None
        content = segment.header.content_digest
        if pinned is not None and (pinned.digest, pinned.checkpoint.manifest) != (content, segment.manifest):
            _log.warning("the sealed segment is of other weights than %s: filling anew", self.checkpoint.directory)
            if not self._replace_content(pinned):
                self._use(segment.manifest, content, segment.header.origin)
        elif pinned is not None:
            self._take(pinned)
        else:
            self._use(segment.manifest, content, segment.header.origin)

    def _take(self, pinned: PinnedCheckpoint) -> None:
        """Have the content of our checkpoint from now on."""
        self._use(pinned.checkpoint.manifest, pinned.digest, pinned.origin, pinned)

    def _use(
        self,
        manifest: Manifest,
        content: bytes,
        origin: bytes = UNKNOWN_ORIGIN,
        disk: PinnedCheckpoint | None = None,
        predecessor: Holding | None = None,
    ) -> None:
        """Take this for what the model is: place its blocks, make room for ours, open it to the engine.

        `content` is the digest of the bytes that they have, or are to have; it is on record before the first of them.
        """
        settings, segment = self.settings, self.segment
        if manifest.model != self.name.model:
            raise ManifestError(f"the manifest is of {manifest.model!r}, this node serves {self.name.model!r}")
        placement = self._place(manifest)
        rows = placement.rows_of(settings.node_id).tolist()
        if segment.is_allocated:
            segment.drop_unfilled(set(range(len(manifest))) - set(rows))
            self._extend(segment, rows)
        else:
            segment.allocate(manifest, rows)
        segment.record_content(content)
        segment.record_origin(origin)
        proofs, registered = Proofs(len(manifest)), self._register(segment)
        self.holding = Holding(
            settings.node_id, segment, manifest, placement, content, disk, proofs, registered, predecessor
        )
        self.cluster.use_manifest(manifest, placement.digest, content.hex())

    def _place(self, manifest: Manifest) -> Placement:
        return Placement.compute(manifest, self.settings.node_ids, self.settings.replica_count)

    def _extend(self, segment: Segment, rows: Sequence[int]) -> None:
        """Make room for these rows where there is any; else what is there goes on being served."""
        with self._short_of_room(SHARE):
            segment.extend(rows)

    @contextmanager
    def _short_of_room(self, for_what: str) -> Iterator[None]:
        """Tell of a shortage in here, and go on: it is no reason to give up what is good."""
        try:
            yield
        except SharedMemoryFull as error:
            said = f"there is no room for {for_what}: {error}"
            if for_what not in self._shortages:  # it is tried again and again
                _log.error("%s. What is here goes on being served", said)
            self._shortages[for_what] = said
        else:
            self._shortages.pop(for_what, None)

    @property
    def shortage(self) -> str | None:
        """What of this node has no room in memory, and why; None if nothing."""
        return "; ".join(self._shortages.values()) or None

    @property
    def is_displaced(self) -> bool:
        """Whether something waits for room, or for the segment's name: a restore looks whether it is there now."""
        holding = self.holding
        return bool(self._shortages) or (
            holding is not None and (not holding.segment.is_named() or self._is_left(holding))
        )

    def _is_left(self, holding: Holding) -> bool:
        """Whether nothing needs the predecessor any more."""
        settled = holding.segment.state is SegmentState.SEALED and not len(holding.left_behind())
        return holding.predecessor is not None and settled and time.monotonic() > self._settled_at + LEFT_S

    def _register(self, segment: Segment) -> tuple[tuple[int, int], ...]:
        """Open what others may read to the engine, as far as it is not yet; what is open then.

        That is a view of the segment's memory through which nobody can write: what a peer asks to be written there is
        refused, whatever it calls us (tried over TCP). Over RDMA the card's driver refuses such a view.
        """
        before = self.holding.registered if self.holding else ()
        is_rdma = self.settings.transport == RDMA
        ranges = segment.data_ranges() if is_rdma else segment.served_ranges()
        new = [each for each in ranges if each not in before]
        if self.engine is not None:
            self.engine.register(new)
        if is_rdma:  # what is read into, or written from, must be registered there, too
            self._reader.register(new)
            self.writer.register(new)
        return tuple(ranges)

    def _replace_content(self, pinned: PinnedCheckpoint) -> bool:
        """Take the checkpoint's content in place of what is sealed here, if there is room for both; whether there was.

        What is sealed is good, and engines may have it attached, so that its memory would not become free anyway.
        """
        with self._short_of_room(CHECKPOINT):
            self.start_over(pinned)
        return CHECKPOINT not in self._shortages

    def start_over(self, pinned: PinnedCheckpoint) -> None:
        """Give the segment's content up, and make room for that of a checkpoint in a new one.

        Raises SharedMemoryFull. What was sealed stays then, and what was never complete is gone.
        """
        manifest = pinned.checkpoint.manifest
        if (segment := self.segment).state is SegmentState.SEALED:
            self._change_to(segment.succeed(manifest, self._place(manifest).rows_of(self.settings.node_id).tolist()))
        else:
            self._change_to(segment.renew())
        self._take(pinned)

    def _change_to(self, successor: Segment) -> None:
        """Hold nothing, and own another segment."""
        before, self.holding = self.holding, None
        self._segment = successor
        if before is not None:
            self._withdraw(before)

    def _find_name(self, before: Holding) -> None:
        """Have a segment in /dev/shm again where the name of ours is gone: what it has is still mapped here.

        Raises SegmentBusy where another daemon has taken the name.
        """
        _log.error("the name %s is gone from /dev/shm: filling another segment out of memory", self.name.object_name)
        with self._short_of_room(NAME):
            successor = Segment.claim(self.name)
            try:
                if successor.is_allocated:
                    successor = successor.renew()
                successor.allocate(before.manifest, {*before.placed().tolist(), *before.published().tolist()})
            except BaseException:
                successor.unlink()
                raise
            self._segment = successor
            self._use(before.manifest, before.content, before.segment.header.origin, before.disk, before)
            before.segment.give_up()

    def _withdraw(self, holding: Holding) -> None:
        """Close to others what `_register` opened."""
        if holding.predecessor is not None:
            self._withdraw(holding.predecessor)
        if self.engine is not None:
            self.engine.unregister(holding.registered)
        if self.settings.transport == RDMA:
            self._reader.unregister(holding.registered)
            self.writer.unregister(holding.registered)

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
        if self.holding is None and (found := self._prober.fetch_version()) is not None:
            manifest, version = found
            self._use(manifest, bytes.fromhex(version.content_digest))
            self._prober.look()
        self._look_at_memory(self._held())
        self._look_at_disk(self._held())
        self._reader.fence()  # what an earlier restore could not end must not write into this one's blocks
        holding = self._held()
        rows = holding.rows_of(experts).tolist()
        pinned = holding.disk if SourceKind.DISK in kinds else None
        tiers, offered = offer(
            holding,
            rows,
            self.cluster,
            HostMemory(IN_PLACE, holding.segment, lanes=1),
            self._reach if SourceKind.PEER in kinds else None,
            None if pinned is None else Disk(DISK, lambda: pinned),
            None if holding.predecessor is None else HostMemory(NAMELESS, holding.predecessor, lanes=1),
        )
        without_room = dict.fromkeys(holding.without_room().tolist(), self.shortage or "it has no room")
        nbytes, keys = holding.manifest.nbytes, holding.manifest.keys
        return Restore(
            [Want(row, int(nbytes[row]), offered.expected.get(row)) for row in rows],
            {**offered.by_row, **dict.fromkeys(without_room, ())},
            tiers,
            SegmentDestination(holding),
            keys.__getitem__,
            progress,
            partial(self._settle, holding),
            {**offered.reasons, **without_room},
            self._reader.fence,
            SecondLook(holding, self.cluster, self.look, self._reach, without_room)
            if SourceKind.PEER in kinds
            else None,
        )

    def _reach(self, node_id: str, held: PeerBlocks) -> PeerMemory:
        return PeerMemory(node_id, reading(self._reader, held.session_id))

    def _look_at_memory(self, holding: Holding) -> None:
        """See that what is restored into is all there: nobody looks at its pages before that."""
        if not holding.segment.is_named():
            self._find_name(holding)
            holding = self._held()
        if holding.predecessor is not None and self._is_left(holding):
            self._withdraw(holding.predecessor)
            self.holding = holding = replace(holding, predecessor=None)
        self.mend(holding)
        if len(holding.without_room()):
            self._extend(holding.segment, holding.placed().tolist())
            self.holding = replace(holding, registered=self._register(holding.segment))

    def mend(self, holding: Holding) -> Damage:
        """Write anew what leads to the blocks, and restore the object's length. For any thread."""
        with self._short_of_room(CUT_OFF):
            damage = holding.segment.mend()
            if damage:
                _log.error("%s was damaged in memory, and is written anew", damage)
            return damage
        return Damage()

    def problem(self) -> str | None:
        """Why readers do not find what this node is to have, as far as it is for want of room, or of the object."""
        holding = self.holding
        found = None if holding is None else holding.segment.reader_problem()
        return "; ".join(filter(None, (found, self.shortage))) or None

    def _look_at_disk(self, holding: Holding) -> None:
        """Take the checkpoint for a source as long as it has the content that we hold.

        Where it has other content, and ours never was complete, the checkpoint's takes its place: nobody was given any.
        """
        try:
            pinned = self.checkpoint.pinned(holding.segment)
        except CheckpointError as error:  # as a source it says so itself, block by block
            _log.warning("the disk cannot serve: %s", error)
            return
        if pinned is None or pinned is holding.disk:
            return
        if (pinned.digest, pinned.checkpoint.manifest) == (holding.content, holding.manifest):
            self.holding = replace(holding, disk=pinned)
        elif CHECKPOINT in self._shortages:
            self._replace_content(pinned)
        elif holding.segment.state is SegmentState.SEALED:
            _log.error(
                "%s has other weights now than this node keeps: nothing is read of it; restart the node to take them",
                pinned.checkpoint.directory,
            )
            self.holding = replace(holding, disk=None)
        else:
            _log.warning("%s has other weights now: starting over with them", pinned.checkpoint.directory)
            self.start_over(pinned)

    def run(self, restore: Restore) -> None:
        """Run a planned restore to its end. What is complete then is sealed before the restore says it is over."""
        self.is_restoring = True
        try:
            restore.run()
        finally:
            self.is_restoring = False
        if self.holding is not None:
            self._tell_who_was_wrong(self.holding, restore)

    def _tell_who_was_wrong(self, holding: Holding, restore: Restore) -> None:
        keys = holding.manifest.keys
        for source, rows in restore.wrong.items():
            if isinstance(source, PeerMemory):
                self._prober.doubt(source.name, holding.content_digest, [keys[row] for row in rows])

    def _settle(self, holding: Holding) -> None:
        segment = holding.segment
        if holding is not self.holding or len(holding.missing()):
            return
        if not len(segment.rows(BlockState.RESERVED, BlockState.QUARANTINED)):
            segment.seal()
            self._settled_at = time.monotonic()

    # -- stopping --------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Let everything go. A sealed segment stays for the next daemon; an unsealed one is removed."""
        self._is_stopping = True
        holding, self.holding = self.holding, None
        segment, self._segment = self._segment, None
        if segment is None:
            return
        try:
            self._reader.fence()
            self.writer.fence()
            if holding is not None:
                self._withdraw(holding)
        except Exception:  # what it will not give back must not keep the segment owned
            _log.exception("the engine did not let go of the segment's memory: closing the segment all the same")
        if segment.state is SegmentState.SEALED:
            segment.close()
        else:
            segment.unlink()

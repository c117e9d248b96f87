"""Restores into a consumer: this node plans, and the nodes that hold the blocks write them.

Nearest first: this node's own memory, then the least loaded of the peers that hold a block, then the checkpoint. Peers
are asked over HTTP, one bounded batch at a time, and write to the consumer's memory themselves.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from app.cluster.peers import PeerClient, parsed
from app.documents import PushDocument, PushedExpert, PushRequest, PushTableDocument
from app.errors import Conflict, LimitReached, PeerFailed, Unavailable
from app.node.holding import UNKNOWN_CHECKSUM
from app.node.node import Node
from app.restores.consumers import Consumer
from shm.block import ExpertKey
from shm.errors import InvalidInput
from shm.manifest import Manifest
from shm.segment import Segment
from transfer.client.http import NodeRefused
from transfer.engine import TransferEngine, session_host
from transfer.errors import NothingToRestore
from transfer.plan import Batch, Limits, Offer
from transfer.progress import Progress
from transfer.push.sources import (
    PUSH_BLOCKS_MAX,
    PUSH_LANES,
    PUSH_NBYTES,
    DiskPush,
    MemoryPush,
    PushDestination,
    PushJob,
    want_of,
)
from transfer.push.table import FormCopy, PushTable, SlotBases
from transfer.push.writer import WriteFailed, Writer, push
from transfer.restore import Restore
from transfer.sources import DiskSource, Source, SourceKind

PUSHES_MAX = 16  # that this node does for others at a time
PUSH_TIMEOUT_S = 30.0  # for a peer's answer to one push; it gives its own writes up after 10 or 20
BUSY_WAIT_S = 0.25
BUSY_RETRIES_MAX = 40
DISK = "disk"

Hold = Callable[[], AbstractContextManager[None]]
Mend = Callable[[Sequence[ExpertKey]], None]


def build_table(node: Node, document: PushTableDocument) -> PushTable:
    """Check a table that came over the network against this node's manifest.

    Raises InvalidInput, BlockUnavailable, Conflict for a table of another checkpoint, Unavailable without a manifest.
    """
    manifest = _manifest(node)
    if document.manifest_digest != manifest.digest:
        raise Conflict(
            f"the table is of manifest {document.manifest_digest[:12]}…, this node has {manifest.digest[:12]}…: "
            "make it from GET /v1/manifest"
        )
    peers, here = node.cluster.holdings().items(), _engine(node).session_id
    nodes = {peer.session_id: node_id for node_id, peer in peers} | {here: node.settings.node_id}
    if document.session_id in nodes:
        raise InvalidInput(f"session {document.session_id} is node {nodes[document.session_id]}'s own, not an engine's")
    if is_loopback(document.session_id) and not is_loopback(here):
        raise InvalidInput(
            f"session {document.session_id} is on loopback, where other hosts would find themselves: start the engine "
            f"on the address of this host that they know, as this node did on {session_host(here)}"
        )
    forms = [[FormCopy(**copy.model_dump()) for copy in form] for form in document.forms]
    slots = (SlotBases(slot.layer, slot.expert, slot.form, tuple(slot.bases)) for slot in document.slots)
    return PushTable.build(manifest, document.session_id, document.ranges, forms, slots)


def is_loopback(session_id: str) -> bool:
    """Whether a session is one that no other host can reach."""
    try:
        return ip_address(session_host(session_id)).is_loopback
    except ValueError:
        return session_host(session_id) == "localhost"


def _manifest(node: Node) -> Manifest:
    if node.manifest is None:
        raise Unavailable("this node has no manifest yet", retry_after_s=1)
    return node.manifest


def _engine(node: Node) -> TransferEngine:
    if node.engine is None:
        raise Unavailable("this node has no transfer engine yet", retry_after_s=1)
    return node.engine


# -- the side that holds blocks --------------------------------------------------------------------------------


class PushDesk:
    """Pushes that other nodes ask of this one. Thread-safe."""

    def __init__(self, node: Node, mend: Mend) -> None:
        self._node = node
        self._mend = mend
        self._places = threading.BoundedSemaphore(PUSHES_MAX)

    def serve(self, request: PushRequest) -> PushDocument:
        """Write the blocks that are published here and whole. Raises what `build_table` does, and LimitReached."""
        table = build_table(self._node, request)
        manifest = _manifest(self._node)
        wanted = {manifest.index(b.layer, b.expert): bytes.fromhex(b.checksum) for b in request.blocks}
        if strangers := [row for row in wanted if row not in table]:
            raise InvalidInput(f"{manifest.keys[strangers[0]]} is asked for, and has no slot in the table")
        if len(wanted) > 1 and (nbytes := int(manifest.nbytes[list(wanted)].sum())) > PUSH_NBYTES:
            raise InvalidInput(f"{nbytes:,} bytes in one push: ask for {PUSH_NBYTES:,} at a time, or for one block")
        if not self._places.acquire(blocking=False):
            raise LimitReached(f"{PUSHES_MAX} pushes are under way: ask again", retry_after_s=1)
        try:
            return self._push(
                self._node.segment, Writer(_engine(self._node), table, read_back=request.read_back), wanted
            )
        finally:
            self._places.release()

    def _push(self, segment: Segment, writer: Writer, wanted: Mapping[int, bytes]) -> PushDocument:
        keys = segment.manifest.keys
        try:
            outcome = push(segment, writer, wanted)
        except WriteFailed as error:
            return PushDocument(pushed=[], failed=[], consumer_error=str(error))
        if outcome.is_corrupt:
            self._mend([keys[row] for row in sorted(outcome.is_corrupt)])
        return PushDocument(
            pushed=[_pushed(keys[row], taken.hex()) for row, taken in outcome.pushed.items()],
            failed=[_pushed(keys[row], reason) for row, reason in outcome.failed.items()],
            consumer_error=None,
        )


def _pushed(key: ExpertKey, said: str) -> PushedExpert:
    return PushedExpert(layer=key.layer, expert=key.expert, said=said)


# -- the side that plans ---------------------------------------------------------------------------------------


class PeerPush:
    """A peer that writes its blocks to the consumer itself."""

    kind = SourceKind.PEER
    limits = Limits(PUSH_BLOCKS_MAX, PUSH_NBYTES)
    lanes = PUSH_LANES
    writes = True

    def __init__(
        self, name: str, url: str, client: PeerClient, manifest: Manifest, job: PushJob, *, read_back: bool
    ) -> None:
        self.name = name
        self._url = f"{url}/v1/pushes"
        self._client = client
        self._manifest = manifest
        self._job = job
        self._read_back = read_back

    def fetch(self, batch: Batch) -> Mapping[int, bytes]:
        body = self._job.writer.table.part([want.row for want in batch.wants]) | {
            "manifest_digest": self._manifest.digest,
            "blocks": [
                {**self._manifest.keys[want.row]._asdict(), "checksum": (want.checksum or b"").hex()}
                for want in batch.wants
            ],
            "read_back": self._read_back,
        }
        with self._job.writing():
            answer = self._ask(body)
            if answer.consumer_error is not None:
                raise WriteFailed(answer.consumer_error)
        pushed = {self._manifest.index(p.layer, p.expert): bytes.fromhex(p.said) for p in answer.pushed}
        return self._job.settle(pushed, {self._manifest.index(f.layer, f.expert): f.said for f in answer.failed})

    def _ask(self, body: dict[str, Any]) -> PushDocument:
        for _ in range(BUSY_RETRIES_MAX):
            try:
                answer = self._client.request("POST", self._url, json=body, timeout=PUSH_TIMEOUT_S)
            except NodeRefused as error:
                if error.status != 429:
                    raise
                time.sleep(BUSY_WAIT_S)
                continue
            return parsed(PushDocument, answer)
        raise PeerFailed(f"{self._url} was too busy for {BUSY_WAIT_S * BUSY_RETRIES_MAX:.0f} s")

    def close(self) -> None:
        """Nothing is open: the client is not ours."""


@dataclass(slots=True)
class ConsumerPush:
    """A consumer as the target of a restore: what `Node` is for a segment."""

    node: Node
    client: PeerClient
    consumer: Consumer
    hold: Hold
    mend: Mend
    read_back: bool
    _job: PushJob | None = None

    def rows_of(self, experts: Iterable[ExpertKey] | None) -> list[int]:
        """Manifest rows of those experts that the consumer has slots for; of all with None.

        Raises BlockUnavailable for an expert that the model lacks, NothingToRestore if none has a slot, Conflict if
        the node's manifest has changed since the consumer was registered.
        """
        manifest, table = _manifest(self.node), self.consumer.table
        if manifest.digest != self.consumer.manifest_digest:
            raise Conflict(f"consumer {self.consumer.id!r} was registered for another checkpoint: register it again")
        if experts is None:
            return list(table.rows)
        rows = sorted({row for key in experts if (row := manifest.index(*key)) in table})
        if not rows:
            raise NothingToRestore(f"consumer {self.consumer.id!r} has no slot for any of the experts named")
        return rows

    def plan_restore(
        self, experts: Iterable[ExpertKey] | None, kinds: Collection[SourceKind], progress: Progress
    ) -> Restore:
        """A restore of these experts into the consumer's slots, ready to run. Asks the peers what they have now."""
        rows = self.rows_of(experts)
        manifest, engine = _manifest(self.node), _engine(self.node)
        if SourceKind.PEER in kinds:
            self.node.look()
        writer = Writer(engine, self.consumer.table, read_back=self.read_back)
        job = self._job = PushJob(writer, hold=self.hold, report_corrupt=self.mend)
        offers: dict[int, list[Offer]] = {row: [] for row in rows}
        expected: dict[int, bytes] = {}
        tiers: list[list[Source]] = [self._offer_own(offers, expected, job)]
        if SourceKind.PEER in kinds:
            tiers.append(self._offer_peers(offers, expected, job))
        if SourceKind.DISK in kinds:
            tiers.append(self._offer_disk(offers, job))
        wants = [want_of(row, int(manifest.nbytes[row]), expected.get(row)) for row in rows]
        return Restore(wants, offers, tiers, PushDestination(job), manifest.keys.__getitem__, progress)

    def run(self, restore: Restore) -> None:
        """Run a planned restore to its end, and note on the consumer whether it answered."""
        restore.run()
        if self._job is not None and (self._job.health.answered or self._job.health.error):
            self.consumer.error = self._job.health.error

    def _offer_own(self, offers: dict[int, list[Offer]], expected: dict[int, bytes], job: PushJob) -> list[Source]:
        segment = self.node.segment
        if not segment.is_allocated:
            return []
        name = self.node.settings.node_id
        for row in set(segment.published().tolist()) & set(offers):
            expected[row] = segment.checksum(row)
            offers[row].append(Offer(name, segment.address(row)))
        for row in offers:
            if row not in expected and (recorded := segment.checksum(row)) != UNKNOWN_CHECKSUM:
                expected[row] = recorded
        return [MemoryPush(name, segment, job)]

    def _offer_peers(self, offers: dict[int, list[Offer]], expected: dict[int, bytes], job: PushJob) -> list[Source]:
        holdings = self.node.cluster.holdings()
        for row, offered in offers.items():
            held = [(node, block) for node, peer in holdings.items() if (block := peer.blocks.get(row)) is not None]
            if row not in expected and len(said := {checksum for _, (_, checksum) in held}) == 1:
                expected[row] = said.pop()
            offered.extend(Offer(node, address) for node, (address, checksum) in held if checksum == expected.get(row))
        return [
            PeerPush(
                node, self.node.cluster.url(node), self.client, _manifest(self.node), job, read_back=self.read_back
            )
            for node in holdings
        ]

    def _offer_disk(self, offers: dict[int, list[Offer]], job: PushJob) -> list[Source]:
        holding = self.node.holding
        if holding is None or holding.disk is None or holding.manifest.digest != self.consumer.manifest_digest:
            return []
        source = DiskPush(DISK, DiskSource(holding.disk.checkpoint), _engine(self.node), job)
        for row, offered in offers.items():
            offered.append(Offer(DISK, source.position(row)))
        return [source]

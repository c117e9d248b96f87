"""Restores into a consumer: this node plans, and the nodes that hold the blocks write them.

Nearest first: this node's own memory, then the least loaded of the peers that hold a block, then the checkpoint. Peers
are asked over HTTP, one bounded batch at a time, and write to the consumer's memory themselves.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from ipaddress import ip_address
from typing import Any

from app.cluster.peers import PeerBlocks, PeerClient, parsed
from app.documents import LeaseDocument, PushDocument, PushedExpert, PushLease, PushRequest, PushTableDocument
from app.errors import Conflict, LimitReached, PeerFailed, Unavailable
from app.node.holding import Holding
from app.node.node import Node
from app.node.offering import DISK, SecondLook, offer
from app.restores.consumers import Consumer, ConsumerStore
from app.restores.lease import HeldLease
from shm.block import ExpertKey
from shm.errors import InvalidInput
from shm.manifest import Manifest
from transfer.checkpoint.content import PinnedCheckpoint
from transfer.client.http import NodeRefused, NodeUnreachable, quoted
from transfer.destination import Destination
from transfer.engine import TransferEngine, Watch, session_host
from transfer.errors import NothingToRestore
from transfer.plan import Batch, Want
from transfer.progress import Progress
from transfer.push.destination import PUSH_LANES, PUSH_LIMITS, PUSH_PIECE_NBYTES, ConsumerDestination
from transfer.push.table import PushTable
from transfer.push.writer import WriteFailed, Writer
from transfer.restore import Restore
from transfer.sources import RECALLED, Disk, HostMemory, PeerMemory, SourceKind

PUSHES_MAX = 16  # that this node does for others at a time
PUSH_TIMEOUT_S = 30.0  # for a peer's answer to one push; it gives its own writes up after 10 or 20
BUSY_WAIT_S = 0.25
BUSY_RETRIES_MAX = 40

Hold = Callable[[], AbstractContextManager[None]]
Mend = Callable[[Sequence[ExpertKey]], None]


def build_table(node: Node, holding: Holding, document: PushTableDocument) -> PushTable:
    """Check a table that came over the network against what this node holds.

    Raises InvalidInput, BlockUnavailable, Conflict for a table of another checkpoint or of other weights.
    """
    manifest, content = holding.manifest, holding.content_digest
    if document.manifest_digest != manifest.digest:
        raise Conflict(
            f"the table is of manifest {document.manifest_digest[:12]}…, this node has {manifest.digest[:12]}…: "
            "make it from GET /v1/manifest"
        )
    if document.content_digest not in (None, content):
        raise Conflict(
            f"the slots hold content {document.content_digest[:12]}…, this node has {content[:12]}… of the same shape: "
            "register with a node of those weights, or again once the engine has these"
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
    return PushTable.build(manifest, document.session_id, document.ranges, document.forms, document.slots)


def is_loopback(session_id: str) -> bool:
    """Whether a session is one that no other host can reach."""
    try:
        return ip_address(session_host(session_id)).is_loopback
    except ValueError:
        return session_host(session_id) == "localhost"


def held(node: Node) -> Holding:
    """What the node has now. Raises Unavailable while that is nothing."""
    if node.holding is None:
        raise Unavailable("this node has no manifest yet", retry_after_s=1)
    return node.holding


def _engine(node: Node) -> TransferEngine:
    if node.engine is None:
        raise Unavailable("this node has no transfer engine yet", retry_after_s=1)
    return node.engine


# -- the side that holds blocks --------------------------------------------------------------------------------


class PushDesk:
    """Pushes that other nodes ask of this one. Thread-safe."""

    def __init__(self, node: Node, client: PeerClient, consumers: ConsumerStore, mend: Mend) -> None:
        self._node = node
        self._client = client
        self._consumers = consumers
        self._mend = mend
        self._places = threading.BoundedSemaphore(PUSHES_MAX)

    def serve(self, request: PushRequest) -> PushDocument:
        """Write the blocks that are published here and whole. Raises what `build_table` does, LimitReached, and
        Unavailable where there are none yet.
        """
        holding = held(self._node)
        table = build_table(self._node, holding, request)
        manifest = holding.manifest
        wanted = {manifest.index(b.layer, b.expert): bytes.fromhex(b.checksum) for b in request.blocks}
        if strangers := [row for row in wanted if row not in table]:
            raise InvalidInput(f"{manifest.keys[strangers[0]]} is asked for, and has no slot in the table")
        wants = tuple(Want(row, int(manifest.nbytes[row]), checksum) for row, checksum in wanted.items())
        nbytes, most = sum(want.nbytes for want in wants), PUSH_LIMITS.nbytes
        if len(wants) > 1 and nbytes > most:
            raise InvalidInput(f"{nbytes:,} bytes in one push: ask for {most:,} at a time, or for one block")
        if not self._places.acquire(blocking=False):
            raise LimitReached(f"{PUSHES_MAX} pushes are under way: ask again", retry_after_s=1)
        try:
            lease = HeldLease(partial(self._ask_lease, request.lease))
            writer = Writer(self._node.writer, table, read_back=request.read_back, allowed_s=lease.allowed_s)
            answer = self._push(holding, writer, wants)
            self._node.writer.fence()  # before the answer, which ends the lease: nothing of ours is under way then
            return answer
        finally:
            self._places.release()

    def _ask_lease(self, lease: PushLease) -> float:
        """Seconds for which the consumer's node lets us write. Raises InvalidInput, Conflict, or PeerFailed."""
        if lease.node_id == self._node.settings.node_id:
            return self._consumers.lease(lease.consumer_id, lease.epoch, lease.push_id)
        url = f"{self._node.cluster.url(lease.node_id)}/v1/consumers/{quoted(lease.consumer_id)}/lease"
        body = {"epoch": lease.epoch, "push_id": lease.push_id}
        try:
            return parsed(LeaseDocument, self._client.request("POST", url, json=body)).ttl_s
        except NodeRefused as error:
            raise Conflict(f"the consumer's node gives no leave to write: {error}") from error
        except NodeUnreachable as error:
            raise PeerFailed(f"the consumer's node cannot be asked for leave to write: {error}") from error

    def _push(self, holding: Holding, writer: Writer, wants: tuple[Want, ...]) -> PushDocument:
        source, keys = _own_memory(holding), holding.manifest.keys
        mend = partial(_mend_rows, self._mend, holding.manifest)
        engine = self._node.writer
        destination = ConsumerDestination(writer, engine, report_corrupt=mend)
        try:
            pushed = source.fetch(Batch(source, wants, (), sum(want.nbytes for want in wants)), destination)
        except WriteFailed as error:
            return PushDocument(pushed=[], failed=[], consumer_error=str(error))
        return PushDocument(
            pushed=[_pushed(keys[row], taken.hex()) for row, taken in pushed.items()],
            failed=[_pushed(keys[w.row], destination.reason(w.row)) for w in wants if w.row not in pushed],
            consumer_error=None,
        )


def _own_memory(holding: Holding) -> HostMemory:
    """A node's segment as its transfer engine has it registered, kept mapped for as long as this source lives."""
    kept_by = holding.segment.mappings()
    return HostMemory(
        holding.node_id,
        holding,
        lanes=PUSH_LANES,
        limits=PUSH_LIMITS,
        kept_by=kept_by,
        piece_nbytes=PUSH_PIECE_NBYTES,
    )


def _mend_rows(mend: Mend, manifest: Manifest, rows: Sequence[int]) -> None:
    mend([manifest.keys[row] for row in sorted(rows)])


def _pushed(key: ExpertKey, said: str) -> PushedExpert:
    return PushedExpert(layer=key.layer, expert=key.expert, said=said)


# -- the side that plans ---------------------------------------------------------------------------------------


class Asking:
    """A way to have a peer's blocks at a consumer: the peer is asked, and writes them there itself."""

    def __init__(self, url: str, push: ConsumerPush, holding: Holding) -> None:
        self._url = f"{url}/v1/pushes"
        self._push = push
        self._manifest = holding.manifest
        self._content = holding.content_digest

    def move(self, consumer: ConsumerDestination, batch: Batch, destination: Destination) -> Mapping[int, bytes]:
        body = consumer.writer.table.part([want.row for want in batch.wants]) | {
            "manifest_digest": self._manifest.digest,
            "content_digest": self._content,
            "blocks": [
                {**self._manifest.keys[want.row]._asdict(), "checksum": (want.checksum or b"").hex()}
                for want in batch.wants
            ],
            "read_back": self._push.read_back,
            "lease": {
                "node_id": self._push.node.settings.node_id,
                "consumer_id": self._push.consumer.id,
                "epoch": self._push.consumer.epoch,
                "push_id": (push_id := uuid.uuid4().hex),
            },
        }
        with consumer.writing():
            answer = self._ask(body, push_id, batch.watch)
            if answer.consumer_error is not None:
                raise WriteFailed(answer.consumer_error)
        pushed = {self._manifest.index(p.layer, p.expert): bytes.fromhex(p.said) for p in answer.pushed}
        return consumer.note(pushed, {self._manifest.index(f.layer, f.expert): f.said for f in answer.failed})

    def _ask(self, body: dict[str, Any], push_id: str, watch: Watch) -> PushDocument:
        """The lease ends with the peer's answer. Where none comes it runs out: the peer may still be writing.

        One that gave no answer gets no more time. One that is recalled is waited for all the same: only its answer says
        that nothing of it is under way (tried: over a slow link, on a busy host, it was not over with its lease).
        """
        for _ in range(BUSY_RETRIES_MAX):
            if watch.is_recalled:
                raise PeerFailed(f"{self._url}: the push {RECALLED}")
            try:
                answer = self._push.client.request("POST", self._url, json=body, timeout=PUSH_TIMEOUT_S)
            except NodeUnreachable:
                self._push.withdraw_lease(push_id)
                raise
            except NodeRefused as error:
                if error.status < HTTPStatus.INTERNAL_SERVER_ERROR:  # it did not begin
                    self._push.end_lease(push_id)
                if error.status != HTTPStatus.TOO_MANY_REQUESTS:
                    raise
                time.sleep(BUSY_WAIT_S)
                continue
            self._push.end_lease(push_id)
            return parsed(PushDocument, answer)
        raise PeerFailed(f"{self._url} was too busy for {BUSY_WAIT_S * BUSY_RETRIES_MAX:.0f} s")


@dataclass(slots=True)
class ConsumerPush:
    """A consumer as the target of a restore: what `Node` is for a segment."""

    node: Node
    client: PeerClient
    consumer: Consumer
    hold: Hold
    end_lease: Callable[[str], None]
    withdraw_lease: Callable[[str], None]
    mend: Mend
    read_back: bool
    _destination: ConsumerDestination | None = None

    def rows_of(self, experts: Iterable[ExpertKey] | None) -> list[int]:
        """Manifest rows of those experts that the consumer has slots for; of all with None.

        Raises BlockUnavailable for an expert that the model lacks, NothingToRestore if none has a slot, Conflict if
        the node has other weights than the consumer was registered for.
        """
        return self._rows_of(self._held(), experts)

    def _held(self) -> Holding:
        holding, consumer = held(self.node), self.consumer
        if (holding.manifest.digest, holding.content_digest) != (consumer.manifest_digest, consumer.content_digest):
            raise Conflict(
                f"consumer {consumer.id!r} was registered for other weights than this node has now: register it again "
                "once the engine has these"
            )
        return holding

    def _rows_of(self, holding: Holding, experts: Iterable[ExpertKey] | None) -> list[int]:
        manifest, table = holding.manifest, self.consumer.table
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
        holding, engine = self._held(), self.node.writer
        rows, manifest = self._rows_of(holding, experts), holding.manifest
        if SourceKind.PEER in kinds:
            self.node.look()
        destination = self._destination = ConsumerDestination(
            Writer(engine, self.consumer.table, read_back=self.read_back),
            engine,
            hold=self.hold,
            report_corrupt=partial(_mend_rows, self.mend, manifest),
        )
        pinned = holding.disk if SourceKind.DISK in kinds else None
        reach = partial(self._reach, destination, holding) if SourceKind.PEER in kinds else None
        tiers, offered = offer(
            holding,
            rows,
            self.node.cluster,
            _own_memory(holding),
            reach,
            None if pinned is None else _disk(pinned),
        )
        return Restore(
            [Want(row, int(manifest.nbytes[row]), offered.expected.get(row)) for row in rows],
            offered.by_row,
            tiers,
            destination,
            manifest.keys.__getitem__,
            progress,
            settle=self.node.writer.fence,
            reasons=offered.reasons,
            look_again=None if reach is None else SecondLook(holding, self.node.cluster, self.node.look, reach),
        )

    def _reach(self, destination: ConsumerDestination, holding: Holding, node_id: str, _: PeerBlocks) -> PeerMemory:
        asking = Asking(self.node.cluster.url(node_id), self, holding)
        return PeerMemory(node_id, partial(asking.move, destination), lanes=PUSH_LANES, limits=PUSH_LIMITS)

    def run(self, restore: Restore) -> None:
        """Run a planned restore to its end, and note on the consumer whether it answered.

        It is not over, and the registration is not taken back, before writes that were given up on have ended, too.
        """
        with self.hold():
            try:
                restore.run()
            finally:
                self.node.writer.fence()
        health = self._destination.health if self._destination is not None else None
        if health is not None and (health.answered or health.error):
            self.consumer.error = health.error


def _disk(pinned: PinnedCheckpoint) -> Disk:
    return Disk(DISK, lambda: pinned, lanes=PUSH_LANES, limits=PUSH_LIMITS)

"""The restores of this node, and those it has asked other nodes to do: one store, one worker, bounded queues.

A restore of another node is that node's: it is sent there, and asked for there whenever somebody asks here. Restores
into this node's segment run one after the other, in a thread of their own, and so do those into consumers.
"""

from __future__ import annotations

import logging
import queue
import threading
import uuid
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any

from app.consumers import ConsumerStore
from app.models import FailedExpert, RestoreDocument, RestoreRequest, RestoreTarget
from app.node import Node
from app.peers import PeerClient, PeerRefused, PeerUnreachable
from app.problems import Conflict, NotFound, PeerFailed, TooManyRequests, Unavailable
from app.pushes import ConsumerPush
from shm.errors import HotspareError
from shm.manifest import ExpertKey
from transfer.progress import Progress, RestoreState
from transfer.restore import Restore
from transfer.sources import SourceKind

QUEUED_MAX = 64
KEPT_MAX = 1000  # restores remembered; the oldest finished ones go first
FAILED_LISTED_MAX = 1000
RETRY_AFTER_S = 5
ALL_KINDS = frozenset({SourceKind.PEER, SourceKind.DISK})

_log = logging.getLogger("hotspare.restores")


@dataclass(slots=True)
class LocalRestore:
    """A restore that this node does: into its own segment, or with `push`, into a consumer's memory."""

    id: str
    node_id: str
    experts: tuple[ExpertKey, ...] | None
    kinds: Collection[SourceKind]
    push: ConsumerPush | None = None
    progress: Progress = field(default_factory=Progress)
    finished: threading.Event = field(default_factory=threading.Event)
    _running: Restore | None = None

    def run(self, node: Node) -> None:
        """Plan and run. What goes wrong is told in the record, never raised."""
        try:
            if not self.progress.state.is_final:
                target = self.push or node
                self._running = target.plan_restore(self.experts, self.kinds, self.progress)
                target.run(self._running)
        except HotspareError as error:
            self.progress.finish(RestoreState.FAILED, str(error))
        except Exception as error:
            _log.exception("restore %s ended in an unforeseen way", self.id)
            self.progress.finish(RestoreState.FAILED, f"{type(error).__name__}: {error}")
        finally:
            self._running = None
            self.finished.set()

    def cancel(self) -> None:
        if self._running is not None:
            self._running.cancel()
        elif self.progress.state is RestoreState.PENDING:
            self.progress.finish(RestoreState.CANCELLED, "cancelled before it began")

    def document(self) -> RestoreDocument:
        report = self.progress.report()
        target = RestoreTarget(consumer_id=self.push.consumer.id) if self.push else RestoreTarget(node_id=self.node_id)
        return RestoreDocument(
            id=self.id,
            target=target,
            state=report.state,
            blocks_total=report.blocks_total,
            blocks_done=report.blocks_done,
            bytes_total=report.bytes_total,
            bytes_done=report.bytes_done,
            bytes_by_source={SourceKind(kind): nbytes for kind, nbytes in report.bytes_by_source.items()},
            failed=[
                FailedExpert(layer=f.key.layer, expert=f.key.expert, reason=f.reason)
                for f in report.failed[:FAILED_LISTED_MAX]
            ],
            failed_total=len(report.failed),
            error=report.error,
            created_at=_time(report.created_at),
            started_at=None if report.started_at is None else _time(report.started_at),
            finished_at=None if report.finished_at is None else _time(report.finished_at),
        )


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


@dataclass(slots=True)
class RemoteRestore:
    """A restore that another node does. What it last said is kept, for when it does not answer."""

    id: str
    url: str
    client: PeerClient
    last: RestoreDocument

    def _ask(self, method: str, suffix: str = "") -> RestoreDocument:
        answer = self.client.request(method, f"{self.url}/v1/restores/{self.id}{suffix}")
        self.last = RestoreDocument.model_validate_json(answer.content)
        return self.last

    def document(self) -> RestoreDocument:
        if self.last.state.is_final:
            return self.last
        try:
            return self._ask("GET")
        except PeerUnreachable as error:
            return self.last.model_copy(update={"error": f"the node that does it does not answer now: {error}"})
        except PeerRefused as error:
            if error.status != 404:
                raise PeerFailed(str(error)) from error
            # It was restarted, and remembers nothing: the restore ended with it.
            self.last = self.last.model_copy(
                update={"state": RestoreState.FAILED, "error": "its node was restarted before it ended"}
            )
            return self.last

    def cancel(self) -> None:
        try:
            self._ask("POST", "/cancel")
        except (PeerUnreachable, PeerRefused) as error:
            raise PeerFailed(str(error)) from error


AnyRestore = LocalRestore | RemoteRestore


class RestoreStore:
    """Every restore that this node was asked for. Thread-safe."""

    def __init__(self, node: Node, client: PeerClient, consumers: ConsumerStore | None = None) -> None:
        self._node = node
        self._client = client
        self._consumers = consumers or ConsumerStore()
        self._kept: OrderedDict[str, AnyRestore] = OrderedDict()
        self._by_key: dict[str, tuple[RestoreRequest, str]] = {}
        self._queue: queue.Queue[LocalRestore | None] = queue.Queue(QUEUED_MAX)
        self._pushes: queue.Queue[LocalRestore | None] = queue.Queue(QUEUED_MAX)  # an engine waits for no filling node
        self._lock = threading.Lock()
        self._key_lock = threading.Lock()
        self._workers = {
            name: threading.Thread(target=self._work, args=(waiting,), name=f"hotspare-{name}", daemon=True)
            for name, waiting in (("restore", self._queue), ("push", self._pushes))
        }
        self._stopped = False

    def start(self) -> None:
        for worker in self._workers.values():
            worker.start()

    def stop(self) -> None:
        """Cancel what runs and what waits, and end the workers."""
        self._stopped = True
        for restore in self.all():
            if isinstance(restore, LocalRestore):
                restore.cancel()
        for worker, waiting in zip(self._workers.values(), (self._queue, self._pushes), strict=True):
            if worker.is_alive():
                waiting.put(None)
                worker.join()

    def _work(self, waiting: queue.Queue[LocalRestore | None]) -> None:
        while (restore := waiting.get()) is not None:
            restore.run(self._node)

    # -- asking for one --------------------------------------------------------------------------------------

    def submit(self, request: RestoreRequest, key: str | None = None) -> tuple[RestoreDocument, bool]:
        """Start what was asked for, here or on its node; with a key that was seen before, the restore of then.

        The second value says whether it is a new one. Raises NotFound, Conflict, Unavailable, PeerFailed,
        TooManyRequests, and InvalidInput for experts that are placed elsewhere.
        """
        if key is None:
            return self._start(request, key).document(), True
        with self._key_lock:  # two requests with one key at the same time make one restore
            if key in self._by_key:
                earlier, restore_id = self._by_key[key]
                if earlier != request:
                    raise Conflict(f"Idempotency-Key {key!r} was used for another request: take a new one")
                if restore_id in self._kept:
                    return self.get(restore_id).document(), False
            restore = self._start(request, key)
            self._by_key[key] = (request, restore.id)
        return restore.document(), True

    def _start(self, request: RestoreRequest, key: str | None) -> AnyRestore:
        experts = None if request.experts is None else tuple(ExpertKey(e.layer, e.expert) for e in request.experts)
        kinds = ALL_KINDS if request.sources is None else frozenset(map(SourceKind, request.sources))
        if request.target.consumer_id is not None:
            return self._start_push(request.target.consumer_id, experts, kinds, read_back=request.read_back)
        assert request.target.node_id is not None
        if request.target.node_id != self._node.settings.node_id:
            return self._keep(self._send(request, request.target.node_id, key))
        return self.start_local(experts, kinds)

    def start_local(self, experts: tuple[ExpertKey, ...] | None, kinds: Collection[SourceKind]) -> LocalRestore:
        """Queue a restore into this node's segment. Raises what is wrong with it, or TooManyRequests."""
        if experts is not None and self._node.manifest is not None:  # else it will ask its peers for one first
            self._node.rows_of(experts)
        return self._enqueue(self._queue, experts, kinds)

    def _start_push(
        self, consumer_id: str, experts: tuple[ExpertKey, ...] | None, kinds: Collection[SourceKind], *, read_back: bool
    ) -> LocalRestore:
        """Queue a restore into a consumer's memory. Raises what is wrong with it, or TooManyRequests."""
        consumer = self._consumers.get(consumer_id)
        hold = partial(self._consumers.hold, consumer)
        push = ConsumerPush(self._node, self._client, consumer, hold, self.mend, read_back)
        push.rows_of(experts)
        return self._enqueue(self._pushes, experts, kinds, push)

    def mend(self, experts: Sequence[ExpertKey]) -> None:
        """Blocks of ours were found to be wrong: bring them back, when there is time for it."""
        _log.error("%d blocks do not match their checksums, first %s: restoring them", len(experts), experts[0])
        try:
            self.start_local(tuple(experts), ALL_KINDS)
        except HotspareError as error:
            _log.error("they cannot be restored now: %s", error)

    def _enqueue(
        self,
        waiting: queue.Queue[LocalRestore | None],
        experts: tuple[ExpertKey, ...] | None,
        kinds: Collection[SourceKind],
        push: ConsumerPush | None = None,
    ) -> LocalRestore:
        if self._stopped:
            raise Unavailable("the node is stopping")
        restore = LocalRestore(uuid.uuid4().hex, self._node.settings.node_id, experts, kinds, push)
        try:
            waiting.put_nowait(restore)
        except queue.Full:
            raise TooManyRequests(
                f"{QUEUED_MAX} restores are waiting already: try again later", retry_after_s=RETRY_AFTER_S
            ) from None
        self._keep(restore)
        return restore

    def _send(self, request: RestoreRequest, node_id: str, key: str | None) -> RemoteRestore:
        peers = {peer.node_id: peer.url for peer in self._node.cluster.peers()}
        if node_id not in peers:
            known = ", ".join(sorted([*peers, self._node.settings.node_id]))
            raise NotFound(f"there is no node {node_id!r}: the nodes are {known}")
        headers = {} if key is None else {"Idempotency-Key": key}
        try:
            answer = self._client.request(
                "POST", f"{peers[node_id]}/v1/restores", json=request.model_dump(mode="json"), headers=headers
            )
            document = RestoreDocument.model_validate_json(answer.content)
        except PeerUnreachable as error:
            raise Unavailable(f"node {node_id} does not answer: {error}", retry_after_s=RETRY_AFTER_S) from error
        except (PeerRefused, ValueError) as error:
            raise _as_said(error) from error
        return RemoteRestore(document.id, peers[node_id], self._client, document)

    def _keep(self, restore: AnyRestore) -> AnyRestore:
        with self._lock:
            self._kept[restore.id] = restore
            if len(self._kept) > KEPT_MAX:
                oldest = next((i for i, r in self._kept.items() if _is_over(r)), None)
                if oldest is not None:
                    del self._kept[oldest]
                    self._by_key = {k: v for k, v in self._by_key.items() if v[1] != oldest}
        return restore

    # -- asking about them -----------------------------------------------------------------------------------

    def all(self) -> Sequence[AnyRestore]:
        with self._lock:
            return list(self._kept.values())

    def get(self, restore_id: str) -> AnyRestore:
        with self._lock:
            restore = self._kept.get(restore_id)
        if restore is None:
            raise NotFound(f"there is no restore {restore_id!r}: ask the node that was asked for it, or that does it")
        return restore

    def documents(self) -> list[RestoreDocument]:
        """All of them, newest first."""
        return sorted((r.document() for r in self.all()), key=lambda d: d.created_at, reverse=True)

    def running(self) -> int:
        """How many are waiting or under way here."""
        return sum(not _is_over(r) for r in self.all() if isinstance(r, LocalRestore))


def _is_over(restore: AnyRestore) -> bool:
    if isinstance(restore, LocalRestore):
        return restore.progress.state.is_final
    return restore.last.state.is_final


def _as_said(error: Exception) -> HotspareError:
    """The peer's own refusal, in our words where it is the caller's mistake."""
    from shm.errors import InvalidInput

    if isinstance(error, PeerRefused):
        detail: Any = error.problem.get("detail") or str(error)
        known: dict[int, type[HotspareError]] = {404: NotFound, 409: Conflict, 422: InvalidInput, 503: Unavailable}
        if error.status in known:
            return known[error.status](detail)
    return PeerFailed(str(error))

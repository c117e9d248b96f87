"""The restores of this node, and those it has asked other nodes to do: one store, two workers, bounded queues.

A restore of another node is that node's: it is sent there, and asked for there whenever somebody asks here. Restores
into this node's segment run one after the other, in a thread of their own, and so do those into consumers.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import uuid
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain

from app.cluster.membership import Peer, PeerState
from app.cluster.peers import PeerClient
from app.documents import RestoreDocument, RestoreRequest
from app.errors import Conflict, NotFound, PeerFailed, Unavailable
from app.node.node import Node
from app.restores.consumers import Consumer, ConsumerStore
from app.restores.crowd import Crowd
from app.restores.local import LocalRestore, Wanted
from app.restores.pushes import ConsumerPush
from app.restores.remote import RETRY_AFTER_S, RemoteRestore
from app.restores.worker import Worker
from shm.block import ExpertKey
from shm.errors import HotspareError
from transfer.sources import SourceKind

KEPT_MAX = 1000  # restores remembered; the oldest finished ones go first
KEY_WAIT_S = 10.0  # for a request with the same key; another node is given two seconds to answer
FAILED_IN_LIST_MAX = 10  # of each, in a list of restores
ALL_KINDS = frozenset({SourceKind.PEER, SourceKind.DISK})

_log = logging.getLogger("hotspare.restores")

AnyRestore = LocalRestore | RemoteRestore


class RestoreStore:
    """Every restore that this node was asked for. Thread-safe."""

    def __init__(self, node: Node, client: PeerClient, consumers: ConsumerStore | None = None) -> None:
        self._node = node
        self._client = client
        self._consumers = consumers or ConsumerStore()
        self._kept: OrderedDict[str, AnyRestore] = OrderedDict()
        self._by_key: dict[str, tuple[bytes, str]] = {}
        """Idempotency key → digest of the request, and the restore that it made."""
        self._forgotten_bytes: Counter[str] = Counter()
        self.workers = {"node": Worker("hotspare-restore", node), "consumer": Worker("hotspare-push", node)}
        self._crowd = Crowd()
        self._lock = threading.Lock()
        self._keys_taken: set[str] = set()
        self._keys_changed = threading.Condition()
        self._stopped = False
        self._mending: LocalRestore | None = None
        """The latest that `mend` started."""
        self._mending_lock = threading.Lock()

    def start(self) -> None:
        for worker in self.workers.values():
            worker.loop.start()

    def cancel(self) -> None:
        """Cancel what runs and what waits, and take no more."""
        with self._lock:
            self._stopped = True
        for restore in self.all():
            if isinstance(restore, LocalRestore):
                restore.cancel()

    def stop(self) -> None:
        """Cancel what runs and what waits, and end the workers."""
        self.cancel()
        for worker in self.workers.values():
            worker.stop()
        self._crowd.stop()

    # -- asking for one --------------------------------------------------------------------------------------

    def submit(self, request: RestoreRequest, key: str | None = None) -> RestoreDocument:
        """Start what was asked for, here or on its node; with a key that was seen before, the restore of then.

        Raises NotFound, Conflict, Unavailable, PeerFailed,
        LimitReached, and InvalidInput for experts that are placed elsewhere.
        """
        if key is None:
            return self._start(request, key).document()
        said = hashlib.sha256(request.model_dump_json().encode()).digest()
        with self._turn(key):  # two requests with one key at the same time make one restore
            restore = self._made_with(key, said) or self._start(request, key)
            with self._lock:
                self._by_key[key] = (said, restore.id)
        return restore.document()

    @contextmanager
    def _turn(self, key: str) -> Iterator[None]:
        """Only one request with this key at a time; it may have to ask a slow node, and other keys' do not wait for it.

        Raises Unavailable after KEY_WAIT_S.
        """
        with self._keys_changed:
            if not self._keys_changed.wait_for(lambda: key not in self._keys_taken, KEY_WAIT_S):
                raise Unavailable(
                    f"another request with Idempotency-Key {key!r} is under way: ask again for what it made",
                    retry_after_s=RETRY_AFTER_S,
                )
            self._keys_taken.add(key)
        try:
            yield
        finally:
            with self._keys_changed:
                self._keys_taken.remove(key)
                self._keys_changed.notify_all()

    def _made_with(self, key: str, said: bytes) -> AnyRestore | None:
        """The restore that this key made, if it is remembered. Raises Conflict if it was for another request."""
        with self._lock:
            earlier, restore_id = self._by_key.get(key, (said, ""))
            restore = self._kept.get(restore_id)
        if earlier != said:
            raise Conflict(f"Idempotency-Key {key!r} was used for another request: take a new one")
        return restore

    def _start(self, request: RestoreRequest, key: str | None) -> AnyRestore:
        experts = None if request.experts is None else tuple(ExpertKey(e.layer, e.expert) for e in request.experts)
        kinds = ALL_KINDS if request.sources is None else frozenset(map(SourceKind, request.sources))
        if request.target.consumer_id is not None:
            try:
                consumer = self._consumers.get(request.target.consumer_id)
            except NotFound:
                if (peer := self._peer_of_consumer(request.target.consumer_id)) is None:
                    raise
                return self._send(peer, request, key)
            return self._start_push(consumer, experts, kinds, read_back=request.read_back)
        assert request.target.node_id is not None
        if request.target.node_id != self._node.settings.node_id:
            return self._send(self._peer(request.target.node_id), request, key)
        return self.start_local(experts, kinds)

    def _send(self, peer: Peer, request: RestoreRequest, key: str | None) -> RemoteRestore:
        remote = RemoteRestore.send(self._client, peer, request, key)
        with self._lock:
            known = self._kept.get(remote.id)
            if known is not None and not (isinstance(known, RemoteRestore) and known.url == remote.url):
                raise PeerFailed(f"node {peer.node_id} gives restore {remote.id!r} an id that is another's already")
            self._keep(remote)
        return remote

    def start_local(self, experts: tuple[ExpertKey, ...] | None, kinds: Collection[SourceKind]) -> LocalRestore:
        """Queue a restore into this node's segment. Raises what is wrong with it, or LimitReached."""
        holding = self._node.holding
        if experts is not None and holding is not None:  # else it will ask its peers for a manifest first
            holding.rows_of(experts)
        wanted = None if experts is None else Wanted(experts)
        restore = LocalRestore(uuid.uuid4().hex, self._node.settings.node_id, wanted, kinds)
        return self._enqueue(self.workers["node"], restore)

    def _start_push(
        self,
        consumer: Consumer,
        experts: tuple[ExpertKey, ...] | None,
        kinds: Collection[SourceKind],
        *,
        read_back: bool,
    ) -> LocalRestore:
        """Queue a restore into a consumer's memory. Raises what is wrong with it, or LimitReached."""
        hold = partial(self._consumers.hold, consumer)
        end_lease = partial(self._consumers.end_lease, consumer)
        withdraw_lease = partial(self._consumers.withdraw_lease, consumer)
        push = ConsumerPush(self._node, self._client, consumer, hold, end_lease, withdraw_lease, self.mend, read_back)
        push.rows_of(experts)
        wanted = None if experts is None else Wanted(experts)
        restore = LocalRestore(uuid.uuid4().hex, self._node.settings.node_id, wanted, kinds, push)
        return self._enqueue(self.workers["consumer"], restore)

    def mend(self, experts: Sequence[ExpertKey]) -> None:
        """Blocks of ours were found to be wrong: bring them back, when there is time for it.

        Those that wait are brought together: rot comes in numbers, and each restore asks every peer how it is.
        """
        _log.error("%d blocks do not match their checksums, first %s: restoring them", len(experts), experts[0])
        with self._mending_lock:
            if self._mending is not None and self._mending.widen(experts):
                return
            try:
                self._mending = self.start_local(tuple(experts), ALL_KINDS)
            except HotspareError as error:
                _log.error("they cannot be restored now: %s", error)

    def _enqueue(self, worker: Worker, restore: LocalRestore) -> LocalRestore:
        with self._lock:
            if self._stopped:
                raise Unavailable("the node is stopping")
            worker.put(restore)
            self._keep(restore)
        return restore

    def _peer(self, node_id: str) -> Peer:
        peers = {peer.node_id: peer for peer in self._node.cluster.peers()}
        if node_id not in peers:
            known = ", ".join(sorted([*peers, self._node.settings.node_id]))
            raise NotFound(f"there is no node {node_id!r}: the nodes are {known}")
        return peers[node_id]

    def _peer_of_consumer(self, consumer_id: str) -> Peer | None:
        """The peer that a consumer is registered with; None if none that answers knows it."""
        answering = [p for p in self._node.cluster.peers() if p.state is PeerState.ALIVE and p.conflict is None]
        said = self._crowd.ask(partial(self._with_consumer, peer, consumer_id) for peer in answering)
        return next((peer for peer in said if peer is not None), None)

    def _with_consumer(self, peer: Peer, consumer_id: str) -> Peer | None:
        return peer if self._client.has_consumer(peer.url, consumer_id) else None

    def _keep(self, restore: AnyRestore) -> None:
        """Remember it, and forget one in its place if there are too many: of those here only one that is over."""
        self._kept[restore.id] = restore
        if len(self._kept) <= KEPT_MAX:
            return
        over = (i for i, r in self._kept.items() if r.is_over)
        remote = (i for i, r in self._kept.items() if isinstance(r, RemoteRestore))
        forgotten = self._kept.pop(next(chain(over, remote)))
        self._by_key = {k: v for k, v in self._by_key.items() if v[1] != forgotten.id}
        if isinstance(forgotten, LocalRestore):
            self._forgotten_bytes.update(forgotten.progress.report().bytes_by_source)

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
        """All of them, newest first, each with the first FAILED_IN_LIST_MAX of its failed blocks."""
        restores = self.all()
        by_node: dict[str, list[RemoteRestore]] = {}
        for restore in restores:
            if isinstance(restore, RemoteRestore):
                by_node.setdefault(restore.url, []).append(restore)
        list(self._crowd.ask(partial(_refresh, each) for each in by_node.values()))
        found = [restore.told() if isinstance(restore, RemoteRestore) else restore.document() for restore in restores]
        newest_first = sorted(found, key=lambda document: document.created_at, reverse=True)
        return [d.model_copy(update={"failed": d.failed[:FAILED_IN_LIST_MAX]}) for d in newest_first]

    def bytes_by_source(self) -> Counter[str]:
        """Bytes that restores into this node and its consumers brought, those forgotten included. Only grows."""
        with self._lock:
            total = Counter(self._forgotten_bytes)
            for restore in self._kept.values():
                if isinstance(restore, LocalRestore):
                    total.update(restore.progress.report().bytes_by_source)
        return total


def _refresh(restores: Sequence[RemoteRestore]) -> None:
    """Have news of those of one node. One that does not answer is asked once, and not for each of them."""
    for restore in restores:
        restore.refresh()
        if restore.silence is not None:
            for each in restores:
                each.silence = None if each.is_over else restore.silence
            return

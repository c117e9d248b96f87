"""Asking the other nodes how they are: the one place that does, and so the one that counts their failures.

Every peer is asked once a PROBE_INTERVAL_S. Who needs fresher news, a restore about to be planned, calls `look`: it
waits until every peer has been asked and has answered or failed, for LOOK_WAIT_S at most. A peer is asked by one party
at a time: a second one waits for the answer that is under way, so one that is slow holds one thread, and nobody's count
of its failures grows faster for being asked often (`app.cluster.membership`).

A peer whose name cannot be looked up keeps a thread for as long as the resolver likes, and that cannot be cut short: so
who has not answered for LOOK_WAIT_S is not waited for again. And one that failed when it was last asked is waited for
no longer than one that is well takes to answer: else each of many small restores would wait for it anew.

That a peer answers says nothing of the ports that its bytes go through: whether those can be connected to is tried now
and then, so that it is told before a restore finds out.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress

from app.cluster.cluster import Cluster, Version
from app.cluster.membership import NodeReport, Peer
from app.cluster.peers import PeerClient
from shm.block import ExpertKey
from shm.errors import HotspareError
from shm.manifest import Manifest
from transfer.engine import complaint
from transfer.loop import Loop

PROBE_INTERVAL_S = 1.0
LOOK_WAIT_S = 3.0  # a peer is given two seconds to say how it is; who is slower than that is not waited for
FAILING_WAIT_S = 0.5  # for who failed the last time: who is back answers within that, or is heard of a second later
CONNECT_INTERVAL_S = 30.0  # between two tries to connect to a peer's memory
CONNECT_WAIT_S = 2.0
ASK_THREADS_MAX = 64

_log = logging.getLogger("hotspare.cluster")


class Prober:
    """Asks every peer, again and again, and tells the cluster's view. `look` and `fetch_version` block."""

    def __init__(self, cluster: Cluster, client: PeerClient) -> None:
        self.loop = Loop("hotspare-prober", self._turn)
        self._cluster = cluster
        self._client = client
        self._under_way: dict[str, tuple[Future[None], float]] = {}
        """By peer: the answer that is waited for, or the last one, and when it was asked for."""
        self._connected: dict[str, tuple[str, float]] = {}
        """By peer: the session that was last connected to, and when."""
        self._lock = threading.Lock()
        peers = len(cluster.peers())
        self._pool = ThreadPoolExecutor(min(ASK_THREADS_MAX, 2 * peers), "hotspare-ask") if peers else None

    def start(self) -> None:
        """Ask in the background until `stop`."""
        if self._pool is not None:
            self.loop.start()

    def stop(self) -> None:
        """Ask no more. Answers under way are not waited for: they end when the client is closed, or by their limit."""
        self.loop.stop()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _turn(self) -> float:
        self._ask_all()
        return PROBE_INTERVAL_S

    def look(self, wait_s: float = LOOK_WAIT_S) -> None:
        """Ask every peer now, and wait until all have answered or failed, or for `wait_s`, and for who failed before
        for FAILING_WAIT_S. Never raises for a peer."""
        failing = {peer.node_id for peer in self._cluster.peers() if peer.failures}
        asked = self._ask_all()
        wait([each for node_id, each in asked.items() if node_id not in failing], wait_s)
        wait([each for node_id, each in asked.items() if node_id in failing], min(wait_s, FAILING_WAIT_S))

    def _ask_all(self) -> dict[str, Future[None]]:
        """By peer, the answers that are worth waiting for."""
        if self._pool is None or self.loop.is_stopped:
            return {}
        with self._lock:
            for peer in self._cluster.peers():
                asked, _ = self._under_way.get(peer.node_id, (None, 0.0))
                if asked is None or asked.done():
                    with suppress(RuntimeError):  # it is being stopped, or the system has no more threads
                        self._under_way[peer.node_id] = self._pool.submit(self._ask, peer), time.monotonic()
            since = time.monotonic() - LOOK_WAIT_S
            under_way = self._under_way.items()
            return {node_id: asked for node_id, (asked, at) in under_way if asked.done() or at >= since}

    def _ask(self, peer: Peer) -> None:
        asked_at = self._cluster.now()
        try:
            report = NodeReport.from_json(self._client.node(peer.url))
        except HotspareError as error:
            self._cluster.failed(peer.node_id, str(error), asked_at)
            return
        except Exception as error:  # a peer must not be able to end our asking, whatever it says
            _log.exception("asking %s failed in an unforeseen way", peer.node_id)
            self._cluster.failed(peer.node_id, f"{type(error).__name__}: {error}", asked_at)
            return
        manifest = self._cluster.answered(peer.node_id, report, asked_at)
        if manifest is not None:
            self._fetch_map(peer, report, manifest)
        self._connect(peer.node_id, report.session_id)

    def _connect(self, node_id: str, session_id: str) -> None:
        """Have the way to a peer's memory tried, if that is due."""
        before, at = self._connected.get(node_id, ("", 0.0))
        if not session_id or (before == session_id and time.monotonic() - at < CONNECT_INTERVAL_S):
            return
        self._connected[node_id] = session_id, time.monotonic()
        if self._pool is not None:
            with suppress(RuntimeError):  # it is being stopped, or the system has no more threads
                self._pool.submit(self._try_connecting, node_id, session_id)

    def _try_connecting(self, node_id: str, session_id: str) -> None:
        try:
            self._cluster.connected(node_id, session_id, complaint(session_id, CONNECT_WAIT_S))
        except Exception:  # as in `_ask`
            _log.exception("connecting to %s failed in an unforeseen way", node_id)

    def _fetch_map(self, peer: Peer, report: NodeReport, manifest: Manifest) -> None:
        try:
            blocks = self._client.blocks(peer.url, peer.node_id, manifest)
        except HotspareError as error:
            _log.warning("the shard map of %s could not be had: %s", peer.node_id, error)
            return
        self._cluster.holds(peer.node_id, report, manifest, blocks)

    def doubt(self, node_id: str, content_digest: str, blocks: Sequence[ExpertKey]) -> None:
        """Tell a peer that blocks of its arrived wrong here."""
        self._client.doubt(self._cluster.url(node_id), content_digest, blocks)

    def fetch_version(self) -> tuple[Manifest, Version] | None:
        """What most peers have, and its manifest; None while that cannot be had. Raises ManifestError for a tie."""
        version = self._cluster.choose()
        if version is None:
            return None
        versions = self._cluster.versions()
        for other, peers in versions.items():
            if other != version:
                named = ", ".join(peer.node_id for peer in peers)
                _log.error("%s: other weights than most (%s, not %s); nothing is taken of it", named, other, version)
        for peer in versions.get(version, ()):
            try:
                manifest = self._client.manifest(peer.url)
            except HotspareError as error:
                _log.warning("the manifest of %s could not be had: %s", peer.node_id, error)
                continue
            if manifest.digest == version.manifest_digest:
                return manifest, version
        return None

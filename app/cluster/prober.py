"""Asking the other nodes how they are: the one place that does, and so the one that counts their failures.

Every peer is asked once a PROBE_INTERVAL_S. Who needs fresher news, a restore about to be planned, calls `look`: it
waits until every peer has been asked and has answered or failed, for LOOK_WAIT_S at most. A peer is asked by one party
at a time: a second one waits for the answer that is under way, so one that is slow holds one thread, and nobody's count
of its failures grows faster for being asked often (`app.cluster.membership`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress

from app.cluster.cluster import Cluster, Version
from app.cluster.membership import NodeReport, Peer
from app.cluster.peers import PeerClient
from shm.block import ExpertKey
from shm.errors import HotspareError
from shm.manifest import Manifest
from transfer.loop import Loop

PROBE_INTERVAL_S = 1.0
LOOK_WAIT_S = 3.0  # a peer is given two seconds to say how it is; who is slower than that is not waited for
ASK_THREADS_MAX = 64

_log = logging.getLogger("hotspare.cluster")


class Prober:
    """Asks every peer, again and again, and tells the cluster's view. `look` and `fetch_version` block."""

    def __init__(self, cluster: Cluster, client: PeerClient) -> None:
        self.loop = Loop("hotspare-prober", self._turn)
        self._cluster = cluster
        self._client = client
        self._under_way: dict[str, Future[None]] = {}
        self._lock = threading.Lock()
        peers = len(cluster.peers())
        self._pool = ThreadPoolExecutor(min(ASK_THREADS_MAX, peers), "hotspare-ask") if peers else None

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
        """Ask every peer now, and wait until all have answered or failed, or for `wait_s`. Never raises for a peer."""
        wait(self._ask_all(), wait_s)

    def _ask_all(self) -> list[Future[None]]:
        if self._pool is None or self.loop.is_stopped:
            return []
        with self._lock:
            for peer in self._cluster.peers():
                asked = self._under_way.get(peer.node_id)
                if asked is None or asked.done():
                    with suppress(RuntimeError):  # it is being stopped
                        self._under_way[peer.node_id] = self._pool.submit(self._ask, peer)
            return list(self._under_way.values())

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

"""The other nodes as they are now: polled in a thread of their own, with what each has published.

`app.cluster.membership` decides what to think of a peer; here is the I/O. A peer's map is fetched again when its
session or revision changed, and kept until the peer is given up: what one missed poll says does not make its blocks
gone.

Ages are taken from a clock that only goes forward: the host's date may be set at any time, and nobody died of it.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime

from app.cluster.membership import Membership, NodeReport, Peer, PeerState
from app.cluster.peers import PeerBlocks, PeerClient
from shm.errors import HotspareError, ManifestError
from shm.manifest import Manifest

POLL_INTERVAL_S = 1.0
POLL_THREADS_MAX = 16

_log = logging.getLogger("hotspare.cluster")


class Cluster:
    """This node's view of its peers. Thread-safe."""

    def __init__(self, membership: Membership, client: PeerClient) -> None:
        self._membership = membership
        self._client = client
        self._manifest: Manifest | None = None
        self._blocks: dict[str, PeerBlocks] = {}
        self._last_seen: dict[str, datetime] = {}
        self._lock = threading.RLock()
        self._stopped = threading.Event()
        self._poller: threading.Thread | None = None

    # -- polling ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Poll in the background until `stop`."""
        if self._membership.peers() and self._poller is None:
            self._poller = threading.Thread(target=self._poll_forever, name="hotspare-poll", daemon=True)
            self._poller.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._poller is not None:
            self._poller.join()

    def _poll_forever(self) -> None:
        self.refresh()
        while not self._stopped.wait(POLL_INTERVAL_S):
            self.refresh()

    def use_manifest(self, manifest: Manifest, placement_digest: str) -> None:
        """From now on, peers with this manifest are sources, and those with another are not."""
        with self._lock:
            self._manifest = manifest
            self._blocks.clear()
            self._membership.use_manifest(manifest.digest, placement_digest)

    def refresh(self) -> None:
        """Ask every peer once, all at the same time. Never raises for what a peer does."""
        peers = self.peers()
        if peers:
            with ThreadPoolExecutor(min(POLL_THREADS_MAX, len(peers)), thread_name_prefix="hotspare-ask") as pool:
                list(pool.map(self._ask, peers))

    def _ask(self, peer: Peer) -> None:
        try:
            report = NodeReport.from_json(self._client.node(peer.url))
        except HotspareError as error:
            with self._lock:
                self._membership.failed(peer.node_id, str(error), time.monotonic())
            return
        with self._lock:
            seen = self._membership.answered(peer.node_id, report, time.monotonic())
            self._last_seen[peer.node_id] = datetime.now(UTC)
            manifest, known = self._manifest, self._blocks.get(peer.node_id)
        if manifest is None or seen.conflict or not report.session_id or report.manifest_digest != manifest.digest:
            with self._lock:
                self._blocks.pop(peer.node_id, None)
        elif known is None or (known.session_id, known.revision) != (report.session_id, report.revision):
            self._fetch(peer, report, manifest)

    def _fetch(self, peer: Peer, report: NodeReport, manifest: Manifest) -> None:
        try:
            blocks = self._client.blocks(peer.url, peer.node_id, manifest)
        except HotspareError as error:
            _log.warning("the shard map of %s could not be had: %s", peer.node_id, error)
            return
        with self._lock:
            if self._manifest is manifest:
                self._blocks[peer.node_id] = replace(blocks, session_id=report.session_id)

    # -- what is known ---------------------------------------------------------------------------------------

    def peers(self) -> list[Peer]:
        """Every peer that was named, by node id. Times are of `time.monotonic`."""
        with self._lock:
            return self._membership.peers(time.monotonic())

    def last_seen(self, node_id: str) -> datetime | None:
        """When a peer last answered, as this host's date was then: for people, never to count with."""
        with self._lock:
            return self._last_seen.get(node_id)

    def url(self, node_id: str) -> str:
        """Where a peer's control plane is; raises InvalidInput for a node that was never named."""
        with self._lock:
            return self._membership.peer(node_id).url

    def holdings(self) -> dict[str, PeerBlocks]:
        """What each peer that is not given up has published, by node id; the alive ones first."""
        with self._lock:
            held = [p for p in self.peers() if p.node_id in self._blocks and p.state is not PeerState.UNREACHABLE]
            held.sort(key=lambda peer: peer.state is not PeerState.ALIVE)
            return {peer.node_id: self._blocks[peer.node_id] for peer in held}

    def revision(self) -> str:
        """Changes whenever `holdings` does."""
        held = sorted(self.holdings().items())
        return ";".join(f"{node}={blocks.session_id}@{blocks.revision}" for node, blocks in held)

    def _manifest_holders(self) -> dict[str, list[Peer]]:
        """Peers that can be used, by the digest of their manifest. More than one digest: they disagree."""
        holders: dict[str, list[Peer]] = {}
        for peer in self.peers():
            digest = peer.report.manifest_digest if peer.report else None
            if digest and peer.state is not PeerState.UNREACHABLE and peer.conflict is None:
                holders.setdefault(digest, []).append(peer)
        return holders

    def has_manifest(self) -> bool:
        """Whether a peer that answers has a manifest."""
        return bool(self._manifest_holders())

    def fetch_manifest(self) -> Manifest | None:
        """The peers' manifest; None while none that answers has one. Raises ManifestError if they disagree."""
        holders = self._manifest_holders()
        if len(holders) > 1:
            said = "; ".join(f"{', '.join(p.node_id for p in peers)}: {d[:12]}…" for d, peers in holders.items())
            raise ManifestError(
                f"peers disagree on the manifest ({said}): they serve different checkpoints under one model name; "
                "stop those that are wrong, or give this node --checkpoint"
            )
        for peer in next(iter(holders.values()), []):
            try:
                return self._client.manifest(peer.url)
            except HotspareError as error:
                _log.warning("the manifest of %s could not be had: %s", peer.node_id, error)
        return None

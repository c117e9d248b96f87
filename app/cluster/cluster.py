"""The other nodes as they are now, and what each has published: this node's view, kept in memory.

Nothing is asked here: `app.cluster.prober` asks, and tells this view what came back; `app.cluster.membership` decides
what to think of a peer. So whoever reads the view, a route or a plan, waits for nobody. A peer's map is kept until the
peer is given up: what one missed poll says does not make its blocks gone.

Ages are taken from a clock that only goes forward: the host's date may be set at any time, and nobody died of it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

from app.cluster.membership import Membership, NodeReport, Peer, PeerState
from app.cluster.peers import PeerBlocks
from shm.manifest import Manifest


class Cluster:
    """This node's view of its peers. Thread-safe; the lock is held for as long as a dictionary takes."""

    def __init__(self, membership: Membership, clock: Callable[[], float] | None = None) -> None:
        """`clock` counts seconds from anywhere, and must never jump: `time.monotonic` by default."""
        self._membership = membership
        self._clock = clock or (lambda: time.monotonic())
        self._manifest: Manifest | None = None
        self._blocks: dict[str, PeerBlocks] = {}
        self._last_seen: dict[str, datetime] = {}
        self._lock = threading.RLock()

    def now(self) -> float:
        """The time that events here are counted in."""
        return self._clock()

    # -- events ----------------------------------------------------------------------------------------------

    def use_manifest(self, manifest: Manifest, placement_digest: str) -> None:
        """From now on, peers with this manifest are sources, and those with another are not."""
        with self._lock:
            self._manifest = manifest
            self._blocks.clear()
            self._membership.use_manifest(manifest.digest, placement_digest)

    def failed(self, node_id: str, error: str, asked_at: float) -> None:
        """What a peer was asked at `asked_at` brought nothing."""
        with self._lock:
            self._membership.failed(node_id, error, asked_at=asked_at, now=self._clock())

    def answered(self, node_id: str, report: NodeReport, asked_at: float) -> Manifest | None:
        """A peer said this of itself when it was asked at `asked_at`.

        Returns the manifest by which its map is to be fetched, if that has changed; its blocks are told with `holds`.
        """
        with self._lock:
            seen = self._membership.answered(node_id, report, asked_at=asked_at, now=self._clock())
            if seen.report is not report:  # later news was here before it
                return None
            self._last_seen[node_id] = datetime.now(UTC)
            manifest, known = self._manifest, self._blocks.get(node_id)
            if manifest is None or seen.conflict or not report.session_id or report.manifest_digest != manifest.digest:
                self._blocks.pop(node_id, None)
                return None
            if known is not None and (known.session_id, known.revision) == (report.session_id, report.revision):
                return None
            return manifest

    def holds(self, node_id: str, report: NodeReport, manifest: Manifest, blocks: PeerBlocks) -> None:
        """A peer that said `report` has these blocks of `manifest`."""
        with self._lock:
            is_current = self._membership.peer(node_id).report is report
            if self._manifest is manifest and is_current:
                self._blocks[node_id] = replace(blocks, session_id=report.session_id)

    # -- what is known ---------------------------------------------------------------------------------------

    def peers(self) -> list[Peer]:
        """Every peer that was named, by node id. Times are of `now`."""
        with self._lock:
            return self._membership.peers(self._clock())

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

    def manifest_holders(self) -> dict[str, list[Peer]]:
        """Peers that can be used, by the digest of their manifest. More than one digest: they disagree."""
        holders: dict[str, list[Peer]] = {}
        for peer in self.peers():
            digest = peer.report.manifest_digest if peer.report else None
            if digest and peer.state is not PeerState.UNREACHABLE and peer.conflict is None:
                holders.setdefault(digest, []).append(peer)
        return holders

    def has_manifest(self) -> bool:
        """Whether a peer that answers has a manifest."""
        return bool(self.manifest_holders())

"""The other nodes as they are now, and what each has published: this node's view, kept in memory.

Nothing is asked here: `app.cluster.prober` asks, and tells this view what came back; `app.cluster.membership` decides
what to think of a peer. So whoever reads the view, a route or a plan, waits for nobody. A peer's map is kept until the
peer is given up: what one missed poll says does not make its blocks gone.

Ages are taken from a clock that only goes forward: the host's date may be set at any time, and nobody died of it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import NamedTuple

from app.cluster.membership import Membership, NodeReport, Peer, PeerState
from app.cluster.namesakes import Asker, Namesakes
from app.cluster.peers import PeerBlocks
from shm.errors import ManifestError
from shm.manifest import Manifest

_log = logging.getLogger("hotspare.cluster")


class Version(NamedTuple):
    """One content of the model: digests of its manifest and of its bytes, in hex."""

    manifest_digest: str
    content_digest: str

    def __str__(self) -> str:
        return f"manifest {self.manifest_digest[:12]}… content {self.content_digest[:12]}…"


class Cluster:
    """This node's view of its peers. Thread-safe; the lock is held for as long as a dictionary takes."""

    def __init__(
        self, membership: Membership, clock: Callable[[], float] | None = None, namesakes: Namesakes | None = None
    ) -> None:
        """`clock` counts seconds from anywhere, and must never jump: `time.monotonic` by default."""
        self._membership = membership
        self._namesakes = namesakes
        self._clock = clock or (lambda: time.monotonic())
        self._manifest: Manifest | None = None
        self._content_digest: str | None = None
        self._blocks: dict[str, PeerBlocks] = {}
        self._last_seen: dict[str, datetime] = {}
        self._lock = threading.RLock()

    def now(self) -> float:
        """The time that events here are counted in."""
        return self._clock()

    # -- events ----------------------------------------------------------------------------------------------

    def use_manifest(self, manifest: Manifest, placement_digest: str, content_digest: str | None) -> None:
        """From now on, peers with this manifest and this content are sources, and those with others are not.

        While the content is None, nobody is.
        """
        with self._lock:
            self._manifest, self._content_digest = manifest, content_digest
            self._blocks.clear()
            self._membership.use_manifest(manifest.digest, placement_digest, content_digest)

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
            if manifest is None or seen.conflict or not report.session_id or not self._is_ours(report):
                self._blocks.pop(node_id, None)
                return None
            if known is not None and (known.session_id, known.revision) == (report.session_id, report.revision):
                return None
            return manifest

    def _is_ours(self, report: NodeReport) -> bool:
        """Whether a peer has the very bytes that we have, or are to have."""
        content = self._content_digest
        return (
            self._manifest is not None
            and content is not None
            and ((report.manifest_digest, report.content_digest) == (self._manifest.digest, content))
        )

    def holds(self, node_id: str, report: NodeReport, manifest: Manifest, blocks: PeerBlocks) -> None:
        """A peer that said `report` has these blocks of `manifest`."""
        with self._lock:
            is_current = self._membership.peer(node_id).report is report
            if self._manifest is manifest and is_current:
                self._blocks[node_id] = replace(blocks, session_id=report.session_id)

    def connected(self, node_id: str, session_id: str, complaint: str | None) -> None:
        """A connection to a peer's memory was tried, and this is what speaks against reading it."""
        with self._lock:
            before = self._membership.peer(node_id).unreadable
            after = self._membership.connected(node_id, session_id, complaint).unreadable
        if after is not None and before is None:
            _log.error("%s answers, but its memory cannot be read from here: %s", node_id, after)
        elif before is not None and after is None:
            _log.warning("the memory of %s can be read from here again", node_id)

    def was_asked(self, asker: Asker, host: str) -> None:
        """A node asked this one something, from that host."""
        if self._namesakes is None:
            return
        with self._lock:
            warning = self._namesakes.hear(asker.node_id, asker.start, host, self._clock())
        if warning is not None:
            _log.error("%s", warning)

    # -- what is known ---------------------------------------------------------------------------------------

    def peers(self) -> list[Peer]:
        """Every peer that was named, by node id. Times are of `now`."""
        with self._lock:
            return self._membership.peers(self._clock())

    def last_seen(self, node_id: str) -> datetime | None:
        """When a peer last answered, as this host's date was then: for people, never to count with."""
        with self._lock:
            return self._last_seen.get(node_id)

    def namesake_warning(self, node_id: str) -> str | None:
        """What is to be told if two hosts run under this id, ours or a peer's."""
        with self._lock:
            return None if self._namesakes is None else self._namesakes.warning(node_id, self._clock())

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

    def versions(self) -> dict[Version, list[Peer]]:
        """Peers that can be used, by what they have: the most common first. More than one: they disagree."""
        holders: dict[Version, list[Peer]] = {}
        for peer in self.peers():
            report = peer.report
            if report is None or peer.state is PeerState.UNREACHABLE or peer.conflict is not None:
                continue
            if report.manifest_digest and report.content_digest:
                holders.setdefault(Version(report.manifest_digest, report.content_digest), []).append(peer)
        return dict(sorted(holders.items(), key=lambda item: (-len(item[1]), item[0])))

    def has_version(self) -> bool:
        """Whether a peer that answers has content."""
        return bool(self.versions())

    def choose(self) -> Version | None:
        """What a node that has nothing is to have: what most peers have; None while that cannot be said yet.

        More than half of all peers settle it at once. Else every peer is waited for until it has answered or is given
        up, so that one that answers first, with something of its own, does not decide. Raises ManifestError for a tie.
        """
        versions, peers = self.versions(), self.peers()
        if not versions:
            return None
        (first, holders), *others = versions.items()
        if 2 * len(holders) > len(peers):
            return first
        if any(peer.state is PeerState.SUSPECT for peer in peers):
            return None
        if others and len(others[0][1]) == len(holders):
            said = "; ".join(f"{', '.join(p.node_id for p in each)}: {v}" for v, each in versions.items())
            raise ManifestError(
                f"peers disagree on the weights, and none has more on its side ({said}): they serve different "
                "checkpoints under one model name; stop those that are wrong, or give this node --checkpoint"
            )
        return first

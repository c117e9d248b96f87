"""Membership: what this node thinks of its peers. Pure: someone else polls, and says what came back and when.

A peer is *alive* when its last poll was answered, *suspect* when one failed or nothing was heard of it lately, and
*unreachable* after FAILURES_MAX failures in a row or UNREACHABLE_AFTER_S of them: only then are its blocks counted as
gone. Silence without a failed poll never goes beyond suspect, for it may be ours: a stalled poller is no dead peer.

A peer that answers may still be none that we can use: another node behind its address, another model, another
checkpoint. It stays listed, with the reason in `conflict`, and is not among `sources`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from app.placement import NODES_MAX
from shm.errors import InvalidInput
from shm.manifest import check_name

FAILURES_MAX = 3  # polls in a row; one lost answer is common, three are not
UNREACHABLE_AFTER_S = 10.0  # of failed polls, where they are slow to fail (a stopped process answers by timeout)
SUSPECT_AFTER_S = 15.0  # without any answer; some polls' time, so that one slow round accuses nobody
ERROR_CHARS_MAX = 300
DIGEST_CHARS_SHOWN = 12


class PeerState(StrEnum):
    ALIVE = "alive"
    SUSPECT = "suspect"
    UNREACHABLE = "unreachable"


@dataclass(frozen=True, slots=True)
class NodeReport:
    """What a node says of itself. Without a manifest or an engine, the digests or the session are None."""

    node_id: str
    model: str
    namespace: str
    state: str
    manifest_digest: str | None = None
    session_id: str | None = None
    revision: str = ""
    replicas: int | None = None
    placement_digest: str | None = None


@dataclass(frozen=True, slots=True)
class Peer:
    """One peer, as far as we know. Times in seconds of the caller's monotonic clock."""

    node_id: str
    url: str
    last_seen: float | None = None
    failures: int = 0
    """Polls that failed since the last answer."""
    failing_since: float | None = None
    last_error: str | None = None
    report: NodeReport | None = None
    """Its last answer, also when it is out of date."""
    session_id: str | None = None
    """The last engine session it named: an answer without one does not clear it."""
    sessions: int = 0
    """Sessions seen so far. It grows when the peer restarts: addresses and sessions noted before are void."""

    def state(self, now: float) -> PeerState:
        if self.failing_since is not None:
            long = now - self.failing_since >= UNREACHABLE_AFTER_S
            return PeerState.UNREACHABLE if long or self.failures >= FAILURES_MAX else PeerState.SUSPECT
        heard = self.last_seen is not None and now - self.last_seen < SUSPECT_AFTER_S
        return PeerState.ALIVE if heard else PeerState.SUSPECT


def _shown(digest: str) -> str:
    return f"{digest[:DIGEST_CHARS_SHOWN]}…"


def _conflict(expected: str, url: str, report: NodeReport, ours: NodeReport) -> str | None:
    if report.node_id != expected:
        return f"{url} answers as node {report.node_id!r}, not {expected!r}: correct `--peer {expected}=URL`"
    for what, theirs, own in (("model", report.model, ours.model), ("namespace", report.namespace, ours.namespace)):
        if theirs != own:
            return f"{what} {theirs!r} differs from ours, {own!r}: start both with the same `--{what}`"
    digests = report.manifest_digest, ours.manifest_digest
    if digests[0] is not None and digests[1] is not None and digests[0] != digests[1]:
        return (
            f"manifest digest {_shown(digests[0])} differs from ours, {_shown(digests[1])}: "
            "one of the nodes was filled from another checkpoint"
        )
    return None


class Membership:
    """The peers of one node, and the events that change what it thinks of them. Not thread-safe."""

    def __init__(self, peers: Mapping[str, str], ours: NodeReport) -> None:
        """`peers` are URLs by node id; raises InvalidInput for bad names and more than NODES_MAX - 1.

        An entry for this node itself is left out, so that every node can be given the same list.
        """
        others = {check_name("node", node_id): url for node_id, url in peers.items() if node_id != ours.node_id}
        if len(others) >= NODES_MAX:
            raise InvalidInput(f"{len(others)} peers: name at most {NODES_MAX - 1}")
        self.ours = ours
        """What this node says of itself; the owner sets it anew when that changes."""
        self._peers = {node_id: Peer(node_id, others[node_id]) for node_id in sorted(others)}

    # -- events ----------------------------------------------------------------------------------------------

    def answered(self, node_id: str, report: NodeReport, now: float) -> Peer:
        """A poll of `node_id` brought `report`; raises InvalidInput if there is no such peer."""
        peer = self.peer(node_id)
        known = replace(peer, report=report, last_seen=now, failures=0, failing_since=None, last_error=None)
        fresh = report.session_id is not None and report.session_id != peer.session_id
        if fresh and report.node_id == node_id:
            known = replace(known, session_id=report.session_id, sessions=peer.sessions + 1)
        self._peers[node_id] = known
        return known

    def failed(self, node_id: str, error: str, now: float) -> Peer:
        """A poll of `node_id` failed; raises InvalidInput if there is no such peer."""
        peer = self.peer(node_id)
        self._peers[node_id] = replace(
            peer,
            failures=peer.failures + 1,
            failing_since=now if peer.failing_since is None else peer.failing_since,
            last_error=error[:ERROR_CHARS_MAX],
        )
        return self._peers[node_id]

    # -- what follows from them ------------------------------------------------------------------------------

    def peer(self, node_id: str) -> Peer:
        """Raises InvalidInput if there is no such peer."""
        if node_id not in self._peers:
            raise InvalidInput(f"node {node_id!r} is not a peer of {self.ours.node_id}: {', '.join(self._peers)}")
        return self._peers[node_id]

    def peers(self) -> tuple[Peer, ...]:
        """All of them, in order of node id."""
        return tuple(self._peers.values())

    def conflict(self, node_id: str) -> str | None:
        """Why the peer is not a source although it answered, or None."""
        peer = self.peer(node_id)
        return _conflict(node_id, peer.url, peer.report, self.ours) if peer.report else None

    def placement_warning(self, node_id: str) -> str | None:
        """That the peer places blocks otherwise than we do, or None. Its bytes are right all the same."""
        report = self.peer(node_id).report
        if report is None or self.conflict(node_id) is not None:
            return None
        if None not in (report.replicas, self.ours.replicas) and report.replicas != self.ours.replicas:
            return f"places {report.replicas} replicas, we {self.ours.replicas}: give all nodes the same `--replicas`"
        digests = report.placement_digest, self.ours.placement_digest
        if None not in digests and digests[0] != digests[1]:
            return "places blocks on other nodes than we do: give all nodes the same `--peer` list and version"
        return None

    def reachable(self, now: float) -> tuple[Peer, ...]:
        """Peers whose blocks count as there: they answered once, without conflict, and are not given up."""
        return tuple(
            peer
            for peer in self.peers()
            if peer.report and peer.state(now) is not PeerState.UNREACHABLE and self.conflict(peer.node_id) is None
        )

    def sources(self, now: float) -> tuple[Peer, ...]:
        """Those of `reachable` that bytes can be read from now: with our manifest and a session; the alive first."""
        ours = self.ours.manifest_digest
        if ours is None:
            return ()
        able = [p for p in self.reachable(now) if p.report and p.report.manifest_digest == ours and p.report.session_id]
        return tuple(sorted(able, key=lambda peer: peer.state(now) is not PeerState.ALIVE))

    def manifests(self, now: float) -> dict[str, tuple[str, ...]]:
        """Who has which manifest: node ids by digest. More than one digest means that the peers disagree."""
        holders: dict[str, tuple[str, ...]] = {}
        for peer in self.reachable(now):
            if peer.report and (digest := peer.report.manifest_digest):
                holders[digest] = (*holders.get(digest, ()), peer.node_id)
        return holders

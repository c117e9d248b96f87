"""Membership: what this node thinks of its peers. Pure: someone else asks, and says when it asked and what came back.

A peer is *alive* when its last poll was answered, *suspect* when one failed or nothing was heard of it lately, and
*unreachable* after FAILURES_MAX failures in a row or UNREACHABLE_AFTER_S of them: only then are its blocks counted as
gone. Silence without a failed poll never goes beyond suspect, for it may be ours: a stalled poller is no dead peer.

Two rules keep the count honest however many ask. News is ordered by when it was *asked for*: what was asked for before
the latest that is known arrives too late to say anything. And failures count by the second, not by the asker: one that
was asked for within FAILURE_SPACING_S of the last that counted tells why, and counts nothing, so that a peer which
restarts is not given up because three parties asked for it in the same moment.

A peer that answers may still be none that we can use: another node behind its address, another model, another
checkpoint. It stays listed, with the reason in `conflict`, and nothing is taken from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from typing import Any

from app.cluster.placement import NODES_MAX
from shm.errors import InvalidInput
from shm.manifest import check_name

FAILURES_MAX = 3  # polls in a row; one lost answer is common, three are not
FAILURE_SPACING_S = 0.9  # between two failures that count; a little less than the prober's interval
UNREACHABLE_AFTER_S = 10.0  # of failed polls, where they are slow to fail (a stopped process only times out)
SUSPECT_AFTER_S = 15.0  # without any answer; several polls' time, so that one slow round accuses nobody
ERROR_CHARS_MAX = 300
REPORT_CHARS_MAX = 300  # of each text in a report; names have at most 200, digests 64
DIGEST_CHARS_SHOWN = 12


class PeerState(StrEnum):
    ALIVE = "alive"
    SUSPECT = "suspect"
    UNREACHABLE = "unreachable"


@dataclass(frozen=True, slots=True)
class NodeReport:
    """What a node says of itself: the part of `GET /v1/node` that its peers go by."""

    node_id: str
    model: str
    namespace: str
    state: str
    manifest_digest: str | None = None
    content_digest: str | None = None
    """Of the bytes: None while it has pinned none, and of a node that is too old to say."""
    session_id: str = ""
    """Empty while it has no transfer engine."""
    revision: str = ""
    replicas: int | None = None
    placement_digest: str | None = None
    blocks_unproved: int | None = None
    proved_oldest: datetime | None = None
    """When the oldest proof of what it publishes was; None while something was never proved."""

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> NodeReport:
        """Read the peer's document; fields that are not ours are passed over. Raises InvalidInput."""
        return cls(
            node_id=_text(document, "node_id"),
            model=_text(document, "model"),
            namespace=_text(document, "namespace"),
            state=_text(document, "state"),
            manifest_digest=_text_or_none(document, "manifest_digest"),
            content_digest=_text_or_none(document, "content_digest"),
            session_id=_text_or_none(document, "session_id") or "",
            revision=_text_or_none(document, "revision") or "",
            replicas=_number_or_none(document, "replicas"),
            placement_digest=_text_or_none(document, "placement_digest"),
            blocks_unproved=_number_or_none(document, "blocks_unproved"),
            proved_oldest=_time_or_none(document, "proved_oldest"),
        )


def _text(document: Mapping[str, Any], name: str) -> str:
    value = document.get(name)
    if not isinstance(value, str) or len(value) > REPORT_CHARS_MAX:
        raise InvalidInput(f"not a node's report: {name} is {value!r:.40}, not a text of {REPORT_CHARS_MAX} at most")
    return value


def _text_or_none(document: Mapping[str, Any], name: str) -> str | None:
    return None if document.get(name) is None else _text(document, name)


def _number_or_none(document: Mapping[str, Any], name: str) -> int | None:
    value = document.get(name)
    if value is not None and type(value) is not int:
        raise InvalidInput(f"not a node's report: {name} is {value!r:.40}, not a whole number")
    return value


def _time_or_none(document: Mapping[str, Any], name: str) -> datetime | None:
    text = _text_or_none(document, name)
    try:
        moment = None if text is None else datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if text is not None and (moment is None or moment.tzinfo is None):
        raise InvalidInput(f"not a node's report: {name} is {text!r:.40}, not a time with its zone")
    return moment


@dataclass(frozen=True, slots=True)
class Peer:
    """One peer, as this node sees it at one moment. Times in seconds of the caller's clock, which must never jump."""

    node_id: str
    url: str
    state: PeerState = PeerState.SUSPECT
    conflict: str | None = None
    """Why it cannot be used although it answered."""
    warning: str | None = None
    """What it should be told, although it can be used: that it places blocks otherwise than we do."""
    heard_at: float | None = None
    """When it last answered."""
    failures: int = 0
    """Polls that failed since the last answer."""
    failing_since: float | None = None
    counted_at: float | None = None
    """When the last failure that counts was asked for."""
    asked_at: float | None = None
    """When the latest news of it, good or bad, was asked for."""
    error: str | None = None
    """Of the last poll, if it failed."""
    report: NodeReport | None = None
    """Its last answer, also when it has failed since."""
    session_id: str = ""
    """The last engine session that it named; an answer without one does not clear it."""
    sessions: int = 0
    """Sessions seen so far. It grows when the peer restarts: addresses noted before are void then."""


class Membership:
    """The peers of one node, and the events that change what it thinks of them. Not thread-safe."""

    def __init__(self, peers: Mapping[str, str], *, model: str, namespace: str) -> None:
        """`peers` are URLs by node id; raises InvalidInput for bad names and for NODES_MAX peers or more."""
        if len(peers) >= NODES_MAX:
            raise InvalidInput(f"{len(peers)} peers: name at most {NODES_MAX - 1}")
        self._model = model
        self._namespace = namespace
        self._manifest_digest: str | None = None
        self._content_digest: str | None = None
        self._placement_digest: str | None = None
        self._known = {check_name("node", node_id): Peer(node_id, peers[node_id]) for node_id in sorted(peers)}
        self._last_event = 0.0

    def use_manifest(self, digest: str, placement_digest: str | None = None, content_digest: str | None = None) -> None:
        """This node's manifest from now on, how it places it, and which content it has: peers are compared with them.

        While the content is None it is not known yet, and no peer differs in it.
        """
        self._manifest_digest, self._placement_digest = digest, placement_digest
        self._content_digest = content_digest

    # -- events ----------------------------------------------------------------------------------------------

    def answered(self, node_id: str, report: NodeReport, *, asked_at: float, now: float) -> Peer:
        """What was asked of `node_id` at `asked_at` brought `report`; raises InvalidInput if there is no such peer."""
        before = self._get(node_id)
        if _is_stale(before, asked_at):
            return self.peer(node_id, now)
        after = replace(
            before, report=report, heard_at=now, asked_at=asked_at,
            failures=0, failing_since=None, counted_at=None, error=None,
        )  # fmt: skip
        if report.node_id == node_id and report.session_id not in ("", before.session_id):
            after = replace(after, session_id=report.session_id, sessions=before.sessions + 1)
        return self._note(after, now)

    def failed(self, node_id: str, error: str, *, asked_at: float, now: float) -> Peer:
        """What was asked of `node_id` at `asked_at` failed; raises InvalidInput if there is no such peer."""
        before = self._get(node_id)
        if _is_stale(before, asked_at):
            return self.peer(node_id, now)
        after = replace(before, asked_at=asked_at, error=error[:ERROR_CHARS_MAX])
        if before.counted_at is None or asked_at - before.counted_at >= FAILURE_SPACING_S:
            since = now if before.failing_since is None else before.failing_since
            after = replace(after, failures=before.failures + 1, failing_since=since, counted_at=asked_at)
        return self._note(after, now)

    def _note(self, peer: Peer, now: float) -> Peer:
        self._known[peer.node_id] = peer
        self._last_event = now
        return self.peer(peer.node_id)

    # -- what follows from them ------------------------------------------------------------------------------

    def peer(self, node_id: str, now: float | None = None) -> Peer:
        """One peer as of `now`, or as of the last event; raises InvalidInput if there is no such peer."""
        known, at = self._get(node_id), self._last_event if now is None else now
        conflict = self._conflict(known)
        warning = None if conflict else self._warning(known)
        return replace(known, state=_state(known, at), conflict=conflict, warning=warning)

    def peers(self, now: float | None = None) -> list[Peer]:
        """All of them as of `now`, or as of the last event, in order of node id."""
        return [self.peer(node_id, now) for node_id in self._known]

    def _get(self, node_id: str) -> Peer:
        if node_id not in self._known:
            raise InvalidInput(f"node {node_id!r} is not among the peers: {', '.join(self._known) or 'there are none'}")
        return self._known[node_id]

    def _conflict(self, peer: Peer) -> str | None:
        if (report := peer.report) is None:
            return None
        if report.node_id != peer.node_id:
            expected = peer.node_id
            return f"{peer.url} answers as node {report.node_id!r}, not {expected!r}: correct `--peer {expected}=URL`"
        if report.model != self._model:
            return f"model {report.model!r} differs from ours, {self._model!r}: give both nodes the same `--model`"
        if report.namespace != self._namespace:
            return (
                f"namespace {report.namespace!r} differs from ours, {self._namespace!r}: "
                "give both nodes the same `--namespace`"
            )
        if _differ(report.manifest_digest, self._manifest_digest):
            return (
                f"manifest digest {_shown(report.manifest_digest)} differs from ours, {_shown(self._manifest_digest)}: "
                "one of the two nodes was filled from another checkpoint"
            )
        if _differ(report.content_digest, self._content_digest):
            return (
                f"content {_shown(report.content_digest)} differs from ours, {_shown(self._content_digest)}: it keeps "
                "other weights under the same names, a fine-tune or an earlier release; nothing is shared with it"
            )
        return None

    def _warning(self, peer: Peer) -> str | None:
        if peer.report is None or not _differ(peer.report.placement_digest, self._placement_digest):
            return None
        return (
            f"places blocks otherwise than this node, with {peer.report.replicas} replicas: "
            "give all nodes the same `--replicas`, the same nodes, and one version"
        )


def _is_stale(peer: Peer, asked_at: float) -> bool:
    """Whether something newer is known than what was asked for then."""
    return peer.asked_at is not None and asked_at < peer.asked_at


def _state(peer: Peer, now: float) -> PeerState:
    if peer.failing_since is not None:
        given_up = peer.failures >= FAILURES_MAX or now - peer.failing_since >= UNREACHABLE_AFTER_S
        return PeerState.UNREACHABLE if given_up else PeerState.SUSPECT
    heard = peer.heard_at is not None and now - peer.heard_at < SUSPECT_AFTER_S
    return PeerState.ALIVE if heard else PeerState.SUSPECT


def _differ(theirs: str | None, ours: str | None) -> bool:
    """Whether both are known, and not alike."""
    return theirs is not None and ours is not None and theirs != ours


def _shown(digest: str | None) -> str:
    return f"{(digest or '')[:DIGEST_CHARS_SHOWN]}…"

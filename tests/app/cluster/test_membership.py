"""Membership: one test a state and event. States: Unheard, Alive, Silent, Suspect, Unreachable."""

from __future__ import annotations

from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.cluster.membership import (
    ERROR_CHARS_MAX,
    FAILURE_SPACING_S,
    FAILURES_MAX,
    REPORT_CHARS_MAX,
    SUSPECT_AFTER_S,
    UNREACHABLE_AFTER_S,
    Membership,
    NodeReport,
    PeerState,
)
from app.cluster.placement import NODES_MAX
from shm.errors import InvalidInput

DIGEST = "d1" * 32
OTHER_DIGEST = "e2" * 32
START = 1003.5  # a clock that does not begin at 0
PLACEMENT = "p1" * 16

CONTENT = "c1" * 16

THEIRS = NodeReport("b", "qwen", "prod", "ready", DIGEST, CONTENT, "10.0.0.2:15002", "1-7", 2, PLACEMENT)


def members_of(*node_ids: str) -> Membership:
    members = Membership(
        {node_id: f"http://host-{node_id}:8470" for node_id in node_ids}, model="qwen", namespace="prod"
    )
    members.use_manifest(DIGEST, PLACEMENT, CONTENT)
    return members


def heard_of(**changes: Any) -> NodeReport:
    return replace(THEIRS, **changes)


@pytest.fixture
def unheard() -> Membership:
    return members_of("b")


@pytest.fixture
def alive(unheard: Membership) -> Membership:
    unheard.answered("b", THEIRS, asked_at=START, now=START)
    return unheard


@pytest.fixture
def suspect(alive: Membership) -> Membership:
    alive.failed("b", "connection refused", asked_at=START + 1, now=START + 1)
    return alive


@pytest.fixture
def unreachable(alive: Membership) -> Membership:
    for i in range(FAILURES_MAX):
        alive.failed("b", f"connection refused, {i}", asked_at=START + 1 + i, now=START + 1 + i)
    return alive


def state(members: Membership, now: float) -> PeerState:
    return members.peer("b", now).state


# -- Unheard ---------------------------------------------------------------------------------------------------


def test_unheard_is_suspect(unheard: Membership) -> None:
    peer = unheard.peer("b", START)
    assert peer.state is PeerState.SUSPECT
    assert (peer.heard_at, peer.report, peer.conflict, peer.error, peer.sessions) == (None, None, None, None, 0)


def test_unheard_answered_is_alive(unheard: Membership) -> None:
    peer = unheard.answered("b", THEIRS, asked_at=START, now=START)
    assert peer.state is PeerState.ALIVE
    assert (peer.heard_at, peer.report, peer.session_id, peer.sessions) == (START, THEIRS, "10.0.0.2:15002", 1)


def test_unheard_failed_stays_suspect_and_says_why(unheard: Membership) -> None:
    peer = unheard.failed("b", "connection refused", asked_at=START, now=START)
    assert peer.state is PeerState.SUSPECT
    assert (peer.failures, peer.error, peer.heard_at) == (1, "connection refused", None)


def test_unheard_failed_often_is_unreachable(unheard: Membership) -> None:
    for i in range(FAILURES_MAX):
        unheard.failed("b", "timeout", asked_at=START + i, now=START + i)
    assert state(unheard, START + FAILURES_MAX) is PeerState.UNREACHABLE


def test_unheard_stays_suspect_however_long_nobody_polls(unheard: Membership) -> None:
    assert state(unheard, START + 99_999) is PeerState.SUSPECT


# -- Alive -----------------------------------------------------------------------------------------------------


def test_alive_answered_stays_alive_with_the_newer_report(alive: Membership) -> None:
    alive.answered("b", heard_of(revision="1-8"), asked_at=START + 1, now=START + 1)
    peer = alive.peer("b")
    assert peer.state is PeerState.ALIVE
    assert peer.heard_at == START + 1
    assert peer.report == heard_of(revision="1-8")


def test_alive_failed_is_suspect_and_keeps_what_it_said(alive: Membership) -> None:
    peer = alive.failed("b", "timeout", asked_at=START + 1, now=START + 1)
    assert peer.state is PeerState.SUSPECT
    assert peer.heard_at == START
    assert peer.report == THEIRS


def test_alive_silent_is_suspect_but_never_unreachable(alive: Membership) -> None:
    assert state(alive, START + SUSPECT_AFTER_S - 0.01) is PeerState.ALIVE
    assert state(alive, START + SUSPECT_AFTER_S) is PeerState.SUSPECT
    assert state(alive, START + 99_999) is PeerState.SUSPECT


# -- Silent ----------------------------------------------------------------------------------------------------


def test_silent_answered_is_alive(alive: Membership) -> None:
    alive.answered("b", THEIRS, asked_at=START + 333, now=START + 333)
    assert state(alive, START + 333) is PeerState.ALIVE


def test_silent_failed_is_suspect_and_not_given_up_at_once(alive: Membership) -> None:
    alive.failed("b", "timeout", asked_at=START + 333, now=START + 333)
    assert state(alive, START + 333) is PeerState.SUSPECT


# -- Suspect ---------------------------------------------------------------------------------------------------


def test_suspect_answered_is_alive_and_its_failures_are_forgotten(suspect: Membership) -> None:
    peer = suspect.answered("b", THEIRS, asked_at=START + 2, now=START + 2)
    assert peer.state is PeerState.ALIVE
    assert (peer.failures, peer.failing_since, peer.error) == (0, None, None)


def test_suspect_failed_is_unreachable_at_the_last_failure_allowed(suspect: Membership) -> None:
    for failure in range(2, FAILURES_MAX + 1):
        assert state(suspect, START + 2) is PeerState.SUSPECT
        suspect.failed("b", f"timeout {failure}", asked_at=START + failure, now=START + failure)
    assert state(suspect, START + FAILURES_MAX) is PeerState.UNREACHABLE
    assert suspect.peer("b").error == f"timeout {FAILURES_MAX}"


def test_suspect_for_long_is_unreachable_without_another_failure(suspect: Membership) -> None:
    assert state(suspect, START + 1 + UNREACHABLE_AFTER_S - 0.01) is PeerState.SUSPECT
    assert state(suspect, START + 1 + UNREACHABLE_AFTER_S) is PeerState.UNREACHABLE


def test_suspect_failures_count_only_in_a_row(suspect: Membership) -> None:
    for i in range(3 * FAILURES_MAX):
        suspect.answered("b", THEIRS, asked_at=START + 2 + i, now=START + 2 + i)
        suspect.failed("b", "timeout", asked_at=START + 2.5 + i, now=START + 2.5 + i)
        assert state(suspect, START + 2.5 + i) is PeerState.SUSPECT


# -- who asks, and when ----------------------------------------------------------------------------------------


def test_alive_failed_thrice_within_a_second_counts_once(alive: Membership) -> None:
    """A restore, a caretaker and the prober may all ask a peer that is just being restarted."""
    for i in range(3 * FAILURES_MAX):
        asked_at = START + 1 + i * FAILURE_SPACING_S / (3 * FAILURES_MAX)
        alive.failed("b", f"refused, {i}", asked_at=asked_at, now=asked_at)
    peer = alive.peer("b")
    assert (peer.state, peer.failures) == (PeerState.SUSPECT, 1)
    assert peer.error == f"refused, {3 * FAILURES_MAX - 1}", "the last one still says why"


def test_suspect_failed_counts_again_when_asked_later(suspect: Membership) -> None:
    asked_at = START + 1.01 + FAILURE_SPACING_S
    assert suspect.failed("b", "refused", asked_at=asked_at, now=asked_at).failures == 2


def test_alive_failed_of_before_its_answer_is_dropped(alive: Membership) -> None:
    alive.answered("b", heard_of(revision="1-8"), asked_at=START + 2, now=START + 2.1)
    peer = alive.failed("b", "timeout", asked_at=START + 1, now=START + 3)
    assert (peer.state, peer.failures, peer.error) == (PeerState.ALIVE, 0, None)


def test_alive_answered_of_before_its_answer_is_dropped(alive: Membership) -> None:
    alive.answered("b", heard_of(revision="1-8", session_id="10.0.0.2:15999"), asked_at=START + 2, now=START + 2.1)
    peer = alive.answered("b", THEIRS, asked_at=START + 1, now=START + 3)
    assert peer.report == heard_of(revision="1-8", session_id="10.0.0.2:15999")
    assert (peer.session_id, peer.sessions, peer.heard_at) == ("10.0.0.2:15999", 2, START + 2.1)


def test_suspect_answered_of_before_its_failure_is_dropped(suspect: Membership) -> None:
    peer = suspect.answered("b", THEIRS, asked_at=START + 0.5, now=START + 2)
    assert (peer.state, peer.failures) == (PeerState.SUSPECT, 1)


# -- Unreachable -----------------------------------------------------------------------------------------------


def test_unreachable_keeps_what_it_said(unreachable: Membership) -> None:
    assert state(unreachable, START + 2) is PeerState.UNREACHABLE
    assert unreachable.peer("b").report == THEIRS


def test_unreachable_answered_is_alive(unreachable: Membership) -> None:
    peer = unreachable.answered("b", THEIRS, asked_at=START + 3, now=START + 3)
    assert peer.state is PeerState.ALIVE
    assert peer.sessions == 1


def test_unreachable_answered_by_a_new_session_counts_it(unreachable: Membership) -> None:
    peer = unreachable.answered("b", heard_of(session_id="10.0.0.2:15999"), asked_at=START + 3, now=START + 3)
    assert (peer.session_id, peer.sessions) == ("10.0.0.2:15999", 2)


def test_unreachable_failed_stays_unreachable(unreachable: Membership) -> None:
    peer = unreachable.failed("b", "no route", asked_at=START + 33, now=START + 33)
    assert peer.state is PeerState.UNREACHABLE
    assert (peer.failures, peer.failing_since, peer.error) == (FAILURES_MAX + 1, START + 1, "no route")


def test_unreachable_stays_so_as_time_passes(unreachable: Membership) -> None:
    assert state(unreachable, START + 99_999) is PeerState.UNREACHABLE


# -- sessions --------------------------------------------------------------------------------------------------


def test_alive_answered_by_a_new_session_counts_it(alive: Membership) -> None:
    peer = alive.answered("b", heard_of(session_id="10.0.0.2:15999"), asked_at=START + 1, now=START + 1)
    assert (peer.session_id, peer.sessions) == ("10.0.0.2:15999", 2)


def test_alive_answered_by_the_same_session_counts_nothing(alive: Membership) -> None:
    assert alive.answered("b", THEIRS, asked_at=START + 1, now=START + 1).sessions == 1


def test_alive_answered_without_a_session_keeps_the_last_one(alive: Membership) -> None:
    peer = alive.answered("b", heard_of(session_id=""), asked_at=START + 1, now=START + 1)
    assert (peer.session_id, peer.sessions) == ("10.0.0.2:15002", 1)
    assert alive.answered("b", THEIRS, asked_at=START + 2, now=START + 2).sessions == 1


# -- conflicts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"node_id": "c"}, "http://host-b:8470 answers as node 'c', not 'b': correct `--peer b=URL`"),
        ({"node_id": "a"}, "http://host-b:8470 answers as node 'a', not 'b': correct `--peer b=URL`"),
        ({"model": "kimi"}, "model 'kimi' differs from ours, 'qwen': give both nodes the same `--model`"),
        ({"namespace": "dev"}, "namespace 'dev' differs from ours, 'prod': give both nodes the same `--namespace`"),
        ({"content_digest": "f3" * 16}, "content f3f3f3f3f3f3… differs from ours, c1c1c1c1c1c1…"),
        ({"manifest_digest": OTHER_DIGEST}, "manifest digest e2e2e2e2e2e2… differs from ours, d1d1d1d1d1d1…"),
    ],
)
def test_alive_answered_otherwise_stays_listed_with_the_reason(
    alive: Membership, changes: dict[str, str], says: str
) -> None:
    peer = alive.answered("b", heard_of(**changes), asked_at=START + 1, now=START + 1)
    assert alive.peers() == [peer]
    assert peer.state is PeerState.ALIVE
    assert says in (peer.conflict or "")


def test_a_conflict_ends_with_the_next_right_answer(alive: Membership) -> None:
    alive.answered("b", heard_of(model="kimi"), asked_at=START + 1, now=START + 1)
    assert alive.answered("b", THEIRS, asked_at=START + 2, now=START + 2).conflict is None


def test_a_conflict_stays_visible_while_the_peer_fails(alive: Membership) -> None:
    alive.answered("b", heard_of(model="kimi"), asked_at=START + 1, now=START + 1)
    assert "kimi" in (alive.failed("b", "timeout", asked_at=START + 2, now=START + 2).conflict or "")


def test_the_session_of_another_node_is_not_the_peers(alive: Membership) -> None:
    peer = alive.answered("b", heard_of(node_id="c", session_id="10.0.0.3:15003"), asked_at=START + 1, now=START + 1)
    assert (peer.session_id, peer.sessions) == ("10.0.0.2:15002", 1)


def test_a_peer_without_a_manifest_is_no_conflict(alive: Membership) -> None:
    assert alive.answered("b", heard_of(manifest_digest=None), asked_at=START + 1, now=START + 1).conflict is None


def test_a_conflict_follows_our_own_manifest() -> None:
    members = Membership({"b": "http://host-b:8470"}, model="qwen", namespace="prod")
    assert members.answered("b", THEIRS, asked_at=START, now=START).conflict is None
    members.use_manifest(OTHER_DIGEST)
    assert "differs from ours, e2e2" in (members.peer("b").conflict or "")
    members.use_manifest(DIGEST)
    assert members.peer("b").conflict is None


# -- placement -------------------------------------------------------------------------------------------------


def test_another_placement_is_warned_of_and_no_conflict(alive: Membership) -> None:
    assert alive.peer("b").warning is None
    peer = alive.answered("b", heard_of(placement_digest="p2", replicas=1), asked_at=START + 1, now=START + 1)
    assert "with 1 replicas: give all nodes the same `--replicas`" in (peer.warning or "")
    assert peer.conflict is None


@pytest.mark.parametrize("changes", [{"placement_digest": None}, {"model": "kimi", "placement_digest": "p2"}])
def test_placement_is_not_warned_of_before_it_is_known_or_beside_a_conflict(
    alive: Membership, changes: dict[str, Any]
) -> None:
    assert alive.answered("b", heard_of(**changes), asked_at=START + 1, now=START + 1).warning is None


# -- reports ---------------------------------------------------------------------------------------------------


def test_a_report_is_read_from_the_nodes_document() -> None:
    assert NodeReport.from_json({**asdict(THEIRS), "version": "9.9", "bytes": 3333}) == THEIRS
    proved = NodeReport.from_json({**asdict(THEIRS), "blocks_unproved": 3, "proved_oldest": "2033-03-03T03:03:03Z"})
    assert (proved.blocks_unproved, proved.proved_oldest) == (3, datetime(2033, 3, 3, 3, 3, 3, tzinfo=UTC))


def test_a_report_of_a_node_that_is_starting_has_no_manifest_yet() -> None:
    document = {"node_id": "b", "model": "qwen", "namespace": "prod", "state": "starting", "manifest_digest": None}
    assert NodeReport.from_json(document) == NodeReport("b", "qwen", "prod", "starting")


@pytest.mark.parametrize(
    "damage",
    [
        {"node_id": None},
        {"model": 7},
        {"namespace": ["prod"]},
        {"state": {}},
        {"manifest_digest": 7},
        {"session_id": 15002},
        {"revision": "7" * (REPORT_CHARS_MAX + 1)},
        {"replicas": "2"},
        {"replicas": True},
        {"placement_digest": b"p"},
        {"blocks_unproved": 3.3},
        {"proved_oldest": "yesterday"},
        {"proved_oldest": "2033-03-03T03:03:03"},
        {"proved_oldest": 3333},
    ],
)
def test_a_malformed_report_is_refused_by_the_name_of_its_field(damage: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=f"not a node's report: {next(iter(damage))} is "):
        NodeReport.from_json(asdict(THEIRS) | damage)


# -- several peers, and limits ---------------------------------------------------------------------------------


def test_peers_are_listed_in_order_of_name() -> None:
    assert [peer.node_id for peer in members_of("d", "b", "c").peers()] == ["b", "c", "d"]


def test_events_of_one_peer_leave_the_others_alone() -> None:
    members = members_of("b", "c")
    before = members.peer("c")
    members.answered("b", THEIRS, asked_at=START, now=START)
    members.failed("b", "timeout", asked_at=START, now=START)
    assert members.peer("c") == before


def test_without_a_time_peers_are_seen_as_of_the_last_event() -> None:
    members = members_of("b", "c")
    members.answered("b", THEIRS, asked_at=START, now=START)
    members.answered("c", heard_of(node_id="c"), asked_at=START + SUSPECT_AFTER_S, now=START + SUSPECT_AFTER_S)
    assert [peer.state for peer in members.peers()] == [PeerState.SUSPECT, PeerState.ALIVE]
    assert [peer.state for peer in members.peers(START + 1)] == [PeerState.ALIVE, PeerState.ALIVE]


def test_a_long_error_is_cut(unheard: Membership) -> None:
    assert len(unheard.failed("b", "x" * 3333, asked_at=START, now=START).error or "") == ERROR_CHARS_MAX


def test_an_unknown_node_is_refused(unheard: Membership) -> None:
    for event in (
        lambda: unheard.answered("z", THEIRS, asked_at=START, now=START),
        lambda: unheard.failed("z", "timeout", asked_at=START, now=START),
        lambda: unheard.peer("z"),
    ):
        with pytest.raises(InvalidInput, match="'z' is not among the peers: b"):
            event()


@pytest.mark.parametrize(
    ("node_ids", "says"), [([""], "node name"), ([f"n{i}" for i in range(NODES_MAX)], f"{NODES_MAX} peers")]
)
def test_peers_out_of_their_limits_are_refused(node_ids: list[str], says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        members_of(*node_ids)


@given(st.lists(st.sampled_from(["answered", "failed", "time"]), max_size=20))
def test_after_any_history_the_state_follows_the_last_events(events: list[str]) -> None:
    members, now, failing, silent_since = members_of("b"), START, [], None
    for event in events:
        now += 6
        if event == "answered":
            members.answered("b", THEIRS, asked_at=now, now=now)
            failing, silent_since = [], now
        elif event == "failed":
            members.failed("b", "timeout", asked_at=now, now=now)
            failing.append(now)
    if failing:
        given_up = len(failing) >= FAILURES_MAX or now - failing[0] >= UNREACHABLE_AFTER_S
        expected = PeerState.UNREACHABLE if given_up else PeerState.SUSPECT
    else:
        recent = silent_since is not None and now - silent_since < SUSPECT_AFTER_S
        expected = PeerState.ALIVE if recent else PeerState.SUSPECT
    assert state(members, now) is expected

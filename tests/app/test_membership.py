"""Membership: one test a state and event. States: Unheard, Alive, Silent, Suspect, Unreachable."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.membership import (
    ERROR_CHARS_MAX,
    FAILURES_MAX,
    SUSPECT_AFTER_S,
    UNREACHABLE_AFTER_S,
    Membership,
    NodeReport,
    PeerState,
)
from app.placement import NODES_MAX
from shm.errors import InvalidInput

DIGEST = "d1" * 32
OTHER_DIGEST = "e2" * 32
START = 1003.5  # a clock that does not begin at 0
URL = "http://host-b:8470"

OURS = NodeReport("a", "qwen", "prod", "ready", DIGEST, "10.0.0.1:15001", "1-7", 2, "p1")
THEIRS = replace(OURS, node_id="b", session_id="10.0.0.2:15002")


def heard_of(**changes: Any) -> NodeReport:
    return replace(THEIRS, **changes)


@pytest.fixture
def unheard() -> Membership:
    return Membership({"b": URL}, OURS)


@pytest.fixture
def alive(unheard: Membership) -> Membership:
    unheard.answered("b", THEIRS, START)
    return unheard


@pytest.fixture
def suspect(alive: Membership) -> Membership:
    alive.failed("b", "connection refused", START + 1)
    return alive


@pytest.fixture
def unreachable(alive: Membership) -> Membership:
    for i in range(FAILURES_MAX):
        alive.failed("b", f"connection refused, {i}", START + 1 + i / 100)
    return alive


def state(members: Membership, now: float) -> PeerState:
    return members.peer("b").state(now)


# -- Unheard ---------------------------------------------------------------------------------------------------


def test_unheard_is_suspect_and_no_source(unheard: Membership) -> None:
    assert state(unheard, START) is PeerState.SUSPECT
    assert unheard.peer("b").last_seen is None
    assert unheard.conflict("b") is None
    assert unheard.reachable(START) == unheard.sources(START) == ()


def test_unheard_answered_is_alive(unheard: Membership) -> None:
    peer = unheard.answered("b", THEIRS, START)
    assert peer.state(START) is PeerState.ALIVE
    assert (peer.last_seen, peer.report, peer.session_id, peer.sessions) == (START, THEIRS, "10.0.0.2:15002", 1)
    assert unheard.sources(START) == (peer,)


def test_unheard_failed_stays_suspect_and_says_why(unheard: Membership) -> None:
    peer = unheard.failed("b", "connection refused", START)
    assert peer.state(START) is PeerState.SUSPECT
    assert (peer.failures, peer.last_error, peer.last_seen) == (1, "connection refused", None)


def test_unheard_failed_often_is_unreachable(unheard: Membership) -> None:
    for _ in range(FAILURES_MAX):
        unheard.failed("b", "timeout", START)
    assert state(unheard, START) is PeerState.UNREACHABLE


def test_unheard_stays_suspect_however_long_nobody_polls(unheard: Membership) -> None:
    assert state(unheard, START + 99_999) is PeerState.SUSPECT


# -- Alive -----------------------------------------------------------------------------------------------------


def test_alive_answered_stays_alive_with_the_newer_report(alive: Membership) -> None:
    alive.answered("b", heard_of(revision="1-8"), START + 1)
    peer = alive.peer("b")
    assert peer.state(START + 1) is PeerState.ALIVE
    assert peer.last_seen == START + 1
    assert peer.report == heard_of(revision="1-8")


def test_alive_failed_is_suspect_and_still_a_source(alive: Membership) -> None:
    peer = alive.failed("b", "timeout", START + 1)
    assert peer.state(START + 1) is PeerState.SUSPECT
    assert peer.last_seen == START
    assert alive.sources(START + 1) == (peer,)


def test_alive_silent_is_suspect_but_never_unreachable(alive: Membership) -> None:
    assert state(alive, START + SUSPECT_AFTER_S - 0.01) is PeerState.ALIVE
    assert state(alive, START + SUSPECT_AFTER_S) is PeerState.SUSPECT
    assert state(alive, START + 99_999) is PeerState.SUSPECT


# -- Silent ----------------------------------------------------------------------------------------------------


def test_silent_answered_is_alive(alive: Membership) -> None:
    alive.answered("b", THEIRS, START + 333)
    assert state(alive, START + 333) is PeerState.ALIVE


def test_silent_failed_is_suspect_and_not_given_up_at_once(alive: Membership) -> None:
    alive.failed("b", "timeout", START + 333)
    assert state(alive, START + 333) is PeerState.SUSPECT


# -- Suspect ---------------------------------------------------------------------------------------------------


def test_suspect_answered_is_alive_and_its_failures_are_forgotten(suspect: Membership) -> None:
    peer = suspect.answered("b", THEIRS, START + 2)
    assert peer.state(START + 2) is PeerState.ALIVE
    assert (peer.failures, peer.failing_since, peer.last_error) == (0, None, None)


def test_suspect_failed_is_unreachable_at_the_last_failure_allowed(suspect: Membership) -> None:
    for failure in range(2, FAILURES_MAX + 1):
        assert state(suspect, START + 2) is PeerState.SUSPECT
        suspect.failed("b", f"timeout {failure}", START + 2)
    assert state(suspect, START + 2) is PeerState.UNREACHABLE
    assert suspect.peer("b").last_error == f"timeout {FAILURES_MAX}"


def test_suspect_for_long_is_unreachable_without_another_failure(suspect: Membership) -> None:
    assert state(suspect, START + 1 + UNREACHABLE_AFTER_S - 0.01) is PeerState.SUSPECT
    assert state(suspect, START + 1 + UNREACHABLE_AFTER_S) is PeerState.UNREACHABLE


def test_suspect_failures_count_only_in_a_row(suspect: Membership) -> None:
    for i in range(3 * FAILURES_MAX):
        suspect.answered("b", THEIRS, START + 2 + i)
        suspect.failed("b", "timeout", START + 2.5 + i)
        assert state(suspect, START + 2.5 + i) is PeerState.SUSPECT


# -- Unreachable -----------------------------------------------------------------------------------------------


def test_unreachable_is_no_source_but_keeps_what_it_said(unreachable: Membership) -> None:
    assert state(unreachable, START + 2) is PeerState.UNREACHABLE
    assert unreachable.reachable(START + 2) == unreachable.sources(START + 2) == ()
    assert unreachable.peer("b").report == THEIRS


def test_unreachable_answered_is_alive_and_a_source(unreachable: Membership) -> None:
    peer = unreachable.answered("b", THEIRS, START + 3)
    assert peer.state(START + 3) is PeerState.ALIVE
    assert unreachable.sources(START + 3) == (peer,)
    assert peer.sessions == 1


def test_unreachable_answered_by_a_new_session_counts_it(unreachable: Membership) -> None:
    peer = unreachable.answered("b", heard_of(session_id="10.0.0.2:15999"), START + 3)
    assert (peer.session_id, peer.sessions) == ("10.0.0.2:15999", 2)


def test_unreachable_failed_stays_unreachable(unreachable: Membership) -> None:
    peer = unreachable.failed("b", "no route", START + 3)
    assert peer.state(START + 3) is PeerState.UNREACHABLE
    assert (peer.failures, peer.failing_since, peer.last_error) == (FAILURES_MAX + 1, START + 1, "no route")


def test_unreachable_stays_so_as_time_passes(unreachable: Membership) -> None:
    assert state(unreachable, START + 99_999) is PeerState.UNREACHABLE


# -- sessions --------------------------------------------------------------------------------------------------


def test_alive_answered_by_a_new_session_counts_it(alive: Membership) -> None:
    peer = alive.answered("b", heard_of(session_id="10.0.0.2:15999"), START + 1)
    assert (peer.session_id, peer.sessions) == ("10.0.0.2:15999", 2)


def test_alive_answered_by_the_same_session_counts_nothing(alive: Membership) -> None:
    assert alive.answered("b", THEIRS, START + 1).sessions == 1


def test_a_peer_without_an_engine_yet_is_reachable_but_no_source(alive: Membership) -> None:
    peer = alive.answered("b", heard_of(session_id=None), START + 1)
    assert (peer.session_id, peer.sessions) == ("10.0.0.2:15002", 1)
    assert alive.reachable(START + 1) == (peer,)
    assert alive.sources(START + 1) == ()
    assert alive.answered("b", THEIRS, START + 2).sessions == 1


# -- conflicts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"node_id": "c"}, "http://host-b:8470 answers as node 'c', not 'b': correct `--peer b=URL`"),
        ({"node_id": "a"}, "http://host-b:8470 answers as node 'a', not 'b': correct `--peer b=URL`"),
        ({"model": "kimi"}, "model 'kimi' differs from ours, 'qwen': start both with the same `--model`"),
        ({"namespace": "dev"}, "namespace 'dev' differs from ours, 'prod': start both with the same `--namespace`"),
        ({"manifest_digest": OTHER_DIGEST}, "manifest digest e2e2e2e2e2e2… differs from ours, d1d1d1d1d1d1…"),
    ],
)
def test_alive_answered_otherwise_is_listed_with_the_reason_and_no_source(
    alive: Membership, changes: dict[str, str], says: str
) -> None:
    peer = alive.answered("b", heard_of(**changes), START + 1)
    assert alive.peers() == (peer,)
    assert peer.state(START + 1) is PeerState.ALIVE
    assert says in (alive.conflict("b") or "")
    assert alive.reachable(START + 1) == alive.sources(START + 1) == ()
    assert alive.manifests(START + 1) == {}


def test_a_conflict_ends_with_the_next_right_answer(alive: Membership) -> None:
    alive.answered("b", heard_of(model="kimi"), START + 1)
    peer = alive.answered("b", THEIRS, START + 2)
    assert alive.conflict("b") is None
    assert alive.sources(START + 2) == (peer,)


def test_a_conflict_stays_visible_while_the_peer_fails(alive: Membership) -> None:
    alive.answered("b", heard_of(model="kimi"), START + 1)
    alive.failed("b", "timeout", START + 2)
    assert "kimi" in (alive.conflict("b") or "")


def test_the_session_of_another_node_is_not_the_peers(alive: Membership) -> None:
    peer = alive.answered("b", heard_of(node_id="c", session_id="10.0.0.3:15003"), START + 1)
    assert (peer.session_id, peer.sessions) == ("10.0.0.2:15002", 1)


def test_a_peer_without_a_manifest_is_no_conflict_and_no_source(alive: Membership) -> None:
    peer = alive.answered("b", heard_of(manifest_digest=None), START + 1)
    assert alive.conflict("b") is None
    assert alive.reachable(START + 1) == (peer,)
    assert alive.sources(START + 1) == ()


def test_a_conflict_follows_our_own_manifest(alive: Membership) -> None:
    alive.ours = replace(OURS, manifest_digest=OTHER_DIGEST)
    assert "differs from ours, e2e2" in (alive.conflict("b") or "")
    alive.ours = replace(OURS, manifest_digest=None)
    assert alive.conflict("b") is None
    assert alive.sources(START) == ()


def test_peers_that_disagree_on_the_manifest_are_seen_by_a_node_that_has_none() -> None:
    members = Membership({"b": URL, "c": "http://c", "d": "http://d"}, replace(OURS, manifest_digest=None))
    for node_id, digest in (("b", DIGEST), ("c", OTHER_DIGEST), ("d", DIGEST)):
        members.answered(node_id, heard_of(node_id=node_id, manifest_digest=digest), START)
    assert members.manifests(START) == {DIGEST: ("b", "d"), OTHER_DIGEST: ("c",)}


# -- placement -------------------------------------------------------------------------------------------------


def test_another_number_of_replicas_is_warned_of_and_the_peer_stays_a_source(alive: Membership) -> None:
    peer = alive.answered("b", heard_of(replicas=1, placement_digest="p2"), START + 1)
    assert alive.placement_warning("b") == "places 1 replicas, we 2: give all nodes the same `--replicas`"
    assert alive.sources(START + 1) == (peer,)


def test_another_placement_is_warned_of(alive: Membership) -> None:
    assert alive.placement_warning("b") is None
    alive.answered("b", heard_of(placement_digest="p2"), START + 1)
    assert "`--peer`" in (alive.placement_warning("b") or "")


@pytest.mark.parametrize("changes", [{"placement_digest": None, "replicas": None}, {"model": "kimi", "replicas": 1}])
def test_placement_is_not_warned_of_before_it_is_known_or_beside_a_conflict(
    alive: Membership, changes: dict[str, Any]
) -> None:
    alive.answered("b", heard_of(**changes), START + 1)
    assert alive.placement_warning("b") is None


def test_placement_of_a_peer_never_heard_is_not_warned_of(unheard: Membership) -> None:
    assert unheard.placement_warning("b") is None


# -- several peers, and limits ---------------------------------------------------------------------------------


def test_alive_sources_come_before_suspect_ones_each_in_order_of_name() -> None:
    members = Membership({node_id: f"http://{node_id}" for node_id in "edcb"}, OURS)
    for node_id in "bcde":
        members.answered(node_id, heard_of(node_id=node_id), START)
    members.failed("b", "timeout", START + 1)
    assert [peer.node_id for peer in members.peers()] == ["b", "c", "d", "e"]
    assert [peer.node_id for peer in members.sources(START + 1)] == ["c", "d", "e", "b"]


def test_events_of_one_peer_leave_the_others_alone() -> None:
    members = Membership({"b": URL, "c": "http://c"}, OURS)
    before = members.peer("c")
    members.answered("b", THEIRS, START)
    members.failed("b", "timeout", START)
    assert members.peer("c") is before


def test_an_entry_for_the_node_itself_is_left_out() -> None:
    members = Membership({"a": "http://a", "b": URL}, OURS)
    assert [peer.node_id for peer in members.peers()] == ["b"]


def test_a_long_error_is_cut(unheard: Membership) -> None:
    assert len(unheard.failed("b", "x" * 3333, START).last_error or "") == ERROR_CHARS_MAX


def test_events_of_an_unknown_node_are_refused(unheard: Membership) -> None:
    for event in (
        lambda: unheard.answered("z", THEIRS, START),
        lambda: unheard.failed("z", "timeout", START),
        lambda: unheard.conflict("z"),
    ):
        with pytest.raises(InvalidInput, match="'z' is not a peer of a"):
            event()


@pytest.mark.parametrize(
    ("peers", "says"), [({"": URL}, "node name"), ({f"n{i}": URL for i in range(NODES_MAX)}, "256 peers")]
)
def test_peers_out_of_their_limits_are_refused(peers: dict[str, str], says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        Membership(peers, OURS)


@given(st.lists(st.sampled_from(["answered", "failed", "time"]), max_size=20))
def test_after_any_history_the_state_follows_the_last_events(events: list[str]) -> None:
    members, now, failing, silent_since = Membership({"b": URL}, OURS), START, [], None
    for event in events:
        now += 6
        if event == "answered":
            members.answered("b", THEIRS, now)
            failing, silent_since = [], now
        elif event == "failed":
            members.failed("b", "timeout", now)
            failing.append(now)
    if failing:
        given_up = len(failing) >= FAILURES_MAX or now - failing[0] >= UNREACHABLE_AFTER_S
        expected = PeerState.UNREACHABLE if given_up else PeerState.SUSPECT
    else:
        recent = silent_since is not None and now - silent_since < SUSPECT_AFTER_S
        expected = PeerState.ALIVE if recent else PeerState.SUSPECT
    assert state(members, now) is expected

"""A node's view of peers that come, go, disagree and lie, over real HTTP."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import orjson
import pytest

from app.cluster import prober as prober_module
from app.cluster.cluster import Cluster, Version
from app.cluster.membership import FAILURES_MAX, SUSPECT_AFTER_S, Membership, PeerState
from app.cluster.peers import PeerClient
from app.cluster.prober import PROBE_INTERVAL_S, Prober
from shm.errors import InvalidInput, ManifestError
from shm.manifest import Manifest
from tests.processes import DEADLINE_S, wait_until
from transfer.engine import MooncakeEngine

CHECKSUM = "0123456789abcdef" * 2
CONTENT = "c1" * 16
OTHER_CONTENT = "e2" * 16


class Script:
    """What a peer says; change it, and it says that from then on."""

    def __init__(self, peer: Any, node_id: str, manifest: Manifest | None) -> None:
        self.peer = peer
        self.url = peer.url
        self.manifest = manifest
        self.node = {
            "node_id": node_id, "model": "tiny", "namespace": "ns", "state": "ready", "session_id": f"{node_id}:1",
            "revision": "1", "replicas": 2, "manifest_digest": manifest.digest if manifest else None,
            "content_digest": CONTENT if manifest else None,
        }  # fmt: skip
        self.experts = [(0, 0), (1, 3)]
        peer.answers |= {
            "GET /v1/node": lambda: (200, orjson.dumps(self.node)),
            "GET /v1/manifest": self._manifest,
            "GET /v1/shard-map": lambda: (200, orjson.dumps(self._map())),
        }

    def _manifest(self) -> tuple[int, bytes]:
        return (200, orjson.dumps(self.manifest.to_json())) if self.manifest else (503, b"{}")

    def _map(self) -> dict[str, Any]:
        where = {"node_id": self.node["node_id"], "session_id": self.node["session_id"], "address": 3333}
        experts = [
            {"layer": layer, "expert": expert, "nbytes": 7, "checksum": CHECKSUM, "replicas": [where]}
            for layer, expert in self.experts
        ]
        return {
            "model": "tiny", "manifest_digest": self.node["manifest_digest"], "revision": self.node["revision"],
            "experts": experts, "dense": [],
        }  # fmt: skip

    def maps_asked(self) -> int:
        return int(self.peer.asked.count("GET /v1/shard-map"))


@pytest.fixture
def manifest(make_manifest: Callable[..., Manifest]) -> Manifest:
    return make_manifest()


@pytest.fixture
def peer(odd_peer: Callable[[], Any], manifest: Manifest) -> Script:
    return Script(odd_peer(), "p", manifest)


class Watch:
    """A view and the prober that feeds it, with a clock that goes on by a prober's interval before each look."""

    def __init__(self, urls: dict[str, str]) -> None:
        self.client = PeerClient()
        self.passed_s = 0.0
        membership = Membership(urls, model="tiny", namespace="ns")
        self.cluster = Cluster(membership, lambda: time.monotonic() + self.passed_s)
        self.prober = Prober(self.cluster, self.client)

    def look(self) -> None:
        self.passed_s += PROBE_INTERVAL_S
        self.prober.look()

    def close(self) -> None:
        self.prober.stop()
        self.client.close()


@pytest.fixture
def watch_of() -> Iterator[Callable[..., Watch]]:
    """`watch_of(script, …)` → a `Watch` over peers called p, q, r."""
    made: list[Watch] = []

    def make(*scripts: Script, names: str = "pqr") -> Watch:
        made.append(Watch({name: script.url for name, script in zip(names, scripts, strict=False)}))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_what_a_peer_published_is_known_after_one_look(
    watch_of: Callable[..., Watch], peer: Script, manifest: Manifest
) -> None:
    watch = watch_of(peer)
    cluster = watch.cluster
    cluster.use_manifest(manifest, "placed", CONTENT)
    watch.look()
    held = cluster.holdings()["p"]
    assert held.session_id == "p:1"
    assert held.blocks == {row: (3333, bytes.fromhex(CHECKSUM)) for row in (manifest.index(0, 0), manifest.index(1, 3))}
    assert cluster.peers()[0].state is PeerState.ALIVE
    assert cluster.url("p") == peer.url
    with pytest.raises(InvalidInput, match="among the peers: p"):
        cluster.url("x")


def test_nothing_of_a_peer_is_known_before_there_is_a_manifest(
    watch_of: Callable[..., Watch], peer: Script, manifest: Manifest
) -> None:
    watch = watch_of(peer)
    watch.look()
    assert watch.cluster.holdings() == {}
    assert watch.cluster.has_version()
    assert watch.prober.fetch_version() == (manifest, Version(manifest.digest, CONTENT))


def test_a_map_is_fetched_again_only_when_revision_or_session_changed(
    watch_of: Callable[..., Watch], peer: Script, manifest: Manifest
) -> None:
    watch = watch_of(peer)
    cluster = watch.cluster
    cluster.use_manifest(manifest, "placed", CONTENT)
    seen = []
    for change in ({}, {}, {"revision": "2"}, {}, {"session_id": "p:2"}, {}):
        peer.node |= change
        watch.look()
        seen.append(peer.maps_asked())
    assert seen == [1, 1, 2, 2, 3, 3]
    assert cluster.holdings()["p"].session_id == "p:2"


def test_the_revision_changes_with_what_is_held(
    watch_of: Callable[..., Watch], peer: Script, manifest: Manifest
) -> None:
    watch = watch_of(peer)
    cluster = watch.cluster
    cluster.use_manifest(manifest, "placed", CONTENT)
    seen = [cluster.revision()]
    watch.look()
    seen.append(cluster.revision())
    watch.look()
    assert cluster.revision() == seen[-1]
    peer.node["revision"] = "2"
    watch.look()
    seen.append(cluster.revision())
    assert len(set(seen)) == 3


@pytest.mark.parametrize(("ours", "theirs"), [(None, CONTENT), (CONTENT, None), (None, None)])
def test_while_either_content_is_unknown_nobody_is_a_replica(
    watch_of: Callable[..., Watch], peer: Script, manifest: Manifest, ours: str | None, theirs: str | None
) -> None:
    watch = watch_of(peer)
    watch.cluster.use_manifest(manifest, "placed", ours)
    peer.node["content_digest"] = theirs
    watch.look()
    assert watch.cluster.peers()[0].conflict is None
    assert watch.cluster.holdings() == {}


def test_one_missed_poll_takes_nothing_away_but_a_lost_peer_does(
    watch_of: Callable[..., Watch], peer: Script, manifest: Manifest
) -> None:
    watch = watch_of(peer)
    cluster = watch.cluster
    cluster.use_manifest(manifest, "placed", CONTENT)
    watch.look()
    peer.peer.close()
    for failures in range(1, FAILURES_MAX + 1):
        watch.look()
        is_lost = failures == FAILURES_MAX
        assert cluster.peers()[0].state is (PeerState.UNREACHABLE if is_lost else PeerState.SUSPECT)
        assert ("p" in cluster.holdings()) is not is_lost
    assert cluster.peers()[0].error


DAY_S = 86_400.0


@pytest.mark.parametrize("jump_s", [3 * DAY_S, -3 * DAY_S], ids=["forward", "back"])
def test_nobody_becomes_suspect_or_lost_when_the_hosts_date_is_set(
    watch_of: Callable[..., Watch],
    odd_peer: Callable[[], Any],
    manifest: Manifest,
    monkeypatch: pytest.MonkeyPatch,
    jump_s: float,
) -> None:
    alive, failing = Script(odd_peer(), "p", manifest), Script(odd_peer(), "q", manifest)
    watch = watch_of(alive, failing)
    cluster = watch.cluster
    cluster.use_manifest(manifest, "placed", CONTENT)
    watch.look()
    failing.peer.close()
    watch.look()

    def seen() -> list[PeerState]:
        return [peer.state for peer in cluster.peers()]

    assert seen() == [PeerState.ALIVE, PeerState.SUSPECT]
    set_clock(monkeypatch, "time", jump_s)
    assert seen() == [PeerState.ALIVE, PeerState.SUSPECT]
    assert list(cluster.holdings()) == ["p", "q"]
    watch.look()
    assert seen() == [PeerState.ALIVE, PeerState.SUSPECT]
    assert cluster.peers()[1].failures < FAILURES_MAX


def test_silence_is_still_noticed_whatever_the_hosts_date_says(
    watch_of: Callable[..., Watch], peer: Script, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = watch_of(peer)
    cluster = watch.cluster
    watch.look()
    set_clock(monkeypatch, "time", -3 * DAY_S)
    set_clock(monkeypatch, "monotonic", SUSPECT_AFTER_S)
    assert cluster.peers()[0].state is PeerState.SUSPECT


def test_when_a_peer_was_seen_is_told_as_a_date(watch_of: Callable[..., Watch], peer: Script) -> None:
    watch = watch_of(peer)
    cluster = watch.cluster
    assert cluster.last_seen("p") is None
    before = datetime.now(UTC)
    watch.look()
    seen = cluster.last_seen("p")
    assert seen is not None
    assert before <= seen <= datetime.now(UTC)
    peer.peer.close()
    watch.look()
    assert cluster.last_seen("p") == seen


def set_clock(monkeypatch: pytest.MonkeyPatch, name: str, offset_s: float) -> None:
    """From now on, `time.time` or `time.monotonic` says that much more."""
    real = getattr(time, name)
    monkeypatch.setattr(time, name, lambda: real() + offset_s)


def test_alive_peers_come_before_suspect_ones(
    watch_of: Callable[..., Watch], odd_peer: Callable[[], Any], manifest: Manifest
) -> None:
    first, second = Script(odd_peer(), "p", manifest), Script(odd_peer(), "q", manifest)
    watch = watch_of(first, second)
    cluster = watch.cluster
    cluster.use_manifest(manifest, "placed", CONTENT)
    watch.look()
    assert list(cluster.holdings()) == ["p", "q"]
    first.peer.close()
    watch.look()
    assert list(cluster.holdings()) == ["q", "p"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"manifest_digest": "3" * 64}, "manifest digest 333333333333"),
        ({"content_digest": OTHER_CONTENT}, f"content {OTHER_CONTENT[:12]}"),
        ({"model": "other"}, "model 'other'"),
        ({"namespace": "other"}, "namespace 'other'"),
        ({"node_id": "x"}, "answers as node 'x'"),
    ],
)
def test_a_peer_that_disagrees_is_listed_with_the_reason_and_is_no_source(
    watch_of: Callable[..., Watch], peer: Script, manifest: Manifest, change: dict[str, Any], said: str
) -> None:
    watch = watch_of(peer)
    cluster = watch.cluster
    cluster.use_manifest(manifest, "placed", CONTENT)
    watch.look()
    assert "p" in cluster.holdings()
    peer.node |= change
    watch.look()
    (seen,) = cluster.peers()
    assert seen.state is PeerState.ALIVE
    assert seen.conflict is not None
    assert said in seen.conflict
    assert cluster.holdings() == {}
    peer.node |= {"node_id": "p", "model": "tiny", "namespace": "ns", "manifest_digest": manifest.digest}
    peer.node["content_digest"] = CONTENT
    watch.look()
    assert "p" in cluster.holdings(), "as soon as it agrees again"


def test_the_manifest_comes_from_the_next_peer_if_one_cannot_give_it(
    watch_of: Callable[..., Watch], odd_peer: Callable[[], Any], manifest: Manifest
) -> None:
    broken, good = Script(odd_peer(), "p", manifest), Script(odd_peer(), "q", manifest)
    broken.manifest = None
    watch = watch_of(broken, good)
    assert not watch.cluster.has_version()
    assert watch.prober.fetch_version() is None
    watch.look()
    found = watch.prober.fetch_version()
    assert found is not None
    assert found[0] == manifest


# -- what an empty node is to have ---------------------------------------------------------------------------------


@pytest.fixture
def watch_three(
    watch_of: Callable[..., Watch], odd_peer: Callable[[], Any], manifest: Manifest
) -> Callable[..., tuple[Watch, list[Script]]]:
    """`watch_three(contents)` → a watch over as many peers, None for one that is down."""

    def make(*contents: str | None) -> tuple[Watch, list[Script]]:
        scripts = [Script(odd_peer(), name, manifest) for name in "pqr"[: len(contents)]]
        for script, content in zip(scripts, contents, strict=True):
            script.node["content_digest"] = content
            if content is None:
                script.peer.close()
        return watch_of(*scripts), scripts

    return make


def test_what_most_peers_have_is_taken_and_the_others_are_named(
    watch_three: Callable[..., tuple[Watch, list[Script]]], caplog: pytest.LogCaptureFixture
) -> None:
    watch, _ = watch_three(CONTENT, OTHER_CONTENT, CONTENT)
    watch.look()
    found = watch.prober.fetch_version()
    assert found is not None
    assert found[1].content_digest == CONTENT
    assert f"q: other weights than most (manifest {found[0].digest[:12]}… content {OTHER_CONTENT[:12]}…" in caplog.text


def test_one_that_answers_first_does_not_decide_while_others_may_still_answer(
    watch_three: Callable[..., tuple[Watch, list[Script]]],
) -> None:
    watch, scripts = watch_three(OTHER_CONTENT, None, None)
    for _ in range(FAILURES_MAX - 1):
        watch.look()
        assert watch.prober.fetch_version() is None
    watch.look()
    assert [peer.state for peer in watch.cluster.peers()][1:] == [PeerState.UNREACHABLE] * 2
    found = watch.prober.fetch_version()
    assert found is not None, "the others are given up: it is what there is"
    assert found[1].content_digest == OTHER_CONTENT
    assert found[0] == scripts[0].manifest


def test_a_tie_is_refused_with_who_has_what(watch_three: Callable[..., tuple[Watch, list[Script]]]) -> None:
    watch, _ = watch_three(CONTENT, OTHER_CONTENT)
    watch.look()
    with pytest.raises(ManifestError, match="peers disagree") as refused:
        watch.prober.fetch_version()
    assert f"content {CONTENT[:12]}…" in str(refused.value)
    assert f"content {OTHER_CONTENT[:12]}…" in str(refused.value)
    assert "--checkpoint" in str(refused.value)


def test_other_shapes_are_other_weights_too(
    watch_of: Callable[..., Watch], odd_peer: Callable[[], Any], make_manifest: Callable[..., Manifest]
) -> None:
    one, other = make_manifest(experts=5), make_manifest(experts=7)
    watch = watch_of(Script(odd_peer(), "p", one), Script(odd_peer(), "q", other), Script(odd_peer(), "r", other))
    watch.look()
    found = watch.prober.fetch_version()
    assert found is not None
    assert found[0] == other


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"node_id": 3}', b"{}"])
def test_a_peer_that_talks_nonsense_is_one_that_does_not_answer(
    watch_of: Callable[..., Watch], peer: Script, manifest: Manifest, body: bytes
) -> None:
    watch = watch_of(peer)
    cluster = watch.cluster
    peer.peer.answers["GET /v1/node"] = 200, body
    watch.look()
    (seen,) = cluster.peers()
    assert (seen.state, seen.heard_at) == (PeerState.SUSPECT, None)
    assert seen.error


def test_a_map_that_cannot_be_had_is_asked_for_again(
    watch_of: Callable[..., Watch], peer: Script, manifest: Manifest
) -> None:
    watch = watch_of(peer)
    cluster = watch.cluster
    cluster.use_manifest(manifest, "placed", CONTENT)
    good = peer.peer.answers["GET /v1/shard-map"]
    peer.peer.answers["GET /v1/shard-map"] = 500, b"{}"
    watch.look()
    assert cluster.holdings() == {}
    assert cluster.peers()[0].state is PeerState.ALIVE
    peer.peer.answers["GET /v1/shard-map"] = good
    watch.look()
    assert "p" in cluster.holdings()


def test_another_manifest_voids_what_was_known(
    watch_of: Callable[..., Watch], peer: Script, manifest: Manifest, make_manifest: Callable[..., Manifest]
) -> None:
    watch = watch_of(peer)
    cluster = watch.cluster
    cluster.use_manifest(manifest, "placed", CONTENT)
    watch.look()
    cluster.use_manifest(make_manifest(experts=7), "placed", CONTENT)
    assert cluster.holdings() == {}


def test_the_poller_looks_again_and_again_and_stops(
    watch_of: Callable[..., Watch], peer: Script, monkeypatch: pytest.MonkeyPatch, wait_until: Callable[..., Any]
) -> None:
    monkeypatch.setattr(prober_module, "PROBE_INTERVAL_S", 0.01)
    watch = watch_of(peer)
    watch.prober.start()
    wait_until(lambda: len(peer.peer.asked) > 3, "several polls")
    watch.prober.stop()
    assert not any(thread.name == "hotspare-prober" for thread in threading.enumerate())


def test_without_peers_nobody_polls(watch_of: Callable[..., Watch]) -> None:
    watch = watch_of()
    watch.prober.start()
    watch.look()
    assert not any(thread.name == "hotspare-prober" for thread in threading.enumerate())
    watch.prober.stop()


def test_three_parties_that_look_at_once_count_one_failure(watch_of: Callable[..., Watch], peer: Script) -> None:
    watch = watch_of(peer)
    watch.look()
    peer.peer.close()
    for _ in range(FAILURES_MAX):
        watch.prober.look()
    (seen,) = watch.cluster.peers()
    assert (seen.state, seen.failures) == (PeerState.SUSPECT, 1)


def test_a_peer_is_asked_by_one_party_at_a_time(
    watch_of: Callable[..., Watch], peer: Script, wait_until: Callable[..., Any]
) -> None:
    asked, may_answer = threading.Event(), threading.Event()

    def slowly() -> tuple[int, bytes]:
        asked.set()
        may_answer.wait(33)
        return 200, orjson.dumps(peer.node)

    peer.peer.answers["GET /v1/node"] = slowly
    watch = watch_of(peer)
    lookers = [threading.Thread(target=watch.prober.look) for _ in range(5)]
    for looker in lookers:
        looker.start()
    assert asked.wait(33)
    may_answer.set()
    for looker in lookers:
        looker.join(DEADLINE_S)
        assert not looker.is_alive()
    assert peer.peer.asked.count("GET /v1/node") == 1


def test_a_slow_peer_is_not_waited_for_longer_than_was_said(
    watch_of: Callable[..., Watch], odd_peer: Callable[[], Any], manifest: Manifest
) -> None:
    may_answer = threading.Event()
    slow, quick = Script(odd_peer(), "p", manifest), Script(odd_peer(), "q", manifest)
    slow.peer.answers["GET /v1/node"] = lambda: ((may_answer.wait(33) and 200) or 200, orjson.dumps(slow.node))
    watch = watch_of(slow, quick)
    watch.prober.look(0.05)  # returns at all: nobody has let the slow one answer
    try:
        while watch.cluster.peers()[1].state is not PeerState.ALIVE:
            watch.prober.look(0.05)
        assert watch.cluster.peers()[0].heard_at is None
    finally:
        may_answer.set()


def test_a_peer_that_brings_an_unforeseen_error_is_one_that_failed(
    watch_of: Callable[..., Watch], peer: Script, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    watch = watch_of(peer)
    monkeypatch.setattr(watch.client, "node", lambda url: [][3])
    watch.look()
    (seen,) = watch.cluster.peers()
    assert (seen.failures, seen.error) == (1, "IndexError: list index out of range")
    assert "unforeseen" in caplog.text


def test_who_has_not_answered_for_as_long_as_anybody_is_waited_for_is_not_waited_for_again(
    watch_of: Callable[..., Watch], peer: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resolver whose name server says nothing keeps a thread for as long as it likes."""
    watch, may_answer = watch_of(peer), threading.Event()
    monkeypatch.setattr(watch.client, "node", lambda url: may_answer.wait(DEADLINE_S) and peer.node)
    monkeypatch.setattr(prober_module, "LOOK_WAIT_S", 0.33)
    try:
        watch.prober.look(0.33)
        for _ in range(33):
            watch.prober.look(DEADLINE_S)  # whoever waited here would wait for the deadline
    finally:
        may_answer.set()


def test_where_the_system_has_no_more_threads_the_asking_goes_on_and_peers_are_asked_once_it_has(
    watch_of: Callable[..., Watch], peer: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A double of the refusal: the real limit, RLIMIT_NPROC, does not count for root."""

    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("hotspare-ask"):
            raise RuntimeError("can't start new thread")
        start(thread)

    watch = watch_of(peer)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        watch.prober.start()
        for _ in range(3):
            watch.look()
        assert peer.peer.asked.count("GET /v1/node") == 0
    wait_until(lambda: watch.look() or peer.peer.asked.count("GET /v1/node") > 0, "it is asked")
    assert watch.prober.loop.is_alive
    assert watch.prober.loop.failures == 0


def test_who_failed_the_last_time_is_not_waited_for_again_and_again(
    watch_of: Callable[..., Watch], peer: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer that drags its answers out cost each of 39 restores of a block two seconds."""
    watch, may_answer = watch_of(peer), threading.Event()
    peer.peer.answers["GET /v1/node"] = lambda: (503, b"{}")
    watch.look()
    monkeypatch.setattr(watch.client, "node", lambda url: may_answer.wait(DEADLINE_S) and peer.node)
    monkeypatch.setattr(prober_module, "LOOK_WAIT_S", 2 * DEADLINE_S)
    try:
        watch.prober.look(2 * DEADLINE_S)
        assert not watch.prober._under_way["p"][0].done()
    finally:
        may_answer.set()
    peer.peer.answers["GET /v1/node"] = lambda: (200, orjson.dumps(peer.node))
    monkeypatch.undo()
    wait_until(lambda: watch.look() or watch.cluster.peers()[0].state is PeerState.ALIVE, "it is back")


def test_a_url_that_can_lead_nowhere_is_a_peer_that_does_not_answer(
    watch_of: Callable[..., Watch], peer: Script, caplog: pytest.LogCaptureFixture
) -> None:
    peer.url = "http://b..c:8470"
    watch = watch_of(peer)
    watch.look()
    (seen,) = watch.cluster.peers()
    assert seen.failures == 1
    assert "b..c" in (seen.error or "")
    assert "unforeseen" not in caplog.text


def test_a_peer_whose_memory_cannot_be_connected_to_is_told_until_it_can(
    watch_of: Callable[..., Watch], peer: Script, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(prober_module, "CONNECT_INTERVAL_S", 0.0)
    watch = watch_of(peer)

    def warning() -> str:
        watch.look()
        return watch.cluster.peers()[0].warning or ""

    with socket.create_server(("127.0.0.1", 0)) as closed:
        peer.node["session_id"] = f"127.0.0.1:{closed.getsockname()[1]}"
    wait_until(lambda: "cannot be read from here: port" in warning(), "that nothing listens there")
    assert "answers, but its memory cannot be read from here" in caplog.text
    engine = MooncakeEngine("127.0.0.1")
    peer.node["session_id"] = engine.session_id
    wait_until(lambda: not warning(), "that an engine does")

"""The store of restores, of a real node; other nodes are scripted, since they have to fail in odd ways."""

from __future__ import annotations

import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import pytest

from app.documents import EXPERTS_MAX, ExpertRef, FailedExpert, RestoreDocument, RestoreRequest, RestoreTarget
from app.errors import Conflict, LimitReached, NotFound, PeerFailed, Unavailable
from app.node.node import Node
from app.restores import store as restores_module
from app.restores.store import ALL_KINDS, LocalRestore, RestoreStore
from app.restores.worker import QUEUED_MAX
from shm.block import ExpertKey
from shm.errors import InvalidInput
from tests.processes import DEADLINE_S, wait_until
from transfer.client.http import ANSWER_TIMEOUT_S
from transfer.progress import RestoreState

REQUEST = RestoreRequest(target=RestoreTarget(node_id="n"))
AT_P = RestoreRequest(target=RestoreTarget(node_id="p"))


class Brake:
    """Holds a node's planning up until it is let go."""

    def __init__(self, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
        self.planning = threading.Semaphore(0)
        self._go = threading.Event()
        plan = node.plan_restore

        def held(*arguments: Any) -> Any:
            self.planning.release()
            assert self._go.wait(30)
            return plan(*arguments)

        monkeypatch.setattr(node, "plan_restore", held)

    def wait(self) -> None:
        """Until one more restore is being planned."""
        assert self.planning.acquire(timeout=DEADLINE_S)

    def release(self) -> None:
        self._go.set()


@pytest.fixture
def live(live_node: Callable[..., Any], moe_checkpoint: Path) -> Any:
    return live_node(checkpoint=moe_checkpoint)


@pytest.fixture
def store(live: Any) -> RestoreStore:
    found: RestoreStore = live.context.restores
    return found


@pytest.fixture
def brake(live: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Brake]:
    made = Brake(live.context.node, monkeypatch)
    yield made
    made.release()


def ended(store: RestoreStore, restore_id: str) -> RestoreDocument:
    restore = store.get(restore_id)
    assert isinstance(restore, LocalRestore)
    assert restore.finished.wait(30)
    return restore.document()


# -- here ------------------------------------------------------------------------------------------------------


def test_a_restore_fills_the_node_from_disk(store: RestoreStore, live: Any) -> None:
    done = ended(store, store.submit(REQUEST).id)
    assert (done.state, done.blocks_done, done.failed_total) == ("succeeded", 39, 0)
    assert done.bytes_by_source == {"local": 0, "peer": 0, "disk": done.bytes_total}
    assert live.context.node.checks() == dict.fromkeys(
        ("manifest", "published", "sealed", "registered", "attachable"), True
    )


def test_one_cancelled_while_it_is_planned_stays_cancelled_and_moves_nothing(
    store: RestoreStore, live: Any, brake: Brake
) -> None:
    restore_id = store.submit(REQUEST).id
    brake.wait()
    store.get(restore_id).cancel()
    assert store.get(restore_id).document().state == "cancelled"
    brake.release()
    done = ended(store, restore_id)
    assert (done.state, done.blocks_done, done.started_at) == ("cancelled", 0, None)
    assert len(live.context.node.published()) == 0


def test_one_cancelled_while_it_waits_is_never_planned(store: RestoreStore, brake: Brake) -> None:
    first, second = store.submit(REQUEST).id, store.submit(REQUEST).id
    brake.wait()
    store.get(second).cancel()
    brake.release()
    assert (ended(store, first).state, ended(store, second).state) == ("succeeded", "cancelled")
    assert not brake.planning.acquire(blocking=False)


def test_events_tell_each_change_and_stop_at_the_end(live: Any, store: RestoreStore, brake: Brake) -> None:
    restore_id = store.submit(REQUEST).id
    brake.wait()
    with live.http.stream("GET", f"/v1/restores/{restore_id}/events") as answer:
        lines = (line for line in answer.iter_lines() if line.startswith("data: "))
        first = RestoreDocument.model_validate_json(next(lines).removeprefix("data: "))
        brake.release()
        rest = [RestoreDocument.model_validate_json(line.removeprefix("data: ")) for line in lines]
    assert (first.state, first.blocks_total) == ("pending", 0)
    assert rest[-1] == ended(store, restore_id)
    assert (rest[-1].state, rest[-1].blocks_done) == ("succeeded", 39)


def test_blocks_found_wrong_one_after_the_other_are_mended_together(
    store: RestoreStore, live: Any, brake: Brake
) -> None:
    """A scrubber that found 39 of them had each wait for all peers: what somebody asked for then waited for minutes."""
    first = store.submit(REQUEST).id
    brake.wait()
    keys = [ExpertKey(layer, expert) for layer in (3, 4) for expert in range(5)]
    for key in keys:
        store.mend([key])
    brake.release()
    ended(store, first)
    (mending,) = [each for each in store.all() if each.id != first]
    assert isinstance(mending, LocalRestore)
    assert ended(store, mending.id).blocks_total == len(keys)
    store.mend(keys[:1])
    wait_until(lambda: len(store.all()) == 3, "what is found later is a restore of its own")


def test_cancelling_one_that_is_over_changes_nothing(store: RestoreStore) -> None:
    done = ended(store, store.submit(REQUEST).id)
    store.get(done.id).cancel()
    assert store.get(done.id).document() == done


def test_more_than_the_queue_holds_is_refused(live: Any, store: RestoreStore, brake: Brake) -> None:
    store.submit(REQUEST)
    brake.wait()
    for _ in range(QUEUED_MAX):
        store.submit(REQUEST)
    with pytest.raises(LimitReached):
        store.submit(REQUEST)
    answer = live.ask("POST", "/v1/restores", json={"target": {"node_id": "n"}})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "5")
    for restore in store.all():
        restore.cancel()


def test_stopping_ends_what_waits_and_what_runs_and_takes_no_more(store: RestoreStore, brake: Brake) -> None:
    ids = [store.submit(REQUEST).id for _ in range(3)]
    brake.wait()
    stopper = threading.Thread(target=store.stop)
    stopper.start()
    wait_until(lambda: {store.get(each).document().state for each in ids} == {RestoreState.CANCELLED}, "cancelled")
    with pytest.raises(Unavailable, match="stopping"):
        store.start_local(None, ALL_KINDS)
    brake.release()
    stopper.join(DEADLINE_S)
    assert not stopper.is_alive()
    assert all(ended(store, each).state == "cancelled" for each in ids)


def test_what_cannot_be_planned_fails_with_the_reason(
    store: RestoreStore, live: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error, said in ((InvalidInput("the disk is on fire"), "the disk is on fire"), (KeyError("x"), "KeyError: 'x'")):

        def broken(*_: Any, error: Exception = error) -> Any:
            raise error

        monkeypatch.setattr(live.context.node, "plan_restore", broken)
        done = ended(store, store.submit(REQUEST).id)
        assert (done.state, done.error) == ("failed", said)
    monkeypatch.undo()
    assert ended(store, store.submit(REQUEST).id).state == "succeeded", "the worker lives on"


def test_a_node_without_a_manifest_says_why_it_cannot(live_node: Callable[..., Any]) -> None:
    store = live_node().context.restores
    done = ended(store, store.submit(REQUEST).id)
    assert done.state == "failed"
    assert done.error is not None
    assert "no manifest" in done.error
    assert "--checkpoint" in done.error


def test_a_restore_that_is_over_keeps_no_memory_of_a_segment_that_is_given_up(store: RestoreStore, live: Any) -> None:
    node = live.context.node
    done = ended(store, store.submit(REQUEST).id)
    assert mapped(node) == {node.name.object_name}
    node.start_over(node.holding.disk)
    assert mapped(node) == {node.name.object_name}, "the new one; the old one would be held twice over"
    assert store.get(done.id).document() == done


def mapped(node: Node) -> set[str]:
    """Shared-memory objects of the node's name that this process has mapped, given up or not."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.partition("/dev/shm/")[2] for line in lines if node.name.object_name in line}


# -- keys and memory -------------------------------------------------------------------------------------------


def test_two_at_once_with_one_key_are_one_restore(store: RestoreStore) -> None:
    barrier = threading.Barrier(8)
    ids = []

    def submit() -> None:
        barrier.wait()
        ids.append(store.submit(REQUEST, "once").id)

    threads = [threading.Thread(target=submit) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(ids) == {store.all()[0].id: 8}
    with pytest.raises(Conflict):
        store.submit(RestoreRequest(target=RestoreTarget(node_id="n"), sources=["disk"]), "once")


def test_the_oldest_that_are_over_are_forgotten_with_their_keys_but_not_their_bytes(
    store: RestoreStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restores_module, "KEPT_MAX", 3)
    first = ended(store, store.submit(REQUEST, "first").id)
    for _ in range(3):
        ended(store, store.submit(REQUEST).id)
    with pytest.raises(NotFound, match="ask the node"):
        store.get(first.id)
    assert len(store.documents()) == 3
    assert store.bytes_by_source() == {"local": 3 * first.bytes_done, "peer": 0, "disk": first.bytes_done}
    again = store.submit(REQUEST, "first")
    assert again.id != first.id
    ended(store, again.id)


def test_one_that_runs_is_not_forgotten(store: RestoreStore, brake: Brake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restores_module, "KEPT_MAX", 2)
    running = store.submit(REQUEST).id
    brake.wait()
    waiting = store.start_local(None, ALL_KINDS)
    waiting.cancel()
    store.submit(REQUEST)
    assert store.get(running).document().state == "pending"
    with pytest.raises(NotFound):
        store.get(waiting.id)


def test_a_list_shows_newest_first_and_few_of_many_failures(
    live_node: Callable[..., Any], moe_checkpoint: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "copy"
    directory.mkdir()
    for file in moe_checkpoint.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    live = live_node(checkpoint=directory)
    for file in directory.glob("*.safetensors"):
        file.unlink()
    store = live.context.restores
    documents = [ended(store, store.submit(REQUEST).id) for _ in range(2)]
    assert [len(d.failed) for d in documents] == [39, 39]
    assert "cannot be opened" in documents[0].failed[0].reason
    listed = live.ask("GET", "/v1/restores").json()["restores"]
    assert [each["id"] for each in listed] == [documents[1].id, documents[0].id]
    assert [(len(each["failed"]), each["failed_total"]) for each in listed] == [(10, 39), (10, 39)]


def test_requests_that_name_all_that_can_be_named_are_remembered_in_little_memory(
    live_node: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 60 such with a key each, 4.4 GB were kept."""
    live = live_node()
    store, brake = live.context.restores, Brake(live.context.node, monkeypatch)
    named = [ExpertRef(layer=3, expert=number) for number in range(EXPERTS_MAX)]
    request = RestoreRequest(target=RestoreTarget(node_id="n"), experts=named)
    store.submit(request, "first")
    brake.wait()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(5):
            store.submit(request, f"again {number}")
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
        brake.release()
    assert grown < 5 * (2 << 20)
    for restore in store.all():
        restore.cancel()
    assert all(ended(store, restore.id).state in ("cancelled", "failed") for restore in store.all())
    assert all(restore.wanted is None for restore in store.all())


# -- on other nodes --------------------------------------------------------------------------------------------


def document(state: str = "running", restore_id: str = "r33", **changed: Any) -> bytes:
    made = RestoreDocument(
        id=restore_id, target=RestoreTarget(node_id="p"), state=RestoreState(state), blocks_total=7, blocks_done=3,
        bytes_total=70, bytes_done=30, bytes_by_source={"local": 0, "peer": 30, "disk": 0},  # type: ignore[dict-item]
        failed=[FailedExpert(layer=3, expert=1, reason="x")] * 33, failed_total=33, error=None,
        created_at=datetime.now(UTC), started_at=datetime.now(UTC), finished_at=None,
    )  # fmt: skip
    return made.model_copy(update=changed).model_dump_json().encode()


@pytest.fixture
def peer(odd_peer: Callable[[], Any]) -> Any:
    made = odd_peer()
    made.answers["POST /v1/restores"] = 202, document("pending")
    made.answers["GET /v1/restores/r33"] = 200, document()
    return made


@pytest.fixture
def asking(live_node: Callable[..., Any], peer: Any) -> RestoreStore:
    found: RestoreStore = live_node(peers={"p": peer.url}).context.restores
    return found


def test_the_nodes_own_word_is_passed_on(asking: RestoreStore, peer: Any) -> None:
    started = asking.submit(AT_P, "key33")
    assert started.state == "running"
    assert "POST /v1/restores" in peer.asked
    assert "key33" in [headers.get("idempotency-key") for headers in peer.headers]
    peer.answers["GET /v1/restores/r33"] = 200, document("succeeded", blocks_done=7)
    done = asking.get("r33").document()
    assert (done.state, done.blocks_done) == ("succeeded", 7)
    asked = peer.asked.count("GET /v1/restores/r33")
    assert asking.get("r33").document() == done
    assert peer.asked.count("GET /v1/restores/r33") == asked, "what is over is not asked for again"


class Slow:
    """Has a peer keep its answer to the first POST back until it is let go. Each POST makes another restore."""

    def __init__(self, peer: Any) -> None:
        self.asked, self.go = threading.Event(), threading.Event()
        self.made: list[str] = []
        self.hold_s = 30.0
        peer.answers["POST /v1/restores"] = self._start

    def _start(self) -> tuple[int, bytes]:
        self.made.append(made := f"r{len(self.made)}")
        self.asked.set()
        if made == "r0":
            self.go.wait(self.hold_s)
        return 202, document("succeeded", restore_id=made)


@pytest.fixture
def slow(peer: Any) -> Iterator[Slow]:
    made = Slow(peer)
    yield made
    made.go.set()


@pytest.fixture
def post(live_node: Callable[..., Any], peer: Any) -> Callable[[str], Any]:
    """`post(key)` → what the node answers that is asked for a restore on the slow one."""
    live = live_node(peers={"p": peer.url})
    body = {"target": {"node_id": "p"}}
    return lambda key: live.ask("POST", "/v1/restores", json=body, headers={"Idempotency-Key": key})


def test_a_request_waits_for_none_with_another_key(post: Callable[[str], Any], slow: Slow) -> None:
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, "first")
        assert slow.asked.wait(30)
        second = post("second")
        assert (second.status_code, second.json()["id"]) == (202, "r1")
        assert not first.done(), "its node has not answered"
        slow.go.set()
        assert first.result().json()["id"] == "r0"


def test_two_at_once_with_one_key_ask_a_slow_node_once(post: Callable[[str], Any], slow: Slow) -> None:
    slow.hold_s = 0.5  # for a second one to come, which must not
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(post, ["once"] * 3))
    assert [(answer.status_code, answer.json()["id"]) for answer in answers] == [(202, "r0")] * 3
    assert slow.made == ["r0"]


def test_a_request_waits_for_one_with_its_key_for_a_limited_time(
    post: Callable[[str], Any], slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restores_module, "KEY_WAIT_S", 0.05)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, "once")
        assert slow.asked.wait(30)
        refused = post("once")
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        assert "'once' is under way" in refused.json()["detail"]
        slow.go.set()
        assert first.result().json()["id"] == post("once").json()["id"] == "r0"


def test_a_key_whose_request_was_refused_can_be_used_again(post: Callable[[str], Any], peer: Any) -> None:
    peer.answers["POST /v1/restores"] = 503, b"{}"
    assert post("once").status_code == 503
    peer.answers["POST /v1/restores"] = 202, document("succeeded")
    assert post("once").json()["id"] == "r33"


@pytest.mark.parametrize(
    ("status", "error"),
    [(404, NotFound), (409, Conflict), (422, InvalidInput), (429, LimitReached), (503, Unavailable),
     (401, PeerFailed), (500, PeerFailed)],
)  # fmt: skip
def test_the_nodes_refusal_is_ours(asking: RestoreStore, peer: Any, status: int, error: type[Exception]) -> None:
    peer.answers["POST /v1/restores"] = status, orjson.dumps({"detail": "in its own words"})
    with pytest.raises(error, match="in its own words"):
        asking.submit(AT_P)
    assert asking.all() == []


def test_an_answer_that_is_no_restore_is_a_failure_of_the_peer(asking: RestoreStore, peer: Any) -> None:
    peer.answers["POST /v1/restores"] = 202, b'{"id": 3}'
    with pytest.raises(PeerFailed, match=r"does not answer like a Hotspare node \(id: .*another version\?$") as failed:
        asking.submit(AT_P)
    assert "\n" not in str(failed.value)


@pytest.mark.parametrize(
    "changed",
    [{"created_at": datetime(2026, 1, 1)}, {"restore_id": "a b"}, {"restore_id": "r\n33"}, {"restore_id": "x" * 65}],
    ids=str,
)
def test_what_would_break_our_own_answers_is_not_taken_from_a_peer(
    asking: RestoreStore, peer: Any, changed: dict[str, Any]
) -> None:
    if "created_at" in changed:
        peer.answers["POST /v1/restores"] = 202, document(**changed)
    else:
        peer.answers["POST /v1/restores"] = 202, document().replace(b"r33", orjson.dumps(changed["restore_id"])[1:-1])
    with pytest.raises(PeerFailed, match="does not answer like a Hotspare node"):
        asking.submit(AT_P)
    assert asking.documents() == []


def test_a_peer_cannot_take_the_place_of_a_restore_of_ours(asking: RestoreStore, peer: Any) -> None:
    ours = asking.start_local(None, ALL_KINDS)
    peer.answers["POST /v1/restores"] = 202, document(restore_id=ours.id)
    with pytest.raises(PeerFailed, match="another's already"):
        asking.submit(AT_P)
    assert asking.get(ours.id) is ours


def test_a_peer_that_answers_with_another_restore_has_no_news(asking: RestoreStore, peer: Any) -> None:
    asking.submit(AT_P)
    peer.answers["GET /v1/restores/r33"] = 200, document("succeeded", restore_id="r34")
    last = asking.get("r33").document()
    assert (last.state, "answers with restore 'r34'" in (last.error or "")) == ("running", True)


def test_a_list_of_restores_of_twelve_silent_nodes_waits_for_all_as_for_one(
    live_node: Callable[..., Any], odd_peer: Callable[[], Any]
) -> None:
    peers = {f"p{number}": odd_peer() for number in range(12)}
    store = live_node(peers={name: peer.url for name, peer in peers.items()}).context.restores
    go = threading.Event()

    def wait() -> tuple[int, bytes]:
        go.wait(DEADLINE_S)
        return 200, b"{}"

    for name, peer in peers.items():
        peer.answers["POST /v1/restores"] = 202, document(restore_id=f"r-{name}")
        peer.answers[f"GET /v1/restores/r-{name}"] = 200, document(restore_id=f"r-{name}")
        store.submit(RestoreRequest(target=RestoreTarget(node_id=name)))
        peer.answers = {"*": wait}
    started = time.monotonic()
    listed = store.documents()
    took_s = time.monotonic() - started
    go.set()
    assert [each.state for each in listed] == ["running"] * 12
    assert took_s < 12 * ANSWER_TIMEOUT_S / 2, "three seconds on a machine that has nothing else to do; in turns, 24"


def test_a_node_that_is_not_there_makes_it_unavailable(asking: RestoreStore, peer: Any) -> None:
    peer.close()
    with pytest.raises(Unavailable, match="node p does not answer"):
        asking.submit(AT_P)


def test_nothing_is_sent_to_an_address_that_answers_as_another_node(
    asking: RestoreStore, peer: Any, live_node: Callable[..., Any]
) -> None:
    """It would send it on; if that is us, without end."""
    report = {"node_id": "n", "model": "moe", "namespace": "x", "state": "ready"}
    peer.answers["GET /v1/node"] = 200, orjson.dumps(report)
    asking._node.look()
    with pytest.raises(Unavailable, match="answers as node 'n'"):
        asking.submit(AT_P)
    assert "POST /v1/restores" not in peer.asked


def test_without_news_the_last_word_stands_and_says_so(asking: RestoreStore, peer: Any) -> None:
    asking.submit(AT_P)
    for answer in ((500, b"{}"), (200, b"{}"), (200, b"<html>")):
        peer.answers["GET /v1/restores/r33"] = answer
        last = asking.get("r33").document()
        assert (last.state, last.blocks_done) == ("running", 3)
        assert last.error is not None
        assert "does not answer now" in last.error
    peer.close()
    assert asking.get("r33").document().state == "running"


def test_one_that_its_node_no_longer_knows_has_failed(asking: RestoreStore, peer: Any) -> None:
    asking.submit(AT_P)
    peer.answers["GET /v1/restores/r33"] = 404, b"{}"
    lost = asking.get("r33").document()
    assert (lost.state, lost.error) == ("failed", "its node knows it no longer: it was restarted meanwhile")


def test_a_list_has_news_of_the_others_of_a_node_that_knows_one_no_longer(asking: RestoreStore, peer: Any) -> None:
    """It was restarted: its later restores were listed as pending for ever, whatever became of them."""
    for name in ("r1", "r2"):
        peer.answers["POST /v1/restores"] = 202, document("pending", restore_id=name)
        peer.answers[f"GET /v1/restores/{name}"] = 200, document("pending", restore_id=name)
        asking.submit(AT_P)
    peer.answers["GET /v1/restores/r1"] = 404, b"{}"
    peer.answers["GET /v1/restores/r2"] = 200, document("succeeded", restore_id="r2")
    for _ in range(2):
        assert {each.id: each.state for each in asking.documents()} == {"r1": "failed", "r2": "succeeded"}


def test_cancelling_is_passed_on(asking: RestoreStore, peer: Any) -> None:
    asking.submit(AT_P)
    peer.answers["POST /v1/restores/r33/cancel"] = 409, b"{}"
    with pytest.raises(PeerFailed):
        asking.get("r33").cancel()
    peer.answers["POST /v1/restores/r33/cancel"] = 200, document("cancelled")
    asking.get("r33").cancel()
    assert asking.get("r33").document().state == "cancelled"


def test_cancelling_at_a_node_that_is_gone_is_unavailable(asking: RestoreStore, peer: Any) -> None:
    asking.submit(AT_P)
    peer.close()
    with pytest.raises(Unavailable):
        asking.get("r33").cancel()


def test_a_list_asks_a_silent_node_once(asking: RestoreStore, peer: Any) -> None:
    for number in range(5):
        peer.answers["POST /v1/restores"] = 202, document(restore_id=f"r{number}")
        peer.answers[f"GET /v1/restores/r{number}"] = 200, document(restore_id=f"r{number}")
        asking.submit(AT_P)
    peer.answers = {"*": (500, b"{}")}
    before = sum("/v1/restores/" in asked for asked in peer.asked)
    assert len(asking.documents()) == 5
    assert sum("/v1/restores/" in asked for asked in peer.asked) == before + 1


def test_restores_of_nodes_that_never_answer_are_not_kept_for_ever(
    asking: RestoreStore, peer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restores_module, "KEPT_MAX", 3)
    for number in range(5):
        peer.answers["POST /v1/restores"] = 202, document(restore_id=f"r{number}")
        asking.submit(AT_P)
    assert [restore.id for restore in asking.all()] == ["r2", "r3", "r4"]

"""Engines registered with a node, and restores pushed into their memory by the nodes, over real HTTP and Mooncake."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from app.errors import Conflict, LimitReached, NotFound
from app.restores.consumers import CONSUMERS_MAX, ConsumerStore
from app.restores.pushes import PUSHES_MAX
from tests.clocks import Clock
from tests.processes import DEADLINE_S, pause
from transfer.push.table import FormCopy, PushTable, SlotBases

# An engine: it fills its parameters with noise, registers them, says where they are, and from then on only waits.
ENGINE = """
import json, sys
import torch
from safetensors import safe_open
from transfer.checkpoint import read_checkpoint
from transfer.engine import MooncakeEngine
from transfer.push.table import consumer_document
from transfer.slots import Slots

directory, device = sys.argv[1], sys.argv[5]
placement, ttl_s, left_out = json.loads(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
manifest = read_checkpoint(directory, "moe").manifest
stored = {}
for file in manifest.files:
    with safe_open(f"{directory}/{file.name}", "pt") as opened:
        stored.update({name: opened.get_tensor(name) for name in opened.keys() if ".experts." in name})

def wanted(layer, expert, part):
    halves = ("gate_proj", "up_proj") if part.startswith("w13") else ("down_proj",)
    names = [f"model.layers.{layer}.mlp.experts.{expert}.{half}.{part.split('_', 1)[1]}" for half in halves]
    return torch.cat([stored[name] for name in names])

PARTS = ("w13_weight", "w13_weight_scale_inv", "w2_weight", "w2_weight_scale_inv")
layers = sorted({key.layer for key in manifest.keys})
parameters = {}
for layer in layers:
    for part in PARTS:
        like = torch.stack([wanted(layer, expert, part) for expert in placement])
        noise = torch.randint(0, 256, (like.nbytes,), dtype=torch.uint8)
        parameters[f"model.layers.{layer}.mlp.experts.{part}"] = noise.view(like.dtype).view(like.shape).to(device)
before = {name: parameter.view(torch.uint8).cpu().clone() for name, parameter in parameters.items()}
slots = Slots.fused(parameters, physical_to_logical={layer: placement for layer in layers})
engine = MooncakeEngine("127.0.0.1")
engine.register([(r.address, r.nbytes) for r in slots.ranges[left_out:]])
print("document", json.dumps(consumer_document(slots, manifest, engine.session_id, ttl_s)), flush=True)
for line in sys.stdin:
    same, untouched = 0, 0
    now = {name: parameter.view(torch.uint8).cpu() for name, parameter in parameters.items()}
    for layer in layers:
        for slot, expert in enumerate(placement):
            names = [(f"model.layers.{layer}.mlp.experts.{part}", part) for part in PARTS]
            same += all(
                torch.equal(now[n][slot], wanted(layer, expert, part).view(torch.uint8))
                for n, part in names
            )
            untouched += all(torch.equal(now[n][slot], before[n][slot]) for n, _ in names)
    print("found", same, untouched, flush=True)
"""
REDUNDANT = [*range(13), 4, 7, 0]
LAYERS = 3


class Engine:
    """The engine's process, and what it would send to its node."""

    def __init__(self, child: Any) -> None:
        self.child = child
        self.document: dict[str, Any] = json.loads(child.expect("document"))

    def found(self) -> tuple[int, int]:
        """Slots that hold their expert to the bit, and slots that nothing was written to."""
        self.child.tell("check")
        same, untouched = self.child.expect("found").split()
        return int(same), int(untouched)


@pytest.fixture
def engine(python_with_torch: Callable[..., Any], moe_checkpoint: Path) -> Callable[..., Engine]:
    """`engine(placement, ttl_s=…, left_out=…, device=…)` → a process that owns tensors and an engine, and waits.

    `left_out` ranges are not registered with its engine, though it says so.
    """

    def start(
        placement: list[int] = REDUNDANT, *, ttl_s: float = 300, left_out: int = 0, device: str = "cpu"
    ) -> Engine:
        return Engine(python_with_torch(ENGINE, moe_checkpoint, json.dumps(placement), ttl_s, left_out, device))

    return start


@pytest.fixture
def cluster(serve: Callable[..., Any], free_port: Callable[[], int], moe_checkpoint: Path) -> Callable[..., list[Any]]:
    """`cluster(count, replicas)` → ready nodes that see each other."""

    def start(count: int, replicas: int) -> list[Any]:
        ports = {f"n{number}": free_port() for number in range(count)}
        env = {"MC_TRANSFER_TIMEOUT": "5"}  # the least it takes
        nodes = [
            serve(node, ports, checkpoint=moe_checkpoint, fill="disk", replicas=replicas, env=env) for node in ports
        ]
        for node in nodes:
            node.wait_ready()
        nodes[0].wait_alive(*list(ports)[1:])
        return nodes

    return start


def put(node: Any, document: dict[str, Any], name: str = "rank-0") -> Any:
    return node.ask("PUT", f"/v1/consumers/{name}", json=document)


def restore(node: Any, name: str = "rank-0", **body: Any) -> dict[str, Any]:
    answer = node.ask("POST", "/v1/restores", json={"target": {"consumer_id": name}, **body})
    assert answer.status_code == 202, answer.text
    document: dict[str, Any] = node.wait_restore(answer.json()["id"])
    return document


# -- the whole way ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"))],
)
def test_nodes_fill_an_engine_that_only_waits_and_another_replica_serves_when_a_holder_dies(
    cluster: Callable[..., list[Any]], engine: Callable[..., Engine], device: str
) -> None:
    nodes, rank = cluster(3, 2), engine(device=device)
    slots = LAYERS * len(REDUNDANT)
    assert rank.found() == (0, slots)
    answer = put(nodes[0], rank.document)
    assert answer.status_code == 201, answer.text
    assert (answer.json()["blocks"], answer.json()["slots"]) == (LAYERS * 13, slots)

    done = restore(nodes[0], sources=["peer"], read_back=True)
    assert (done["state"], done["error"], done["failed"]) == ("succeeded", None, [])
    assert done["target"] == {"node_id": None, "consumer_id": "rank-0"}
    assert done["blocks_done"] == LAYERS * 13
    assert done["bytes_by_source"]["local"] > done["bytes_by_source"]["peer"] > 0 == done["bytes_by_source"]["disk"]
    assert rank.found() == (slots, 0)

    again = engine()
    nodes[1].kill()
    assert put(nodes[0], again.document).status_code == 200  # the rank came back, in another process
    done = restore(nodes[0], sources=["peer"])
    assert (done["state"], done["error"]) == ("succeeded", None)
    assert done["bytes_by_source"]["peer"] > 0 == done["bytes_by_source"]["disk"]
    assert again.found() == (slots, 0)


def test_what_no_living_node_holds_comes_from_disk_or_is_reported(
    cluster: Callable[..., list[Any]], engine: Callable[..., Engine]
) -> None:
    nodes, rank = cluster(2, 1), engine(list(range(13)))
    nodes[1].kill()
    put(nodes[0], rank.document)
    held = nodes[0].get("/v1/node")["blocks"]
    done = restore(nodes[0], sources=["peer"])
    assert done["state"] == "failed"
    assert (done["blocks_done"], len(done["failed"])) == (held, LAYERS * 13 - held)
    assert rank.found() == (held, LAYERS * 13 - held)  # nothing half-written

    done = restore(nodes[0], read_back=True)
    assert (done["state"], done["error"]) == ("succeeded", None)
    assert done["bytes_by_source"]["disk"] > 0
    assert rank.found() == (LAYERS * 13, 0)


def test_named_experts_go_to_all_their_slots_and_nothing_else_is_written(
    cluster: Callable[..., list[Any]], engine: Callable[..., Engine]
) -> None:
    (node,), rank = cluster(1, 1), engine([4, 5, 4, 11])
    put(node, rank.document)
    done = restore(node, experts=[{"layer": 3, "expert": 4}, {"layer": 5, "expert": 11}, {"layer": 3, "expert": 0}])
    assert (done["state"], done["blocks_total"]) == ("succeeded", 2)  # of expert 0 it has no slot
    assert rank.found() == (3, 12 - 3)
    nothing = {"target": {"consumer_id": "rank-0"}, "experts": [{"layer": 3, "expert": 0}]}
    assert node.ask("POST", "/v1/restores", json=nothing).status_code == 422
    nothing["experts"] = [{"layer": 0, "expert": 0}]
    assert node.ask("POST", "/v1/restores", json=nothing).status_code == 404


def test_a_block_that_is_wrong_in_memory_is_never_sent_but_mended(
    cluster: Callable[..., list[Any]], engine: Callable[..., Engine], namespace: str, wait_until: Callable[..., Any]
) -> None:
    (node,), rank = cluster(1, 1), engine(list(range(13)))
    put(node, rank.document)
    name = node.get("/v1/node")["segment"]
    _spoil(name, layer=4, expert=6)
    done = restore(node, sources=["peer"])
    assert done["state"] == "failed"
    assert [(f["layer"], f["expert"]) for f in done["failed"]] == [(4, 6)]
    assert "do not match its checksum at the source" in done["failed"][0]["reason"]
    assert rank.found() == (38, 1)
    wait_until(lambda: [r for r in node.get("/v1/restores")["restores"] if r["bytes_by_source"]["disk"]], "mended")
    assert restore(node, sources=["peer"])["state"] == "succeeded"
    assert rank.found() == (39, 0)


def _spoil(object_name: str, layer: int, expert: int) -> None:
    from shm.layout import ENTRY
    from shm.lookup import read_header
    from shm.manifest import Manifest

    with open(f"/dev/shm/{object_name}", "r+b", buffering=0) as file:
        header = read_header(file.fileno(), object_name)
        file.seek(header.manifest_offset)
        manifest = Manifest.from_bytes(file.read(header.manifest_nbytes))
        file.seek(header.table_offset + ENTRY.itemsize * manifest.index(layer, expert))
        offset = int.from_bytes(file.read(8), "little")
        file.seek(offset + 3333)
        byte = file.read(1)
        file.seek(offset + 3333)
        file.write(bytes([byte[0] ^ 1]))


def test_a_dead_engine_fails_the_restore_with_a_reason_and_is_marked(
    cluster: Callable[..., list[Any]], engine: Callable[..., Engine]
) -> None:
    (node, _), rank = cluster(2, 1), engine(list(range(13)))
    put(node, rank.document)
    rank.child.kill()
    done = restore(node, sources=["peer"])
    assert (done["state"], done["blocks_done"], len(done["failed"])) == ("failed", 0, LAYERS * 13)
    assert [f for f in done["failed"] if "is the process alive" not in f["reason"]] == []  # from here, and from n1
    assert "is the process alive" in node.get("/v1/consumers/rank-0")["error"]


def test_memory_that_the_engine_did_not_register_is_refused_by_the_engine_itself(
    cluster: Callable[..., list[Any]], engine: Callable[..., Engine]
) -> None:
    (node,), rank = cluster(1, 1), engine([1, 2], left_out=1)
    put(node, rank.document)
    done = restore(node)
    assert (done["state"], done["blocks_done"]) == ("failed", 0)
    assert rank.found()[0] < 6


def test_a_stopped_engine_does_not_hold_a_restore_up_for_long(
    cluster: Callable[..., list[Any]], engine: Callable[..., Engine]
) -> None:
    (node,), rank = cluster(1, 1), engine([1, 2])
    put(node, rank.document)
    assert restore(node)["state"] == "succeeded"
    pause(rank.child.pid)
    done = restore(node, sources=["peer"])
    assert done["state"] == "failed"
    os.kill(rank.child.pid, signal.SIGCONT)
    assert restore(node)["state"] == "succeeded"
    assert node.get("/v1/consumers/rank-0")["error"] is None


def test_metrics_count_restores_of_the_node_and_of_its_consumers_and_none_that_another_node_does(
    cluster: Callable[..., list[Any]], engine: Callable[..., Engine]
) -> None:
    nodes, rank = cluster(2, 2), engine([4, 5])
    put(nodes[0], rank.document)

    def counted(node: Any) -> tuple[float, float, str]:
        families = {f.name: f for f in text_string_to_metric_families(node.ask("GET", "/metrics").text)}
        restores, moved = families["hotspare_restores"], families["hotspare_restored_bytes"]
        return (
            sum(sample.value for sample in restores.samples),
            sum(sample.value for sample in moved.samples),
            restores.documentation,
        )

    (count, moved, said), (theirs, _, _) = map(counted, nodes)
    done = restore(nodes[0])
    assert done["state"] == "succeeded"
    assert counted(nodes[0])[:2] == (count + 1, moved + done["bytes_done"])
    nodes[0].wait_restore(nodes[0].restore("n1"))
    assert (counted(nodes[0])[0], counted(nodes[1])[0]) == (count + 1, theirs + 1)
    assert "its segment and into its consumers' memory" in said
    assert "asked other nodes to do are counted there" in said


# -- registering -----------------------------------------------------------------------------------------------


def test_registrations_are_checked_renewed_listed_and_end(
    cluster: Callable[..., list[Any]], engine: Callable[..., Engine], wait_until: Callable[..., Any]
) -> None:
    nodes, rank = cluster(2, 1), engine([1, 2])
    node, document = nodes[0], rank.document

    missing = {"target": {"consumer_id": "rank-9"}}
    answer = node.ask("POST", "/v1/restores", json=missing)
    assert answer.status_code == 404
    assert "PUT /v1/consumers/rank-9" in answer.json()["detail"]

    def refused(status: int, says: str, **changes: Any) -> None:
        answer = put(node, document | changes)
        assert answer.status_code == status, answer.text
        assert says in answer.json()["detail"]

    refused(422, "not within one of the ranges", ranges=document["ranges"][1:])
    refused(422, "overlap", slots=[*document["slots"], document["slots"][0]])
    refused(422, "session", session_id=node.get("/v1/node")["session_id"])
    refused(422, "n1's own", session_id=nodes[1].get("/v1/node")["session_id"])
    refused(409, "manifest", manifest_digest="0" * 64)
    refused(409, "content 000000000000…, this node has", content_digest="0" * 32)
    refused(422, "ttl_s", ttl_s=0.5)
    refused(422, "session_id", session_id="nowhere")
    assert node.get("/v1/consumers") == {"consumers": []}

    assert put(node, document | {"ttl_s": 1}).status_code == 201
    wait_until(lambda: node.ask("GET", "/v1/consumers/rank-0").status_code == 404, "expired")
    assert node.ask("POST", "/v1/restores", json={"target": {"consumer_id": "rank-0"}}).status_code == 404

    assert put(node, document).is_success  # its id may be kept for a while: peers might still write to it
    assert [c["id"] for c in node.get("/v1/consumers")["consumers"]] == ["rank-0"]
    said = node.get("/v1/consumers/rank-0")
    assert said["content_digest"] == node.get("/v1/node")["content_digest"], "whoever names none means the node's"
    left = said["expires_in_s"]
    assert node.ask("POST", "/v1/consumers/rank-0/renew").json()["expires_in_s"] > left
    assert node.ask("DELETE", "/v1/consumers/rank-0").status_code == 204
    assert node.ask("DELETE", "/v1/consumers/rank-0").status_code == 404
    body = {"target": {"node_id": "n0"}, "read_back": True}
    assert node.ask("POST", "/v1/restores", json=body).status_code == 422


def test_pushes_between_nodes_write_only_what_the_table_allows(
    cluster: Callable[..., list[Any]], engine: Callable[..., Engine], wait_until: Callable[..., Any]
) -> None:
    (node,), rank = cluster(1, 1), engine([1, 2])
    epoch = node.ask("PUT", "/v1/consumers/rank-0", json=rank.document).json()["epoch"]
    lease = {"node_id": node.node_id, "consumer_id": "rank-0", "epoch": epoch, "push_id": "p33"}
    table = {name: value for name, value in rank.document.items() if name != "ttl_s"} | {"lease": lease}
    checksums = {(e["layer"], e["expert"]): e["checksum"] for e in node.get("/v1/shard-map")["experts"]}

    def push(blocks: list[dict[str, Any]], **changes: Any) -> Any:
        return node.ask("POST", "/v1/pushes", json=table | {"blocks": blocks} | changes)

    good = {"layer": 3, "expert": 1, "checksum": checksums[3, 1]}
    assert push([good | {"expert": 7, "checksum": checksums[3, 7]}]).status_code == 422  # no slot
    assert push([good | {"layer": 2}]).status_code == 404  # no such block
    assert push([good], ranges=[[1, 10]]).status_code == 422
    assert push([good], content_digest="0" * 32).status_code == 409
    assert push([good], lease=lease | {"node_id": "nobody"}).status_code == 422
    assert push([good], lease=lease | {"epoch": epoch - 1}).status_code == 409
    assert push([good], lease=lease | {"consumer_id": "rank-1"}).status_code == 404
    stale = push([good | {"checksum": "1" * 32}]).json()
    assert stale["pushed"] == []
    assert "it is of other content" in stale["failed"][0]["said"]
    assert rank.found() == (0, 6)
    assert push([good], read_back=True).json() == {
        "pushed": [{"layer": 3, "expert": 1, "said": checksums[3, 1]}], "failed": [], "consumer_error": None,
    }  # fmt: skip
    assert rank.found() == (1, 5)
    for _ in range(PUSHES_MAX):
        assert push([good]).status_code == 200, "each gave its place back"
    _spoil(node.get("/v1/node")["segment"], layer=3, expert=1)
    assert "at the source" in push([good]).json()["failed"][0]["said"]
    wait_until(lambda: push([good]).json()["pushed"], "mended")
    rank.child.kill()
    assert "is the process alive" in push([good]).json()["consumer_error"]


def test_a_node_that_wakes_up_writes_to_nobody_who_was_told_that_nothing_writes_there(
    cluster: Callable[..., list[Any]], engine: Callable[..., Engine]
) -> None:
    """The request waited in its socket while it was paused; the registration ended, and DELETE had answered."""
    (first, second), rank = cluster(2, 2), engine([1, 2])
    epoch = put(first, rank.document).json()["epoch"]
    lease = {"node_id": first.node_id, "consumer_id": "rank-0", "epoch": epoch, "push_id": "p33"}
    table = {name: value for name, value in rank.document.items() if name != "ttl_s"} | {"lease": lease}
    checksums = {(e["layer"], e["expert"]): e["checksum"] for e in second.get("/v1/shard-map?scope=node")["experts"]}
    blocks, others = ([{"layer": 3, "expert": e, "checksum": checksums[3, e]}] for e in (1, 2))
    assert second.ask("POST", "/v1/pushes", json=table | {"blocks": blocks}).json()["pushed"]
    assert rank.found() == (1, 5)
    second.pause()

    def push_others() -> None:
        with suppress(httpx.HTTPError):  # a node may close a connection that was idle for so long
            httpx.post(f"{second.url}/v1/pushes", json=table | {"blocks": others}, timeout=60, trust_env=False)

    asking = threading.Thread(target=push_others)
    asking.start()
    assert first.ask("DELETE", "/v1/consumers/rank-0").status_code == 204
    second.resume()
    asking.join(60)
    assert rank.found() == (1, 5)
    assert second.ask("POST", "/v1/pushes", json=table | {"blocks": blocks}).status_code == 409
    put(first, rank.document)
    assert second.ask("POST", "/v1/pushes", json=table | {"blocks": blocks}).status_code == 409, "of another epoch"
    assert rank.found() == (1, 5)


# -- the store -------------------------------------------------------------------------------------------------


@pytest.fixture
def table(make_manifest: Callable[..., Any]) -> PushTable:
    manifest = make_manifest()
    return PushTable.build(
        manifest, "127.0.0.1:9", [(4096, 100)], [[FormCopy(0, 0, 0, 1, 10, 10, 10)]], [SlotBases(0, 0, 0, (4096,))]
    )


@pytest.fixture
def store(clock: Clock) -> ConsumerStore:
    return ConsumerStore(clock, earlier_leases_s=0)


def test_a_registration_ends_unless_it_is_renewed(store: ConsumerStore, clock: Clock, table: PushTable) -> None:
    consumer, is_new = store.put("a", table, "d", "c", 10)
    assert is_new
    clock.now_s += 9
    store.renew("a")
    clock.now_s += 9
    assert store.get("a") is consumer
    clock.now_s += 1
    with pytest.raises(NotFound, match="PUT /v1/consumers/a"):
        store.get("a")
    with pytest.raises(Conflict, match="has ended"), store.hold(consumer):
        pass


def test_the_number_of_consumers_has_a_limit_and_replacing_one_is_always_possible(
    store: ConsumerStore, clock: Clock, table: PushTable
) -> None:
    for number in range(CONSUMERS_MAX):
        store.put(f"c{number}", table, "d", "c", 10 + number)
    with pytest.raises(LimitReached):
        store.put("one-more", table, "d", "c", 10)
    assert store.put("c0", table, "d", "c", 10)[1] is False
    clock.now_s += 10
    assert store.put("one-more", table, "d", "c", 10)[1] is True


@pytest.mark.parametrize("ending", ["remove", "replace"])
def test_ending_a_registration_waits_for_pushes_and_lets_none_begin(
    store: ConsumerStore, table: PushTable, ending: str, wait_until: Callable[..., Any]
) -> None:
    consumer, _ = store.put("a", table, "d", "c", 10)
    end = {"remove": lambda: store.remove("a"), "replace": lambda: store.put("a", table, "d", "c", 10)}[ending]
    thread = threading.Thread(target=end)
    with store.hold(consumer):
        thread.start()
        wait_until(lambda: consumer.is_over)
        with pytest.raises(Conflict), store.hold(consumer):
            pass
        assert thread.is_alive()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()
    assert [c is consumer for c in store.all()] == ([] if ending == "remove" else [False])


def test_an_expired_consumer_is_held_to_the_end_of_a_push(store: ConsumerStore, clock: Clock, table: PushTable) -> None:
    consumer, _ = store.put("a", table, "d", "c", 10)
    with store.hold(consumer):
        clock.now_s += 11
        assert store.all() == [consumer]  # still written to: its id must wait
        with pytest.raises(NotFound):
            store.get("a")
    assert store.all() == []

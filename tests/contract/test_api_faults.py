"""What the API says while nodes die, disagree, start and work hard."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.api.problems import Problem
from app.documents import Readiness
from shm.block import ExpertKey
from tests.processes import DEADLINE_S
from transfer.checkpoint.synth import write_checkpoint

Serve = Callable[..., Any]
WaitUntil = Callable[..., Any]
CHECKS = ("manifest", "published", "sealed", "registered", "attachable")


def ports_of(free_port: Callable[[], int], names: str) -> dict[str, int]:
    return {name: free_port() for name in names}


def held_by(daemon: Any) -> set[ExpertKey]:
    return {ExpertKey(e["layer"], e["expert"]) for e in daemon.get("/v1/shard-map?scope=node")["experts"]}


def states(daemon: Any) -> dict[str, str]:
    return {node["node_id"]: node["state"] for node in daemon.get("/v1/nodes")["nodes"]}


def conflicts(daemon: Any) -> dict[str, str | None]:
    return {node["node_id"]: node["conflict"] for node in daemon.get("/v1/nodes")["nodes"]}


def test_coverage_and_maps_follow_the_death_of_nodes(
    serve: Serve, free_port: Callable[[], int], moe_checkpoint: Path, wait_until: WaitUntil
) -> None:
    ports = ports_of(free_port, "abc")
    nodes = {name: serve(name, ports, checkpoint=moe_checkpoint) for name in ports}
    held = {name: held_by(daemon.wait_ready()) for name, daemon in nodes.items()}
    a = nodes["a"]
    wait_until(lambda: a.get("/v1/coverage")["total"]["by_replicas"]["2"] == 39, "a knows everything")

    nodes["c"].kill()
    wait_until(lambda: states(a)["c"] == "unreachable", "a gives c up")
    coverage = a.get("/v1/coverage")
    assert coverage["total"]["by_replicas"] == {"0": 0, "1": len(held["c"]), "2": 39 - len(held["c"])}
    assert coverage["lost"] == []
    experts = a.get("/v1/shard-map")["experts"]
    assert len(experts) == 39
    assert "c" not in {replica["node_id"] for each in experts for replica in each["replicas"]}
    refused = a.ask("POST", "/v1/restores", json={"target": {"node_id": "c"}})
    assert refused.status_code == 503
    assert "node c does not answer" in Problem.model_validate_json(refused.content).detail
    assert int(refused.headers["retry-after"]) > 0

    nodes["b"].kill()
    wait_until(lambda: states(a)["b"] == "unreachable", "a gives b up")
    coverage = a.get("/v1/coverage")
    lost = {ExpertKey(e["layer"], e["expert"]) for e in coverage["lost"]}
    assert lost == (held["b"] | held["c"]) - held["a"]
    assert coverage["total"]["by_replicas"] == {"0": len(lost), "1": len(held["a"]), "2": 0}
    for layer in coverage["layers"]:
        assert layer["by_replicas"]["0"] == sum(key.layer == layer["layer"] for key in lost)


def test_nodes_that_disagree_are_listed_and_take_nothing_from_each_other(
    serve: Serve, free_port: Callable[[], int], moe_checkpoint: Path, tmp_path: Path, wait_until: WaitUntil
) -> None:
    other = tmp_path / "other"
    write_checkpoint(other, "deepseek-v3", layers=5, experts=7, scale=0.06, seed=5)
    ports = ports_of(free_port, "abc")
    a = serve("a", ports, checkpoint=moe_checkpoint, fill="disk")
    b = serve("b", ports, checkpoint=other, fill="disk")
    c = serve("c", ports, fill="none")
    a.wait_ready()
    b.wait_ready()
    c.wait_live()
    wait_until(lambda: conflicts(a)["b"] and conflicts(b)["a"], "a and b see that they disagree")
    assert "filled from another checkpoint" in conflicts(a)["b"]
    assert states(a)["b"] == "alive"
    replicas = {r["node_id"] for e in a.get("/v1/shard-map")["experts"] for r in e["replicas"]}
    assert replicas == {"a"}
    assert a.get("/v1/coverage")["total"]["by_replicas"]["2"] == 0

    wait_until(lambda: set(states(c).values()) == {"alive"}, "c sees both")
    document = c.wait_restore(c.restore("c"))
    assert document["state"] == "failed"
    assert "peers disagree on the weights" in document["error"]
    assert "--checkpoint" in document["error"]

    b.kill()  # then there is one truth left
    wait_until(lambda: states(c)["b"] == "unreachable", "c gives b up")
    document = c.wait_restore(c.restore("c", sources=["peer"]))
    assert document["bytes_by_source"]["peer"] > 0
    assert document["bytes_by_source"]["disk"] == 0
    assert held_by(c) <= held_by(a)


def test_readiness_names_each_check_until_all_hold(
    serve: Serve, free_port: Callable[[], int], moe_checkpoint: Path, wait_until: WaitUntil
) -> None:
    ports = ports_of(free_port, "a")
    node = serve("a", ports, checkpoint=moe_checkpoint, fill="none").wait_live()
    answer = node.ask("GET", "/readyz")
    assert (answer.status_code, answer.headers["content-type"]) == (503, "application/json")
    before = Readiness.model_validate_json(answer.content)
    assert (before.ready, before.state, before.missing) == (False, "waiting", 39)
    assert before.checks == {
        "manifest": True,
        "published": False,
        "sealed": False,
        "registered": True,
        "attachable": True,
    }

    done = node.wait_restore(node.restore("a", experts=[{"layer": 3, "expert": 0}]))
    assert done["state"] == "succeeded"
    half = Readiness.model_validate_json(node.ask("GET", "/readyz").content)
    assert (half.ready, half.state, half.missing, half.checks["sealed"]) == (False, "degraded", 38, False)

    done = node.wait_restore(node.restore("a"))
    assert done["bytes_by_source"]["local"] == done["bytes_total"] // 39
    ready = wait_until(lambda: answer if (answer := node.ask("GET", "/readyz")).status_code == 200 else None, "ready")
    after = Readiness.model_validate_json(ready.content)
    assert (ready.status_code, after.ready, after.state, after.missing) == (200, True, "ready", 0)
    assert after.checks == dict.fromkeys(CHECKS, True)


@pytest.mark.parametrize("scope", ["node", "cluster"])
def test_a_map_that_has_changed_is_sent_again(
    serve: Serve, free_port: Callable[[], int], moe_checkpoint: Path, scope: str
) -> None:
    node = serve("a", ports_of(free_port, "a"), checkpoint=moe_checkpoint, fill="none").wait_live()
    path = f"/v1/shard-map?scope={scope}&layer=3"
    empty = node.ask("GET", path)
    assert node.ask("GET", path, headers={"If-None-Match": empty.headers["etag"]}).status_code == 304
    node.wait_restore(node.restore("a", experts=[{"layer": 3, "expert": 5}]))
    again = node.ask("GET", path, headers={"If-None-Match": empty.headers["etag"]})
    assert again.status_code == 200
    assert [each["expert"] for each in again.json()["experts"]] == [5]


@pytest.fixture(scope="module")
def many_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepSeek-V3's 14,848 blocks, of 3 KB each."""
    directory = tmp_path_factory.mktemp("many") / "checkpoint"
    write_checkpoint(directory, "deepseek-v3", scale=0.004, seed=7)
    return directory


def held_up(daemon: Any, work: Callable[[], None]) -> float:
    """The longest wait for /livez while the work is done, as a share of the time that the work takes.

    It is near 1 where the work is done on the event loop, or in one call that holds the GIL, however slow the machine.
    """
    with ThreadPoolExecutor(1) as pool, httpx.Client(trust_env=False, timeout=DEADLINE_S) as http:
        slowest, started = 0.0, time.monotonic()
        working = pool.submit(work)
        while not working.done():
            asked = time.monotonic()
            assert http.get(f"{daemon.url}/livez").status_code == 200
            slowest = max(slowest, time.monotonic() - asked)
        working.result()
        return slowest / (time.monotonic() - started)


def test_liveness_answers_while_large_documents_and_restores_are_under_way(
    serve: Serve, free_port: Callable[[], int], many_blocks: Path, wait_until: WaitUntil
) -> None:
    node = serve("a", ports_of(free_port, "a"), checkpoint=many_blocks, fill="disk").wait_ready()
    experts = [{"layer": e["layer"], "expert": e["expert"]} for e in node.get("/v1/shard-map")["experts"]]
    assert len(experts) == 14_848

    def restore() -> None:
        document = node.wait_restore(node.restore("a", experts=experts))
        assert (document["state"], document["blocks_done"]) == ("succeeded", 14_848)

    assert held_up(node, restore) < 1 / 3
    for path in ("/v1/shard-map", "/v1/manifest"):
        wait_until(lambda path=path: held_up(node, lambda: node.get(path)) < 1 / 2, f"/livez beside {path}")

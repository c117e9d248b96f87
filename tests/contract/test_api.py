"""Every route over real HTTP: three nodes with two replicas of 39 blocks, 3 layers of 13 experts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import xxhash
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel

from app.api.problems import MEDIA_TYPE, Problem
from app.documents import (
    CoverageDocument,
    Live,
    ManifestDocument,
    NodeDocument,
    Nodes,
    Readiness,
    RestoreDocument,
    Restores,
    ShardMap,
)
from shm.block import ExpertKey
from shm.manifest import Manifest
from tests.processes import DEADLINE_S
from transfer.checkpoint import read_checkpoint

BLOCKS = 39
LAYERS = (3, 4, 5)
Trio = dict[str, Any]
ExpectedBlocks = Callable[[Path], dict[ExpertKey, bytes]]


def problem(answer: httpx.Response, status: int) -> Problem:
    """Its problem document, which must be one."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == MEDIA_TYPE
    found = Problem.model_validate_json(answer.content, strict=True)
    assert found.status == status
    assert found.detail
    return found


# -- shapes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/livez", "/readyz"])
def test_probes_may_ask_for_the_head_only(trio: Trio, path: str) -> None:
    answer = trio["a"].ask("HEAD", path)
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-length"] == trio["a"].ask("GET", path).headers["content-length"]


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("/livez", Live),
        ("/readyz", Readiness),
        ("/v1/node", NodeDocument),
        ("/v1/manifest", ManifestDocument),
        ("/v1/shard-map", ShardMap),
        ("/v1/shard-map?scope=node", ShardMap),
        ("/v1/shard-map?layer=4&expert=7", ShardMap),
        ("/v1/nodes", Nodes),
        ("/v1/coverage", CoverageDocument),
        ("/v1/restores", Restores),
    ],
)
def test_answers_have_the_documented_fields_and_no_others(trio: Trio, path: str, model: type[BaseModel]) -> None:
    answer = trio["a"].ask("GET", path)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    document = model.model_validate_json(answer.content)
    assert json.loads(document.model_dump_json(by_alias=True)) == answer.json()


def test_a_node_tells_what_it_is_and_has(trio: Trio) -> None:
    for name, daemon in trio.items():
        node = daemon.get("/v1/node")
        assert (node["node_id"], node["model"], node["state"], node["replicas"]) == (name, "moe", "ready", 2)
        mapped = daemon.get("/v1/shard-map?scope=node")
        assert node["blocks"] == len(mapped["experts"])
        assert node["bytes"] == sum(e["nbytes"] for e in mapped["experts"])
        assert mapped["revision"] == node["revision"]
    digests = {daemon.get("/v1/node")["manifest_digest"] for daemon in trio.values()}
    assert len(digests) == 1


def test_the_manifest_is_the_checkpoints(trio: Trio, moe_checkpoint: Path) -> None:
    answer = trio["b"].ask("GET", "/v1/manifest")
    manifest = Manifest.from_json(answer.json())
    assert manifest == read_checkpoint(moe_checkpoint, "moe").manifest
    assert answer.headers["etag"] == f'"{manifest.digest}"'


def test_the_map_tells_where_two_replicas_of_every_block_are(
    trio: Trio, moe_checkpoint: Path, expected_blocks: ExpectedBlocks
) -> None:
    sessions = {name: daemon.get("/v1/node")["session_id"] for name, daemon in trio.items()}
    expected = expected_blocks(moe_checkpoint)
    own = {name: daemon.get("/v1/shard-map?scope=node")["experts"] for name, daemon in trio.items()}
    addresses = {(name, e["layer"], e["expert"]): e["replicas"][0]["address"] for name in own for e in own[name]}
    for daemon in trio.values():
        experts = daemon.get("/v1/shard-map")["experts"]
        assert [ExpertKey(e["layer"], e["expert"]) for e in experts] == sorted(expected)
        for each in experts:
            content = expected[ExpertKey(each["layer"], each["expert"])]
            assert (each["nbytes"], each["checksum"]) == (len(content), xxhash.xxh3_128_hexdigest(content))
            assert len({replica["node_id"] for replica in each["replicas"]}) == 2
            for replica in each["replicas"]:
                assert replica["session_id"] == sessions[replica["node_id"]]
                assert replica["address"] == addresses[replica["node_id"], each["layer"], each["expert"]]


@pytest.mark.parametrize(
    ("query", "count"),
    [("layer=4", 13), ("expert=7", 3), ("layer=5&expert=12", 1)],
)
def test_the_map_is_filtered(trio: Trio, query: str, count: int) -> None:
    asked = {key: int(value) for key, value in (part.split("=") for part in query.split("&"))}
    experts = trio["a"].get(f"/v1/shard-map?{query}")["experts"]
    assert len(experts) == count
    assert all(each[key] == value for each in experts for key, value in asked.items())


def test_the_map_has_the_blocks_that_are_named(trio: Trio) -> None:
    named = trio["a"].get("/v1/shard-map?block=5.12&block=3.7&block=3.7")
    assert [(e["layer"], e["expert"]) for e in named["experts"]] == [(3, 7), (5, 12)]
    assert named["experts"] == [e for e in trio["a"].get("/v1/shard-map")["experts"] if e in named["experts"]]
    assert named["node_id"] == "a"
    assert [
        (e["layer"], e["expert"]) for e in trio["a"].get("/v1/shard-map?block=5.12&block=3.7&layer=3")["experts"]
    ] == [(3, 7)]


def test_every_node_lists_all_nodes(trio: Trio) -> None:
    for name, daemon in trio.items():
        nodes = Nodes.model_validate(daemon.get("/v1/nodes")).nodes
        assert [node.node_id for node in nodes] == ["a", "b", "c"]
        assert {node.node_id: node.url for node in nodes} == {each: d.url for each, d in trio.items()}
        assert [node.node_id for node in nodes if node.self_] == [name]
        assert {(node.state, node.node_state, node.conflict, node.error) for node in nodes} == {
            ("alive", "ready", None, None)
        }
        assert all(node.blocks_unproved == 0 and node.proved_oldest is not None for node in nodes)


def test_coverage_counts_the_replicas_of_every_layer(trio: Trio) -> None:
    coverage = CoverageDocument.model_validate(trio["c"].get("/v1/coverage"))
    assert (coverage.total.blocks, coverage.total.by_replicas) == (BLOCKS, {0: 0, 1: 0, 2: BLOCKS})
    assert {layer.layer: layer.by_replicas for layer in coverage.layers} == {
        layer: {0: 0, 1: 0, 2: 13} for layer in LAYERS
    }
    assert (coverage.lost, coverage.lost_dense) == ([], [])


def test_the_metrics_say_what_the_node_says(trio: Trio) -> None:
    answer = trio["a"].ask("GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }
    node = trio["a"].get("/v1/node")
    assert samples["hotspare_blocks",] == node["blocks"]
    assert samples["hotspare_bytes",] == node["bytes"]
    assert samples["hotspare_blocks_missing",] == 0
    assert samples["hotspare_state", "ready"] == 1
    assert samples["hotspare_state", "degraded"] == 0
    assert samples["hotspare_peers", "alive"] == 2
    assert samples["hotspare_restores", "succeeded"] >= 1
    moved = sum(value for key, value in samples.items() if key[0] == "hotspare_restored_bytes_total")
    assert moved >= node["bytes"]


# -- caching ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/manifest", "/v1/shard-map", "/v1/shard-map?scope=node&layer=3"])
def test_what_has_not_changed_is_not_sent_again(trio: Trio, path: str) -> None:
    tag = trio["a"].ask("GET", path).headers["etag"]
    for asked in (tag, f"W/{tag}", f'"other", W/{tag}', f'{tag},"more"', "*"):
        answer = trio["a"].ask("GET", path, headers={"If-None-Match": asked})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", tag)
    for asked in ('"other"', tag.strip('"'), "", tag[:-2] + '"'):
        assert trio["a"].ask("GET", path, headers={"If-None-Match": asked}).status_code == 200


def test_other_filters_and_scopes_have_other_tags(trio: Trio) -> None:
    queries = (
        "",
        "?scope=node",
        "?layer=3",
        "?expert=3",
        "?layer=3&expert=3",
        "?scope=node&layer=3",
        "?block=3.3",
        "?block=3.4",
    )
    tags = {trio["a"].ask("GET", f"/v1/shard-map{query}").headers["etag"] for query in queries}
    assert len(tags) == len(queries)


# -- requests that cannot be met -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/v1/shard-map?layer=0",
        "/v1/shard-map?layer=3&expert=13",
        "/v1/shard-map?expert=2147483647",
        "/v1/shard-map?block=3.7&block=3.13",
        "/v1/shard-map?block=3.7&layer=4",
        "/v1/restores/nothing",
        "/v1/restores/nothing/events",
        "/v1/nope",
        "/",
    ],
)
def test_what_is_not_there_is_a_404(trio: Trio, path: str) -> None:
    assert problem(trio["a"].ask("GET", path), 404).instance == path.split("?")[0]


@pytest.mark.parametrize(
    "query",
    [
        "layer=-1",
        "expert=-1",
        "layer=x",
        "layer=1.5",
        "scope=everywhere",
        "layer=2147483648",
        "layer=",
    ],
)
def test_a_query_out_of_its_limits_is_a_422_that_names_it(trio: Trio, query: str) -> None:
    errors = problem(trio["a"].ask("GET", f"/v1/shard-map?{query}"), 422).errors
    assert errors is not None
    assert [(e.location, e.field) for e in errors] == [("query", query.split("=")[0])]


@pytest.mark.parametrize("block", ["3", "3.7.1", "-1.3", "9999999999.3", "", "٣.7", "3.7x"])
def test_a_block_that_none_can_be_called_is_a_422_that_names_it(trio: Trio, block: str) -> None:
    errors = problem(trio["a"].ask("GET", f"/v1/shard-map?block=3.7&block={block}"), 422).errors
    assert errors is not None
    assert [(e.location, e.field) for e in errors] == [("query", "block.1")]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "target"),
        ({"target": {}}, "target"),
        ({"target": {"node_id": "a", "consumer_id": "b"}}, "target"),
        ({"target": {"node_id": ""}}, "target.node_id"),
        ({"target": {"node_id": "a" * 201}}, "target.node_id"),
        ({"target": {"node_id": "a", "more": 1}}, "target.more"),
        ({"target": {"node_id": "a"}, "expert": []}, "expert"),
        ({"target": {"node_id": "a"}, "experts": []}, "experts"),
        ({"target": {"node_id": "a"}, "experts": [{"layer": 3}]}, "experts.0.expert"),
        ({"target": {"node_id": "a"}, "experts": [{"layer": -1, "expert": 0}]}, "experts.0.layer"),
        ({"target": {"node_id": "a"}, "experts": [{"layer": 3, "expert": -1}]}, "experts.0.expert"),
        ({"target": {"node_id": "a"}, "sources": []}, "sources"),
        ({"target": {"node_id": "a"}, "sources": ["local"]}, "sources.0"),
        ([], ""),
        ("a", ""),
    ],
    ids=json.dumps,
)
def test_a_body_out_of_its_limits_is_a_422_that_names_the_field(trio: Trio, body: Any, field: str) -> None:
    errors = problem(trio["a"].ask("POST", "/v1/restores", json=body), 422).errors
    assert errors is not None
    assert field in [e.field for e in errors]
    assert {e.location for e in errors} == {"body"}


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000], ids=["empty", "open", "binary", "deep"])
def test_a_body_that_is_not_json_is_a_problem(trio: Trio, content: bytes) -> None:
    answer = trio["a"].ask("POST", "/v1/restores", content=content, headers={"Content-Type": "application/json"})
    assert problem(answer, answer.status_code).status in (400, 422)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("DELETE", "/v1/node"), ("POST", "/v1/shard-map"), ("PUT", "/v1/restores"), ("PATCH", "/v1/manifest"),
        ("POST", "/livez"), ("GET", "/v1/restores/x/cancel"),
    ],
)  # fmt: skip
def test_a_wrong_method_is_a_405_that_says_which_is_right(trio: Trio, method: str, path: str) -> None:
    answer = trio["a"].ask(method, path)
    problem(answer, 405)
    assert answer.headers["allow"]


def test_an_unknown_node_is_a_404_that_names_the_nodes(trio: Trio) -> None:
    answer = trio["a"].ask("POST", "/v1/restores", json={"target": {"node_id": "d"}})
    assert "'d'" in problem(answer, 404).detail
    assert "a, b, c" in problem(answer, 404).detail


@pytest.mark.parametrize("asked", ["a", "b"], ids=["of itself", "of another"])
@pytest.mark.parametrize("expert", [{"layer": 2, "expert": 0}, {"layer": 3, "expert": 13}])
def test_an_expert_that_the_model_lacks_is_a_404(trio: Trio, asked: str, expert: dict[str, int]) -> None:
    body = {"target": {"node_id": "a"}, "experts": [expert]}
    detail = problem(trio[asked].ask("POST", "/v1/restores", json=body), 404).detail
    assert f"no expert {expert['expert']} in layer {expert['layer']}" in detail


def elsewhere(trio: Trio, name: str) -> dict[str, Any]:
    """An entry of the map that is not on that node."""
    experts = trio[name].get("/v1/shard-map")["experts"]
    return next(e for e in experts if name not in {r["node_id"] for r in e["replicas"]})


@pytest.mark.parametrize("asked", ["a", "b"], ids=["of itself", "of another"])
def test_an_expert_that_is_placed_elsewhere_is_a_422_that_says_where(trio: Trio, asked: str) -> None:
    entry = elsewhere(trio, "a")
    body = {"target": {"node_id": "a"}, "experts": [{"layer": entry["layer"], "expert": entry["expert"]}]}
    detail = problem(trio[asked].ask("POST", "/v1/restores", json=body), 422).detail
    assert f"expert {entry['expert']} of layer {entry['layer']} is not placed on node a" in detail
    assert all(replica["node_id"] in detail.split("restore it on")[1] for replica in entry["replicas"])


# -- restores --------------------------------------------------------------------------------------------------


def test_a_restore_of_a_whole_node_verifies_what_is_there(trio: Trio) -> None:
    answer = trio["a"].ask("POST", "/v1/restores", json={"target": {"node_id": "a"}})
    assert answer.status_code == 202
    started = RestoreDocument.model_validate_json(answer.content)
    assert answer.headers["location"] == f"/v1/restores/{started.id}"
    ended = RestoreDocument.model_validate(trio["a"].wait_restore(started.id))
    node = trio["a"].get("/v1/node")
    assert (ended.state, ended.error, ended.failed, ended.failed_total) == ("succeeded", None, [], 0)
    assert (ended.blocks_done, ended.bytes_done) == (node["blocks"], node["bytes"])
    assert ended.bytes_by_source == {"local": node["bytes"], "peer": 0, "disk": 0}
    assert ended.started_at is not None
    assert ended.finished_at is not None
    assert ended.created_at <= ended.started_at <= ended.finished_at
    assert trio["a"].get("/v1/restores")["restores"][0]["id"] == ended.id, "newest first"


def held_by(trio: Trio, name: str) -> list[dict[str, int]]:
    experts = trio[name].get("/v1/shard-map?scope=node")["experts"]
    return [{"layer": e["layer"], "expert": e["expert"]} for e in experts]


def test_a_restore_of_single_experts_touches_only_those(trio: Trio) -> None:
    experts = held_by(trio, "a")[3:6]
    restore_id = trio["a"].restore("a", experts=[*experts, experts[0]], sources=["peer"])
    ended = trio["a"].wait_restore(restore_id)
    assert (ended["state"], ended["blocks_total"]) == ("succeeded", 3)


def test_any_node_takes_it_for_any_node_and_tells_of_it(trio: Trio) -> None:
    restore_id = trio["b"].restore("c")
    ended = trio["b"].wait_restore(restore_id)
    assert ended["target"] == {"node_id": "c", "consumer_id": None}
    assert ended["state"] == "succeeded"
    assert trio["c"].get(f"/v1/restores/{restore_id}") == ended, "it is c's own"
    assert restore_id in [r["id"] for r in trio["b"].get("/v1/restores")["restores"]]
    assert trio["a"].ask("GET", f"/v1/restores/{restore_id}").status_code == 404
    cancelled = trio["b"].ask("POST", f"/v1/restores/{restore_id}/cancel")
    assert (cancelled.status_code, cancelled.json()) == (200, ended), "one that is over stays as it is"


def events(daemon: Any, restore_id: str) -> Iterator[RestoreDocument]:
    with httpx.stream(
        "GET", f"{daemon.url}/v1/restores/{restore_id}/events", timeout=DEADLINE_S, trust_env=False
    ) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        for event in answer.read().decode().split("\n\n")[:-1]:
            name, data = event.split("\n")
            assert name == "event: restore"
            yield RestoreDocument.model_validate_json(data.removeprefix("data: "))


@pytest.mark.parametrize("target", ["a", "b"], ids=["its own", "another node's"])
def test_events_end_with_the_final_state(trio: Trio, target: str) -> None:
    restore_id = trio["a"].restore(target)
    seen = list(events(trio["a"], restore_id))
    assert [e.id for e in seen] == [restore_id] * len(seen)
    assert [e.state for e in seen][-1] == "succeeded"
    assert not any(e.state.is_final for e in seen[:-1])
    assert [e.bytes_done for e in seen] == sorted(e.bytes_done for e in seen)
    assert json.loads(seen[-1].model_dump_json()) == trio["a"].get(f"/v1/restores/{restore_id}")
    assert list(events(trio["a"], restore_id)) == seen[-1:], "of one that is over, one event"


@pytest.mark.parametrize("target", ["a", "b"], ids=["its own", "another node's"])
def test_a_repeated_key_makes_no_second_restore(trio: Trio, target: str) -> None:
    headers = {"Idempotency-Key": f"once for {target}"}
    body = {"target": {"node_id": target}}

    def ask() -> httpx.Response:
        answer: httpx.Response = trio["a"].ask("POST", "/v1/restores", json=body, headers=headers)
        return answer

    with ThreadPoolExecutor(5) as pool:
        answers = [future.result() for future in [pool.submit(ask) for _ in range(5)]]
    assert {answer.status_code for answer in answers} == {202}
    (restore_id,) = {answer.json()["id"] for answer in answers}
    listed = Counter(r["id"] for r in trio[target].get("/v1/restores")["restores"])
    assert listed[restore_id] == 1
    assert ask().json()["id"] == restore_id
    other = {**body, "sources": ["disk"]}
    assert "Idempotency-Key" in problem(trio["a"].ask("POST", "/v1/restores", json=other, headers=headers), 409).detail
    trio["a"].wait_restore(restore_id)


def test_a_key_out_of_its_limits_is_refused(trio: Trio) -> None:
    for key in ("", "k" * 256):
        answer = trio["a"].ask(
            "POST", "/v1/restores", json={"target": {"node_id": "a"}}, headers={"Idempotency-Key": key}
        )
        errors = problem(answer, 422).errors
        assert errors is not None
        assert errors[0].location == "header"

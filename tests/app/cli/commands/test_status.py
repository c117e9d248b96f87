"""`hotspare status`, of real nodes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from typing import Any

import httpx

from shm import attach
from tests.processes import Child
from transfer import Restorer
from transfer.slots import Slots

Hotspare = Callable[..., subprocess.CompletedProcess[str]]
Serving = Callable[..., tuple[str, Child]]


def test_it_shows_a_node_that_waits_and_one_that_is_ready(serving: Serving, hotspare: Hotspare) -> None:
    url, _ = serving("--fill", "none")
    before = json.loads(hotspare("status", "--json", HOTSPARE_URL=url).stdout)
    assert (before["node"]["state"], before["readiness"]["ready"], before["restores"]) == ("waiting", False, [])
    shown = hotspare("status", "--url", url).stdout
    assert "waiting: not published, sealed" in shown
    assert "14 missing" in shown
    assert hotspare("restore", "--node", "node-a", "--wait", "--url", url).returncode == 0
    shown = hotspare("status", "--url", url).stdout
    assert "ready" in shown
    assert "14 of 14 blocks" in shown
    assert "14/14" in shown
    assert "all of them, the oldest" in shown
    assert "succeeded" in shown
    assert "Consumers" not in shown


def test_it_lists_consumers(
    serving: Serving, hotspare: Hotspare, namespace: str, model: str, kept_engines: None
) -> None:
    url, child = serving()
    child.expect("node-a is ready")
    with attach(model, namespace=namespace) as weights, Restorer(url) as restorer:
        tensors = {name: tensor.clone() for name, tensor in weights.expert(3, 5).items()}
        restorer.bind(Slots.plain(tensors))
        restorer.register("rank-3")
        (consumer,) = json.loads(hotspare("status", "--json", "--url", url).stdout)["consumers"]
        assert consumer["id"] == "rank-3"
        assert consumer["session_id"] != restorer.session_id, "what takes writes is an engine of its own"
        shown = hotspare("status", "--url", url).stdout
        assert "rank-3" in shown
        assert "1 in 1" in shown


def test_blocks_that_nobody_has_are_named_up_to_a_number(
    serving: Serving, hotspare: Hotspare, free_port: Callable[[], int], wait_until: Callable[..., Any]
) -> None:
    url, child = serving("--peer", f"node-b=http://127.0.0.1:{free_port()}", "--replicas", "1")  # never there
    child.expect("node-a is ready")
    wait_until(lambda: "unreachable" in hotspare("status", "--url", url).stdout, "node-b given up")
    lost = json.loads(hotspare("status", "--json", "--url", url).stdout)["coverage"]["lost"]
    assert 0 < len(lost) < 14
    first = lost[0]
    assert f"layer {first['layer']} expert {first['expert']}" in hotspare("status", "--url", url).stdout


def test_a_token_is_asked_for_and_shown(serving: Serving, hotspare: Hotspare) -> None:
    url, child = serving("--token", "t0ken")
    child.expect("node-a is ready")
    assert httpx.get(f"{url}/v1/node").status_code == 401
    refused = hotspare("status", "--url", url)
    assert refused.returncode == 1
    assert "token" in refused.stderr
    assert hotspare("status", "--url", url, HOTSPARE_TOKEN="t0ken").returncode == 0
    assert hotspare("status", "--url", url, "--token", "t0ken").returncode == 0


def test_a_node_that_does_not_answer_is_a_failure_that_names_it(
    hotspare: Hotspare, free_port: Callable[[], int]
) -> None:
    port = free_port()
    for command in (["status"], ["restore", "--node", "a"], ["restore", "--node", "a", "--layer", "3"]):
        done = hotspare(*command, HOTSPARE_URL=f"http://127.0.0.1:{port}")
        assert done.returncode == 1
        assert f"127.0.0.1:{port}" in done.stderr
        assert "Traceback" not in done.stderr

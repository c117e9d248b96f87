"""`hotspare restore`, of real nodes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from typing import Any

from app.documents import RestoreRequest
from tests.processes import Child

Hotspare = Callable[..., subprocess.CompletedProcess[str]]
Serving = Callable[..., tuple[str, Child]]


def test_it_restores_what_is_named_and_waits_for_it(serving: Serving, hotspare: Hotspare) -> None:
    url, child = serving("--fill", "none")
    part = hotspare("restore", "--node", "node-a", "--layer", "3", "--wait", "--json", "--url", url)
    assert part.returncode == 0, part.stderr
    document = json.loads(part.stdout)
    assert (document["state"], document["blocks_total"]) == ("succeeded", 7)
    one = hotspare("restore", "--node", "node-a", "--layer", "4", "--expert", "2", "--expert", "6", "--wait",
                   "--source", "disk", "--url", url)  # fmt: skip
    assert one.returncode == 0
    assert "2 of 2 blocks" in one.stdout
    every = hotspare("restore", "--node", "node-a", "--expert", "0", "--wait", "--json", "--url", url)
    assert json.loads(every.stdout)["blocks_total"] == 2
    rest = hotspare("restore", "--node", "node-a", "--wait", "--url", url)
    assert rest.returncode == 0
    assert "14 of 14 blocks" in rest.stdout
    assert "from local" in rest.stdout
    assert "from disk" in rest.stdout
    child.expect("node-a is ready")


def test_without_waiting_it_says_what_it_started(serving: Serving, hotspare: Hotspare) -> None:
    url, child = serving("--fill", "none")
    started = hotspare("restore", "--node", "node-a", "--url", url)
    assert started.returncode == 0
    assert "`hotspare status` shows how far it is" in started.stdout
    child.expect("node-a is ready")


def test_what_cannot_be_restored_is_a_failure_that_says_why(serving: Serving, hotspare: Hotspare) -> None:
    url, _ = serving("--fill", "none")
    for arguments, said in (
        (["--node", "node-x"], "node-x"),
        (["--node", "node-a", "--layer", "0"], "nothing of layer 0"),
        (["--node", "node-a", "--layer", "3", "--expert", "99"], "no expert 99 in layer 3"),
        (["--consumer", "rank-0"], "rank-0"),
        (["--node", "node-a", "--source", "peer", "--wait"], "could not be had"),
    ):
        done = hotspare("restore", *arguments, "--url", url)
        assert done.returncode == 1, arguments
        assert said in done.stderr


def test_read_back_reaches_the_node_for_a_consumer_and_only_when_asked_for(
    odd_peer: Callable[[], Any], hotspare: Hotspare
) -> None:
    peer = odd_peer()
    for flags in (["--read-back"], []):
        hotspare("restore", "--consumer", "rank-3", *flags, "--url", peer.url)
    asked = [RestoreRequest.model_validate_json(body) for body in peer.bodies]
    assert peer.asked == ["POST /v1/restores"] * 2
    assert [(request.target.consumer_id, request.read_back) for request in asked] == [
        ("rank-3", True),
        ("rank-3", False),
    ]


def test_read_back_of_a_node_is_wrong_use_and_says_whose_it_is(hotspare: Hotspare) -> None:
    done = hotspare("restore", "--node", "node-a", "--read-back")
    assert done.returncode == 2
    assert "--read-back" in done.stderr
    assert "for --consumer" in done.stderr

"""An engine that is registered is filled by nodes, for as long as it is bound and whatever becomes of its node."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file

from shm.errors import InvalidInput
from tests.processes import DEADLINE_S
from transfer import Restorer
from transfer.client.http import NodeRefused, NodeUnreachable
from transfer.errors import RestoreError
from transfer.slots import Slots

NOBODY = "http://127.0.0.1:9"


class Rank:
    """Every expert tensor of a checkpoint, under its own name."""

    def __init__(self, checkpoint: Path) -> None:
        stored = load_file(checkpoint / "model.safetensors")
        self.right = {name: tensor for name, tensor in stored.items() if ".experts." in name}
        self.held = {name: tensor.clone() for name, tensor in self.right.items()}
        self.slots = Slots.plain(self.held)

    def wipe(self) -> None:
        for tensor in self.held.values():
            tensor.fill_(-1)

    @property
    def is_right(self) -> bool:
        return all(torch.equal(self.held[name], tensor) for name, tensor in self.right.items())


def restore(url: str, wait_until: Callable[..., Any], **body: Any) -> dict[str, Any]:
    body = {"target": {"consumer_id": "rank-0"}, **body}
    answer = httpx.post(f"{url}/v1/restores", json=body, timeout=DEADLINE_S)
    assert answer.status_code == 202, answer.text
    at = url + answer.headers["location"]

    def ended() -> Any:
        document = httpx.get(at, timeout=DEADLINE_S).json()
        return document if document["state"] in ("succeeded", "failed") else None

    document: dict[str, Any] = wait_until(ended, "ended")
    return document


def consumers(url: str) -> list[str]:
    try:
        return [each["id"] for each in httpx.get(f"{url}/v1/consumers", timeout=DEADLINE_S).json()["consumers"]]
    except httpx.HTTPError:
        return []


def seconds_left(url: str) -> float:
    """Of the registration; none at all where it has ended."""
    return float(httpx.get(f"{url}/v1/consumers/rank-0", timeout=DEADLINE_S).json().get("expires_in_s", 0))


@pytest.mark.usefixtures("kept_engines")
def test_any_node_has_the_slots_filled_until_they_are_let_go(
    tiny_qwen3_moe: Path, cluster: Callable[..., Any], wait_until: Callable[..., Any]
) -> None:
    nodes = cluster("qwen", tiny_qwen3_moe, count=2, replicas=1)
    rank = Rank(tiny_qwen3_moe)
    with Restorer(nodes.urls[0]) as restorer:
        restorer.bind(rank.slots)
        restorer.register("rank-9")
        restorer.register("rank-0", ttl_s=3)
        assert consumers(nodes.urls[0]) == ["rank-0"], "a second registration takes the place of the first"

        wait_until(lambda: seconds_left(nodes.urls[0]) < 2.7, "time passes")
        wait_until(lambda: seconds_left(nodes.urls[0]) > 2.7, "renewed")
        for url in nodes.urls:  # the node that it is registered with, and one that has to ask for it
            rank.wipe()
            done = restore(url, wait_until, read_back=True)
            assert (done["state"], done["error"]) == ("succeeded", None)
            assert done["bytes_by_source"]["local"] > 0 < done["bytes_by_source"]["peer"]
            assert rank.is_right

        restorer.unregister()
        restorer.unregister()
        assert consumers(nodes.urls[0]) == []
        refused = httpx.post(f"{nodes.urls[1]}/v1/restores", json={"target": {"consumer_id": "rank-0"}})
        assert refused.status_code == 404
        restorer.register("rank-0")
        restorer.bind(rank.slots)
        assert consumers(nodes.urls[0]) == [], "bound anew: what was registered is void"
        restorer.register("rank-0")
    assert consumers(nodes.urls[0]) == [], "closed"


@pytest.mark.usefixtures("kept_engines")
def test_a_node_that_was_restarted_is_told_again(
    tiny_qwen3_moe: Path, cluster: Callable[..., Any], wait_until: Callable[..., Any]
) -> None:
    nodes = cluster("qwen", tiny_qwen3_moe, count=1, replicas=1)
    rank = Rank(tiny_qwen3_moe)
    with Restorer(nodes.urls[0]) as restorer:
        restorer.bind(rank.slots)
        rank.wipe()
        restorer.register("rank-0", ttl_s=1.5)
        nodes.kill(0)
        nodes.start_again(0)
        wait_until(lambda: consumers(nodes.urls[0]) == ["rank-0"], "registered again")
        assert restore(nodes.urls[0], wait_until)["state"] == "succeeded"
        assert rank.is_right


def test_what_somebody_else_removed_is_not_registered_again_and_its_memory_is_closed_to_all(
    tiny_qwen3_moe: Path, cluster: Callable[..., Any], wait_until: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """It was, within a third of its time: after 204, when whoever asked for it took it that nothing writes there."""
    nodes = cluster("qwen", tiny_qwen3_moe, count=1, replicas=1)
    rank = Rank(tiny_qwen3_moe)
    with Restorer(nodes.urls[0]) as restorer:
        restorer.bind(rank.slots)
        restorer.register("rank-0", ttl_s=3)
        assert restore(nodes.urls[0], wait_until)["state"] == "succeeded"
        inbox = restorer._inbox
        assert inbox is not None
        assert inbox.is_running
        assert httpx.delete(f"{nodes.urls[0]}/v1/consumers/rank-0", timeout=DEADLINE_S).status_code == 204
        wait_until(lambda: not inbox.is_running, "the engine that took the writes is gone")
        assert consumers(nodes.urls[0]) == []
        assert "was removed by somebody else" in caplog.text
        restorer.unregister()
        restorer.register("rank-0")
        assert consumers(nodes.urls[0]) == ["rank-0"], "who wants it anew says so"


def test_what_a_node_forgot_while_this_process_was_stopped_is_put_again(
    tiny_qwen3_moe: Path, cluster: Callable[..., Any]
) -> None:
    nodes = cluster("qwen", tiny_qwen3_moe, count=1, replicas=1)
    rank = Rank(tiny_qwen3_moe)
    with Restorer(nodes.urls[0]) as restorer:
        restorer.bind(rank.slots)
        restorer.register("rank-0", ttl_s=30)
        registration = restorer._registration
        assert registration is not None
        registration._loop.stop()  # a process that is stopped takes its tests with it
        assert httpx.delete(f"{nodes.urls[0]}/v1/consumers/rank-0", timeout=DEADLINE_S).status_code == 204
        registration._renewed_at_s -= 30
        registration._keep()
        assert consumers(nodes.urls[0]) == ["rank-0"]


@pytest.mark.usefixtures("kept_engines")
def test_a_node_that_went_on_to_other_weights_does_not_take_the_engine_of_the_old_ones(
    tiny_qwen3_moe: Path,
    cluster: Callable[..., Any],
    wait_until: Callable[..., Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Their names and shapes are the same: it would be written with an expert of each as they are asked for."""
    shutil.copytree(tiny_qwen3_moe, tmp_path / "model")
    nodes = cluster("qwen", tmp_path / "model", count=1, replicas=1)
    rank = Rank(tiny_qwen3_moe)
    with Restorer(nodes.urls[0]) as restorer:
        restorer.bind(rank.slots)
        restorer.register("rank-0", ttl_s=1.5)
        nodes.kill(0)
        file = tmp_path / "model" / "model.safetensors"
        image = bytearray(file.read_bytes())
        data = 8 + int.from_bytes(image[:8], "little")  # after the header, which stays as it is
        image[data:] = bytes(byte ^ 1 for byte in image[data:])
        file.write_bytes(image)
        nodes.start_again(0)
        wait_until(lambda: "register with a node of those weights" in caplog.text, "it is told so")
        assert consumers(nodes.urls[0]) == []
        assert rank.is_right


def test_a_transfer_that_was_given_up_on_costs_no_registration(
    tiny_qwen3_moe: Path, cluster: Callable[..., Any], wait_until: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MC_TRANSFER_TIMEOUT", "5")
    nodes = cluster("qwen", tiny_qwen3_moe, count=2, replicas=2)
    rank = Rank(tiny_qwen3_moe)
    with Restorer(nodes.urls[0]) as restorer:
        restorer.bind(rank.slots)
        restorer.register("rank-0")
        os.unlink(nodes.segment(0))
        assert restorer.restore().bytes_by_source["peer"] > 0
        # It stops between our looking and our reading, a moment that cannot be hit from outside.
        monkeypatch.setattr(restorer._control, "silent", lambda *_: set())
        nodes.pause(1)
        assert restorer.restore().ok
        nodes.resume(1)
        rank.wipe()
        assert restore(nodes.urls[0], wait_until)["state"] == "succeeded"
        assert rank.is_right


@pytest.mark.usefixtures("kept_engines")
def test_what_stands_against_a_registration_is_said(tiny_qwen3_moe: Path, cluster: Callable[..., Any]) -> None:
    rank = Rank(tiny_qwen3_moe)
    with Restorer(NOBODY) as restorer:
        with pytest.raises(InvalidInput, match="bind"):
            restorer.register("rank-0")
        restorer.bind(rank.slots)
        with pytest.raises(RestoreError, match=r"manifest could not be had.*refused"):
            restorer.register("rank-0")
    with Restorer(NOBODY, model="qwen", checkpoint=tiny_qwen3_moe) as restorer:
        restorer.bind(rank.slots)
        with pytest.raises(RestoreError, match="nothing proves"):
            restorer.register("rank-0")
        restorer.bind(rank.slots, proof="none")
        with pytest.raises(NodeUnreachable, match="ConnectError"):
            restorer.register("rank-0")
    nodes = cluster("qwen", tiny_qwen3_moe, count=1, replicas=1)
    with Restorer(nodes.urls[0]) as restorer:
        restorer.bind(rank.slots)
        with pytest.raises(NodeRefused, match="ttl_s"):
            restorer.register("rank-0", ttl_s=0.01)
        assert consumers(nodes.urls[0]) == []

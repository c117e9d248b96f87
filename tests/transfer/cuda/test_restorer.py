"""A rank whose slots are in GPU memory is filled from every source, behind what its engine has queued."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file

from transfer import Restorer
from transfer.checkpoint import read_checkpoint
from transfer.slots import Slots
from transfer.slots.layouts import SlotMismatch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
# Where there are several, one that is not current, as for most ranks of a host.
DEVICE = f"cuda:{torch.cuda.device_count() - 1}" if torch.cuda.is_available() else "cpu"
ELSEWHERE = "elsewhere"  # a model name that finds no segment on this host, so that peers serve
BUSY_ROUNDS = 20


class Rank:
    """The second half of each layer's physical experts, two of which another slot holds too."""

    def __init__(self, checkpoint: Path, tp_rank: int, tp_size: int) -> None:
        stored = load_file(checkpoint / "model.safetensors")
        manifest = read_checkpoint(checkpoint, "qwen").manifest
        experts = [*sorted({key.expert for key in manifest.keys}), 0, 3, 4]
        mine = experts[len(experts) // 2 :]
        self.right: dict[str, torch.Tensor] = {}
        layers = sorted({key.layer for key in manifest.keys})
        for layer in layers:
            stem = f"model.layers.{layer}.mlp.experts."
            parts = {
                part: [
                    stored[f"{stem}{e}.{part}_proj.weight"].chunk(tp_size, 1 if part == "down" else 0)[tp_rank]
                    for e in mine
                ]
                for part in ("gate", "up", "down")
            }
            halves = zip(parts["gate"], parts["up"], strict=True)
            self.right[f"{stem}w13_weight"] = torch.stack([torch.cat(pair) for pair in halves])
            self.right[f"{stem}w2_weight"] = torch.stack(parts["down"]).contiguous()
        self.held = {name: tensor.to(DEVICE) for name, tensor in self.right.items()}
        self.slots = Slots.fused(
            self.held, physical_to_logical=dict.fromkeys(layers, experts), ep_rank=1, ep_size=2,
            tp_rank=tp_rank, tp_size=tp_size,
        )  # fmt: skip

    def spoil_when_done(self) -> None:
        """Noise over the slots, behind work that takes the device a while."""
        busy = torch.rand(4096, 4096, device=DEVICE)
        for _ in range(BUSY_ROUNDS):
            busy = busy @ busy * 1e-4
        for tensor in self.held.values():
            tensor.view(torch.uint8).fill_(0xA5)

    @property
    def is_right(self) -> bool:
        return all(torch.equal(self.held[name].cpu(), tensor) for name, tensor in self.right.items())


@pytest.mark.parametrize("options", [{}, {"model": ELSEWHERE}, {"model": ELSEWHERE, "straight": True}], ids=str)
@pytest.mark.parametrize(("tp_rank", "tp_size"), [(0, 1), (1, 2)])
def test_slots_hold_the_experts_whatever_the_engine_had_queued(
    options: dict[str, Any], tp_rank: int, tp_size: int, tiny_qwen3_moe: Path, cluster: Callable[..., Any],
    wait_until: Callable[..., Any],
) -> None:  # fmt: skip
    nodes = cluster("qwen", tiny_qwen3_moe, count=2, replicas=1)
    rank = Rank(tiny_qwen3_moe, tp_rank, tp_size)
    with Restorer(nodes.urls[0], **options) as restorer:
        # Parts of blocks are compared with this host's segment, and here that has not a block of every layer.
        restorer.bind(rank.slots, proof="whole" if tp_size == 1 else "none")
        for stream in (nullcontext(), torch.cuda.stream(torch.cuda.Stream(DEVICE))):
            with stream:
                rank.spoil_when_done()
                report = restorer.restore()
            assert report.ok, [report.failed[:1], report.notes]
            assert report.bytes_by_source["peer"] > 0
            assert (report.bytes_by_source["local"] > 0) == (not options)
            assert rank.is_right

        rank.spoil_when_done()
        torch.cuda.synchronize(DEVICE)
        restorer.register("rank")
        body = {"target": {"consumer_id": "rank"}, "read_back": True}
        answer = httpx.post(f"{nodes.urls[1]}/v1/restores", json=body, timeout=20)
        at = nodes.urls[1] + answer.headers["location"]
        wait_until(lambda: httpx.get(at).json()["state"] in ("succeeded", "failed"), "ended")
        assert httpx.get(at).json()["state"] == "succeeded"
        assert rank.is_right


def test_a_segment_that_is_page_locked_in_several_pieces_is_copied_all_the_same(
    tiny_qwen3_moe: Path, cluster: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shm.pinning.PIECE_NBYTES", 2 * 16384)  # a block has 11,520 bytes: two in a piece
    nodes = cluster("qwen", tiny_qwen3_moe, count=1, replicas=1)
    rank = Rank(tiny_qwen3_moe, 0, 1)
    with Restorer(nodes.urls[0]) as restorer:
        restorer.bind(rank.slots)
        rank.spoil_when_done()
        report = restorer.restore()
    assert report.ok, report
    assert report.bytes_by_source["local"] == report.bytes_total
    assert rank.is_right


@pytest.mark.parametrize("checksums_on", ["device", "processor"])
@pytest.mark.parametrize(("tp_rank", "tp_size"), [(0, 1), (1, 2)])
def test_one_bit_in_a_slot_is_found_by_whoever_takes_the_checksum(
    checksums_on: str, tp_rank: int, tp_size: int, tiny_qwen3_moe: Path, cluster: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if checksums_on == "processor":
        monkeypatch.setattr("transfer.cuda.checksum.can_take", lambda _: False)
    nodes = cluster("qwen", tiny_qwen3_moe, count=1, replicas=1)
    rank = Rank(tiny_qwen3_moe, tp_rank, tp_size)
    with Restorer(nodes.urls[0]) as restorer:
        report = restorer.bind(rank.slots)
        assert (report.ok, report.experts_proved) == (True, report.experts_total)
        for name, slot, part in (("w13_weight", 0, "gate"), ("w13_weight", 2, "up"), ("w2_weight", 3, "down")):
            raw = rank.held[f"model.layers.1.mlp.experts.{name}"][slot].view(torch.uint8)
            raw[-1 if part == "up" else 0, -1] ^= 1
            with pytest.raises(SlotMismatch, match=rf"slot {slot} of .*{name} does not hold .*{part}_proj"):
                restorer.bind(rank.slots)
            raw[-1 if part == "up" else 0, -1] ^= 1
        assert rank.is_right


def test_what_the_engine_has_queued_is_waited_for_before_slots_are_looked_at(
    tiny_qwen3_moe: Path, cluster: Callable[..., Any]
) -> None:
    nodes = cluster("qwen", tiny_qwen3_moe, count=1, replicas=1)
    rank = Rank(tiny_qwen3_moe, 0, 1)
    for stream in (nullcontext(), torch.cuda.stream(torch.cuda.Stream(DEVICE))):
        with Restorer(nodes.urls[0]) as restorer, stream:
            rank.spoil_when_done()
            for name, tensor in rank.right.items():
                rank.held[name].copy_(tensor.to(DEVICE), non_blocking=True)
            assert restorer.bind(rank.slots).ok

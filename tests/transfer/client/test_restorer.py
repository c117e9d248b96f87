"""A restorer brings what can be had, says what cannot, and survives whatever its sources do."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shm.block import ExpertKey, TensorEntry
from shm.checksum import checksum
from shm.errors import InvalidInput
from shm.layout import SegmentName
from shm.manifest import FileSpec, Manifest
from shm.segment import Segment
from tests.processes import DEADLINE_S
from transfer import Restorer
from transfer.checkpoint import read_checkpoint
from transfer.client.engine_lease import EngineLease
from transfer.client.report import SlotReport
from transfer.cuda.driver import DeviceFailed
from transfer.engine import Copy, DisposableEngine, MooncakeEngine
from transfer.engine.double import Network
from transfer.errors import EngineRefused, TransferFailed
from transfer.slots import SlotRef, Slots
from transfer.slots.layouts import NO_EXPERT, SlotMismatch

NOBODY = "http://127.0.0.1:9"  # the discard port: nothing listens
PATIENT_S = 77  # what the engine may wait; for the first word of a stopped process it waits a minute anyhow
RESTORED_WITHIN_S = 40  # far less than that, and far more than a restore takes on a busy machine
LAYERS, EXPERTS, HIDDEN, ROWS = 2, 5, 24, 7
STEM = "model.layers.{layer}.mlp.experts.{expert}."
SHAPES = {"gate_proj": (ROWS, HIDDEN), "up_proj": (ROWS, HIDDEN), "down_proj": (HIDDEN, ROWS)}


def make_manifest() -> Manifest:
    blocks = {
        ExpertKey(layer, expert): [
            TensorEntry(STEM + f"{name}.weight", "BF16", shape, 0, 0) for name, shape in SHAPES.items()
        ]
        for layer in range(LAYERS)
        for expert in range(EXPERTS)
    }
    return Manifest.build("tiny", "test", "experts", [FileSpec("f", 1 << 20, "0" * 32)], blocks)


class Owner:
    """A sealed segment with random blocks, held by this process as a daemon would."""

    def __init__(self, engine: MooncakeEngine, absent: frozenset[ExpertKey] = frozenset()) -> None:
        self.engine = engine
        self.manifest = make_manifest()
        self.name = SegmentName(f"test-{secrets.token_hex(6)}", "tiny", "here")
        self.fill(absent)

    def fill(self, absent: frozenset[ExpertKey] = frozenset()) -> None:
        rows = [row for row, key in enumerate(self.manifest.keys) if key not in absent]
        self.segment = Segment.claim(self.name)
        self.segment.allocate(self.manifest, rows)
        generator = torch.Generator().manual_seed(5)
        for row in rows:
            block = self.segment.block(row)
            for tensor in self.manifest.schema(row).tensors:
                values = torch.randn(tensor.nbytes // 2, generator=generator).to(torch.bfloat16)
                block[tensor.offset : tensor.offset + tensor.nbytes] = values.view(torch.uint8).numpy().tobytes()
            self.segment.publish(row, checksum(block))
        self.segment.seal()

    def tensor(self, layer: int, expert: int, name: str) -> torch.Tensor:
        row = self.manifest.index(layer, expert)
        template = next(t for t in self.manifest.schema(row).tensors if name in t.name)
        raw = bytes(self.segment.block(row)[template.offset : template.offset + template.nbytes])
        return torch.frombuffer(bytearray(raw), dtype=torch.bfloat16).view(template.shape)

    def restorer(self, **options: Any) -> Restorer:
        # Starting an engine takes a second, so the tests that need none of their own share one.
        options = {"engine": self.engine, **options}
        return Restorer(NOBODY, model="tiny", namespace=self.name.namespace, **options)


@pytest.fixture(scope="module")
def engine() -> MooncakeEngine:
    return MooncakeEngine("127.0.0.1")


@pytest.fixture
def owner(engine: MooncakeEngine) -> Iterator[Owner]:
    made = Owner(engine)
    yield made
    made.segment.unlink()


def parameters(slots: int = EXPERTS, *, tp: int = 1, fill: float = -1.0) -> dict[str, torch.Tensor]:
    rows = ROWS // tp
    return {
        f"model.layers.{layer}.mlp.experts.{part}_weight": torch.full(shape, fill, dtype=torch.bfloat16)
        for layer in range(LAYERS)
        for part, shape in (("w13", (slots, 2 * rows, HIDDEN)), ("w2", (slots, HIDDEN, rows)))
    }


def assert_slot(owner: Owner, held: dict[str, torch.Tensor], layer: int, slot: int, expert: int) -> None:
    w13, w2 = (held[f"model.layers.{layer}.mlp.experts.{part}_weight"][slot] for part in ("w13", "w2"))
    assert torch.equal(w13[:ROWS], owner.tensor(layer, expert, "gate_proj"))
    assert torch.equal(w13[ROWS:], owner.tensor(layer, expert, "up_proj"))
    assert torch.equal(w2, owner.tensor(layer, expert, "down_proj"))


def assert_untouched(held: dict[str, torch.Tensor], layer: int, slot: int) -> None:
    for part in ("w13", "w2"):
        assert (held[f"model.layers.{layer}.mlp.experts.{part}_weight"][slot] == -1).all()


# -- from this host's segment --------------------------------------------------------------------------------


def test_with_no_daemon_every_slot_is_filled_from_the_attached_segment(owner: Owner) -> None:
    held = parameters()
    seen: list[SlotReport] = []
    with owner.restorer() as restorer:
        restorer.bind(Slots.fused(held), proof="none")
        for _ in range(2):  # once more does no harm
            report = restorer.restore(progress=seen.append)
            total = int(owner.manifest.nbytes.sum())
            assert (report.ok, report.experts_done, report.failed) == (True, LAYERS * EXPERTS, ())
            assert report.bytes_by_source == {"local": total, "peer": 0, "disk": 0}
            assert (report.bytes_done, report.bytes_total) == (total, total)
            assert seen[-1] == report
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            assert_slot(owner, held, layer, expert, expert)


def test_only_the_experts_asked_for_are_touched(owner: Owner) -> None:
    held = parameters()
    with owner.restorer() as restorer:
        restorer.bind(Slots.fused(held), proof="none")
        assert restorer.restore([(1, 3), (0, 2), (1, 3)]).experts_done == 2
        assert restorer.restore(predicate=lambda name: ".0.mlp.experts.4.up" in name).experts_done == 1
        assert restorer.restore(predicate=lambda name: False).ok
    for layer in range(LAYERS):
        for slot in range(EXPERTS):
            if (layer, slot) in {(1, 3), (0, 2), (0, 4)}:
                assert_slot(owner, held, layer, slot, slot)
            else:
                assert_untouched(held, layer, slot)


def test_a_redundant_expert_is_counted_once_and_lies_in_each_of_its_slots(owner: Owner) -> None:
    held = parameters(slots=4)
    placement = [[3, 0, 3, NO_EXPERT, 4, 2, 1, 3]] * LAYERS
    with owner.restorer() as restorer:
        restorer.bind(Slots.fused(held, physical_to_logical=placement, ep_rank=0, ep_size=2), proof="none")
        report = restorer.restore()
    assert (report.experts_total, report.bytes_total) == (4, int(owner.manifest.nbytes[:1].sum()) * 4)
    for layer in range(LAYERS):
        for slot, expert in ((0, 3), (1, 0), (2, 3)):
            assert_slot(owner, held, layer, slot, expert)
        assert_untouched(held, layer, 3)


def test_a_rank_without_experts_has_nothing_to_restore(owner: Owner) -> None:
    held = parameters(2)
    placement = [*range(EXPERTS), NO_EXPERT, NO_EXPERT, NO_EXPERT]
    slots = Slots.fused(held, physical_to_logical=dict.fromkeys(range(LAYERS), placement), ep_rank=3, ep_size=4)
    with owner.restorer() as restorer:
        restorer.bind(slots, proof="none")
        report = restorer.restore()
    assert (report.ok, report.experts_total, report.failed) == (True, 0, ())
    assert_untouched(held, 1, 1)


@pytest.mark.parametrize("rank", range(ROWS))
def test_a_tensor_parallel_part_is_filled_from_whole_blocks(owner: Owner, rank: int) -> None:
    held = parameters(tp=ROWS)
    with owner.restorer() as restorer:
        restorer.bind(Slots.fused(held, tp_rank=rank, tp_size=ROWS), proof="none")
        assert restorer.restore().ok
    w13, w2 = (held[f"model.layers.1.mlp.experts.{part}_weight"][3] for part in ("w13", "w2"))
    assert torch.equal(w13[0], owner.tensor(1, 3, "gate_proj")[rank])
    assert torch.equal(w13[1], owner.tensor(1, 3, "up_proj")[rank])
    assert torch.equal(w2[:, 0], owner.tensor(1, 3, "down_proj")[:, rank])


@pytest.mark.parametrize("tp", [1, ROWS])
def test_a_block_whose_bytes_changed_is_listed_with_its_slots_and_the_others_come(owner: Owner, tp: int) -> None:
    row = owner.manifest.index(1, 2)
    owner.segment.block(row)[100] ^= 1
    held = parameters(tp=tp)
    with owner.restorer() as restorer:
        restorer.bind(Slots.fused(held, tp_size=tp), proof="none")
        report = restorer.restore()
    assert not report.ok
    assert report.experts_done == LAYERS * EXPERTS - 1
    (failed,) = report.failed
    assert failed.key == ExpertKey(1, 2)
    assert set(failed.slots) == {SlotRef(f"model.layers.1.mlp.experts.{part}_weight", 2) for part in ("w13", "w2")}
    assert "checksum" in failed.reason
    assert any(NOBODY in note for note in report.notes)


def test_a_quarantined_block_is_not_taken(owner: Owner) -> None:
    held = parameters()
    owner.segment.quarantine(owner.manifest.index(0, 4))
    with owner.restorer() as restorer:
        restorer.bind(Slots.fused(held), proof="none")
        report = restorer.restore()
    assert [f.key for f in report.failed] == [ExpertKey(0, 4)]
    assert_untouched(held, 0, 4)


def test_blocks_of_an_extended_segment_are_had_at_the_next_restore(engine: MooncakeEngine) -> None:
    late = ExpertKey(1, 4)
    owner = Owner(engine, absent=frozenset({late}))
    held = parameters()
    try:
        with owner.restorer() as restorer:
            restorer.bind(Slots.fused(held), proof="none")
            assert [f.key for f in restorer.restore().failed] == [late]
            row = owner.manifest.index(*late)
            owner.segment.extend([row])
            owner.segment.block(row)[:] = bytes(owner.segment.block(row - 1))
            owner.segment.publish(row, checksum(owner.segment.block(row)))
            assert restorer.restore().ok
        assert_slot(owner, held, 1, 4, 4)
    finally:
        owner.segment.unlink()


def test_a_segment_that_is_gone_is_let_go_and_its_successor_attached(owner: Owner) -> None:
    held = parameters()
    with owner.restorer() as restorer:
        restorer.bind(Slots.fused(held), proof="none")
        assert restorer.restore().ok
        owner.segment.unlink()
        report = restorer.restore()
        assert (report.experts_done, len(report.failed)) == (0, LAYERS * EXPERTS)
        owner.fill()
        for tensor in held.values():
            tensor.fill_(-1)
        assert restorer.restore().ok
    assert_slot(owner, held, 0, 1, 1)


def test_a_segment_cut_short_is_reported_not_mapped(owner: Owner) -> None:
    held = parameters()
    with owner.restorer(node="here") as restorer:
        restorer.bind(Slots.fused(held), proof="none")
        os.truncate(f"/dev/shm/{owner.name.object_name}", 8192)
        report = restorer.restore()
    assert report.experts_done == 0
    assert any("its header says" in note for note in report.notes)
    for slot in range(EXPERTS):
        assert_untouched(held, 0, slot)


# -- binding -------------------------------------------------------------------------------------------------


def test_slots_of_another_shape_are_refused_before_a_byte_moves(owner: Owner) -> None:
    held = {name: tensor[..., :-1].clone() for name, tensor in parameters().items() if "w13" in name}
    held |= {name: tensor[:, :-1].clone() for name, tensor in parameters().items() if "w2" in name}
    with owner.restorer() as restorer, pytest.raises(SlotMismatch, match="in the checkpoint"):
        restorer.bind(Slots.fused(held), proof="none")


def test_a_parameter_that_moved_is_refused_before_a_byte_moves(owner: Owner) -> None:
    held = parameters()
    with owner.restorer() as restorer:
        restorer.bind(Slots.fused(held), proof="none")
        moved = next(iter(held.values()))
        moved.data = moved.data.clone()
        with pytest.raises(SlotMismatch, match="has moved in memory"):
            restorer.restore()
        assert all((tensor == -1).all() for tensor in held.values())
        restorer.bind(Slots.fused(held), proof="none")
        assert restorer.restore().ok


def test_what_the_caller_gets_wrong_is_refused(owner: Owner) -> None:
    with owner.restorer() as restorer:
        with pytest.raises(InvalidInput, match="bind"):
            restorer.restore()
        restorer.bind(Slots.fused(parameters()), proof="none")
        with pytest.raises(InvalidInput, match="expert 5 of layer 1"):
            restorer.restore([(1, EXPERTS)])
    with pytest.raises(InvalidInput, match="URL"):
        Restorer("127.0.0.1:8470")


def test_before_any_segment_is_there_everything_is_listed_and_later_it_comes(owner: Owner) -> None:
    held = parameters()
    owner.segment.unlink()
    with owner.restorer() as restorer:
        restorer.bind(Slots.fused(held), proof="none")
        report = restorer.restore()
        assert (report.ok, len(report.failed)) == (False, LAYERS * EXPERTS)
        assert all(len(failed.slots) == 2 for failed in report.failed)
        assert any("no segment of tiny" in note for note in report.notes)
        owner.fill()
        assert restorer.restore().ok


def test_a_device_that_fails_is_reported_and_not_raised(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise DeviceFailed("3,333 bytes on cuda:1 could not be had")

    owner.segment.unlink()
    with owner.restorer() as restorer:
        restorer.bind(Slots.fused(parameters()), proof="none")
        owner.fill()
        with monkeypatch.context() as patch:
            patch.setattr("transfer.client.restorer.BoundSlots", fail)
            report = restorer.restore()
        assert {failed.reason for failed in report.failed} == {"3,333 bytes on cuda:1 could not be had"}
        with monkeypatch.context() as patch:
            patch.setattr("transfer.slots.host.HostSlots.follow", fail)
            report = restorer.restore()
        assert len(report.failed) == LAYERS * EXPERTS
        assert "3,333 bytes on cuda:1 could not be had" in report.notes
        assert restorer.restore().ok


def test_a_failing_progress_callback_stops_nothing(owner: Owner, caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: SlotReport) -> None:
        raise RuntimeError("full")

    with owner.restorer() as restorer:
        restorer.bind(Slots.fused(parameters()), proof="none")
        assert restorer.restore(progress=fail).ok
    assert "the progress callback failed" in caplog.text


def test_restores_from_several_threads_follow_each_other(owner: Owner) -> None:
    held = parameters()
    reports: list[SlotReport] = []
    with owner.restorer() as restorer:
        restorer.bind(Slots.fused(held), proof="none")
        threads = [threading.Thread(target=lambda: reports.append(restorer.restore())) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [report.ok for report in reports] == [True] * 4
    assert_slot(owner, held, 1, 1, 1)


def test_importing_transfer_brings_neither_torch_nor_httpx() -> None:
    code = "import sys, transfer; assert not {'torch', 'httpx', 'mooncake'} & set(sys.modules), sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


# -- from peers and disk -------------------------------------------------------------------------------------


class Rank:
    """A rank with all experts of a checkpoint in fused parameters, and the right bytes to compare with."""

    def __init__(self, checkpoint: Path, model: str, *, tp: int = 1) -> None:
        from safetensors.torch import load_file

        self.manifest = read_checkpoint(checkpoint, model).manifest
        content = load_file(checkpoint / "model.safetensors")
        self.right: dict[str, torch.Tensor] = {}
        layers = sorted({key.layer for key in self.manifest.keys})
        experts = sorted({key.expert for key in self.manifest.keys})
        for layer in layers:
            stem = f"model.layers.{layer}.mlp.experts."

            def part(name: str, stem: str = stem) -> list[torch.Tensor]:
                return [content[f"{stem}{expert}.{name}_proj.weight"] for expert in experts]

            halves = zip(part("gate"), part("up"), strict=True)
            w13 = torch.stack([torch.cat([g[: len(g) // tp], u[: len(u) // tp]]) for g, u in halves])
            w2 = torch.stack([d[:, : d.shape[1] // tp] for d in part("down")])
            self.right |= {stem + "w13_weight": w13, stem + "w2_weight": w2.contiguous()}
        self.held = {name: tensor.clone() for name, tensor in self.right.items()}
        self.slots = Slots.fused(self.held, tp_size=tp)

    def wipe(self) -> None:
        for tensor in self.held.values():
            tensor.fill_(-1)

    @property
    def is_right(self) -> bool:
        return all(torch.equal(self.held[name], tensor) for name, tensor in self.right.items())


@pytest.mark.parametrize(("tp", "lent"), [(1, False), (1, True), (5, False)], ids=["straight", "lent engine", "parts"])
@pytest.mark.usefixtures("kept_engines")
def test_peers_serve_until_the_last_and_then_the_disk(
    tp: int, lent: bool, tiny_qwen3_moe: Path, cluster: Callable[..., Any]
) -> None:
    nodes = cluster("qwen", tiny_qwen3_moe)
    rank = Rank(tiny_qwen3_moe, "qwen", tp=tp)
    engine = MooncakeEngine("127.0.0.1")._engine if lent else None
    with Restorer(nodes.urls[0], checkpoint=tiny_qwen3_moe, engine=engine) as restorer:
        restorer.bind(rank.slots)
        rank.wipe()
        nodes.kill(0)
        os.unlink(nodes.segment(0))
        report = restorer.restore()
        assert report.ok, report
        assert report.bytes_by_source == {"local": 0, "peer": report.bytes_total, "disk": 0}
        assert rank.is_right

        nodes.kill(1)  # the map may still name it: then the next replica, or the disk, serves
        rank.wipe()
        report = restorer.restore()
        assert report.ok, report
        assert report.bytes_by_source["peer"] > 0
        assert report.bytes_by_source["disk"] > 0
        assert rank.is_right

        nodes.kill(2)
        rank.wipe()
        report = restorer.restore()
        assert report.bytes_by_source == {"local": 0, "peer": 0, "disk": report.bytes_total}
        assert rank.is_right


@pytest.mark.usefixtures("kept_engines")
def test_a_peer_that_was_restarted_is_found_under_its_new_session(
    tiny_qwen3_moe: Path, cluster: Callable[..., Any]
) -> None:
    nodes = cluster("qwen", tiny_qwen3_moe, count=2, replicas=2)
    rank = Rank(tiny_qwen3_moe, "qwen")
    with Restorer(nodes.urls[0]) as restorer:
        restorer.bind(rank.slots)
        rank.wipe()
        nodes.kill(0)
        os.unlink(nodes.segment(0))
        nodes.kill(1)
        nodes.start_again(1)
        report = restorer.restore()
        assert report.ok, report
        assert rank.is_right


def spoil(segment: str) -> None:
    """Flip a bit of the last block."""
    with open(segment, "r+b") as file:
        file.seek(-7000, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.usefixtures("kept_engines")
def test_a_rotten_block_comes_from_the_next_replica_and_its_holder_mends_it(
    tiny_qwen3_moe: Path, cluster: Callable[..., Any], wait_until: Callable[..., Any]
) -> None:
    nodes = cluster("qwen", tiny_qwen3_moe, count=2, replicas=2, scrub_rate=1)  # by itself it would come by in hours
    rank = Rank(tiny_qwen3_moe, "qwen")
    with Restorer(nodes.urls[0]) as restorer:
        restorer.bind(rank.slots)
        rank.wipe()
        spoil(nodes.segment(0))
        report = restorer.restore()
        assert report.ok, report
        assert report.bytes_by_source["peer"] == int(rank.manifest.nbytes[-1])
        assert rank.is_right
        wait_until(lambda: restorer.restore().bytes_by_source["peer"] == 0, "its node has mended it")


@pytest.mark.usefixtures("kept_engines")
def test_a_block_that_is_rotten_at_the_last_peer_is_mended_there(
    tiny_qwen3_moe: Path, cluster: Callable[..., Any], wait_until: Callable[..., Any]
) -> None:
    nodes = cluster("qwen", tiny_qwen3_moe, count=2, replicas=2, scrub_rate=1)
    rank = Rank(tiny_qwen3_moe, "qwen")
    with Restorer(nodes.urls[0]) as restorer:
        restorer.bind(rank.slots)
        rank.wipe()
        nodes.kill(0)
        os.unlink(nodes.segment(0))
        spoil(nodes.segment(1))
        (failed,) = restorer.restore().failed
        assert failed.key == rank.manifest.keys[-1]
        wait_until(lambda: restorer.restore().ok, "the peer has mended it, from its disk")
        assert rank.is_right


@pytest.mark.usefixtures("kept_engines")
def test_slots_in_too_many_ranges_are_filled_by_way_of_host_buffers(
    tiny_qwen3_moe: Path, cluster: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mooncake takes time that grows with the square of the ranges: five minutes for one tensor each of DeepSeek-V3."""
    monkeypatch.setattr("transfer.engine.protocol.RANGES_MAX", 2)
    nodes = cluster("qwen", tiny_qwen3_moe, count=2, replicas=1)
    rank = Rank(tiny_qwen3_moe, "qwen")
    with Restorer(nodes.urls[0]) as restorer:
        restorer.bind(rank.slots)
        rank.wipe()
        report = restorer.restore()
        assert report.ok, report
        assert report.bytes_by_source["peer"] > 0
        assert rank.is_right
        assert any("too many to register" in note for note in report.notes)
        with pytest.raises(EngineRefused, match="keep experts in fewer, larger tensors"):
            restorer.register("rank-0")


@pytest.mark.usefixtures("kept_engines")
def test_a_stopped_node_is_left_aside(
    tiny_qwen3_moe: Path, cluster: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MC_TRANSFER_TIMEOUT", str(PATIENT_S))
    nodes = cluster("qwen", tiny_qwen3_moe, count=2, replicas=2)
    rank = Rank(tiny_qwen3_moe, "qwen")
    with Restorer(nodes.urls[0]) as restorer:
        restorer.bind(rank.slots)
        rank.wipe()
        os.unlink(nodes.segment(0))
        nodes.pause(1)
        report = restorer.restore()  # our own daemon still has the memory, under no name
    assert report.ok, report
    assert rank.is_right
    assert report.seconds < RESTORED_WITHIN_S, "the transfer engine alone would wait that long"


def test_what_a_peer_sends_after_it_timed_out_reaches_no_slot(
    tiny_qwen3_moe: Path, cluster: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MC_TRANSFER_TIMEOUT", "5")
    nodes = cluster("qwen", tiny_qwen3_moe, count=2, replicas=2)
    rank = Rank(tiny_qwen3_moe, "qwen")
    with Restorer(nodes.urls[0]) as restorer:
        restorer.bind(rank.slots)
        rank.wipe()
        os.unlink(nodes.segment(0))
        assert restorer.restore().bytes_by_source["peer"] > 0
        # It stops between our looking and our reading, a moment that cannot be hit from outside.
        monkeypatch.setattr(restorer._control, "silent", lambda *_: set())
        nodes.pause(1)
        rank.wipe()
        report = restorer.restore()
        assert report.ok, report
        assert rank.is_right
        rank.wipe()
        nodes.resume(1)
        nodes.wait_ready(1)
        assert not rank.is_right
        assert all((tensor == -1).all() for tensor in rank.held.values())
        assert restorer.restore().ok
        assert rank.is_right


@pytest.mark.parametrize("tp", [1, 5], ids=["straight", "parts"])
def test_what_is_closed_while_a_stopped_peer_is_read_from_is_not_written_to_when_it_wakes(
    tiny_qwen3_moe: Path, cluster: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tp: int
) -> None:
    """Whoever closes frees the memory, or uses it for something else, at once."""
    monkeypatch.setenv("MC_TRANSFER_TIMEOUT", "5")
    nodes = cluster("qwen", tiny_qwen3_moe, count=2, replicas=2)
    rank = Rank(tiny_qwen3_moe, "qwen", tp=tp)
    restorer = Restorer(nodes.urls[0])
    restorer.bind(rank.slots, lost="all", proof="none")
    os.unlink(nodes.segment(0))
    assert restorer.restore().bytes_by_source["peer"] > 0
    monkeypatch.setattr(restorer._control, "silent", lambda *_: set())
    nodes.pause(1)
    begun = threading.Event()
    restoring = threading.Thread(target=restorer.restore, kwargs={"progress": lambda report: begun.set()})
    restoring.start()
    assert begun.wait(DEADLINE_S)
    restorer.close()
    rank.wipe()
    restoring.join(DEADLINE_S)
    assert not restoring.is_alive()
    nodes.resume(1)
    nodes.wait_ready(1)
    assert all((tensor == -1).all() for tensor in rank.held.values())


def test_closing_ends_what_a_fence_could_not_end_before(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network()
    lease = EngineLease(None, "127.0.0.1", "tcp", ("127.0.0.1", 9))
    monkeypatch.setattr(lease, "another", lambda: DisposableEngine(network.engine))
    engine, peer = lease.start(), network.engine()
    memory = np.zeros(3333, np.uint8)
    theirs = np.full(3333, 7, np.uint8)
    peer.register([(theirs.ctypes.data, theirs.nbytes)])
    network.stop(peer.session_id)
    with pytest.raises(TransferFailed):
        engine.read(peer.session_id, [Copy(memory.ctypes.data, theirs.ctypes.data, 3333)])
    lease.drop()
    network.wake(peer.session_id)  # `engine` is held here still, as by whoever had asked for it
    assert not memory.any()


@pytest.mark.usefixtures("kept_engines")
def test_the_token_is_that_of_the_environment_unless_one_is_given(
    tiny_qwen3_moe: Path, serve: Callable[..., Any], free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    options = {"checkpoint": tiny_qwen3_moe, "model": "qwen", "fill": "disk", "token": "t0ken"}
    node = serve("node-0", {"node-0": port}, **options).wait_ready()
    monkeypatch.setenv("HOTSPARE_TOKEN", "t0ken")
    rank = Rank(tiny_qwen3_moe, "qwen")
    with Restorer(node.url) as restorer:
        restorer.bind(rank.slots)
        rank.wipe()
        assert restorer.restore().ok
    with Restorer(node.url, token="another") as restorer:
        restorer.bind(rank.slots)
        assert "401" in " ".join(restorer.restore().notes)

"""Bytes decide what is restored: slots that are not what their names say are refused, and nothing is written there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shm.block import ExpertKey
from shm.errors import InvalidInput, SegmentNotFound
from tests.transfer.client.keeper import NOBODY, Keeper
from tests.transfer.slots.checkpoints import FP8, PARTS, STEM, Model, fused_parameters, noise, per_expert, raw, same
from transfer import Restorer
from transfer.client.report import SlotReport
from transfer.engine import MooncakeEngine
from transfer.errors import RestoreError
from transfer.slots import NO_EXPERT, Slots
from transfer.slots.layouts import SlotMismatch

LAYERS, EXPERTS, HIDDEN, INNER = (0, 1, 2), 4, 10, 6
Parameters = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def engine() -> MooncakeEngine:
    return MooncakeEngine("127.0.0.1")


@pytest.fixture
def keep(engine: MooncakeEngine) -> Iterator[Callable[..., Keeper]]:
    """`keep(model, absent)` → a segment of it."""
    made: list[Keeper] = []

    def make(model: Model, absent: Any = ()) -> Keeper:
        made.append(Keeper(model, engine, absent))
        return made[-1]

    yield make
    for keeper in made:
        keeper.segment.unlink()


@pytest.fixture
def model() -> Model:
    return per_expert(LAYERS, EXPERTS, HIDDEN, INNER, torch.bfloat16)


def loaded(model: Model, slots: int = EXPERTS, dtype: torch.dtype = torch.bfloat16, **described: Any) -> Parameters:
    """Parameters as an engine has them once it loaded the model so."""
    parameters = fused_parameters(LAYERS, slots, HIDDEN, INNER // described.get("tp_size", 1), dtype)
    model.fill(Slots.fused(parameters, **described).plan(model.manifest))
    return parameters


def copies(parameters: Mapping[str, torch.Tensor]) -> Parameters:
    return {name: tensor.clone() for name, tensor in parameters.items()}


def spoil(parameters: Mapping[str, torch.Tensor], slot: int | slice = slice(None), layer: str = "") -> None:
    for name, tensor in parameters.items():
        if layer in name:
            raw_bytes = tensor[slot].view(torch.uint8)
            raw_bytes.random_(0, 256)


def is_same(parameters: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return all(same(tensor, other[name]) for name, tensor in parameters.items())


def refused(keeper: Keeper, slots: Slots, match: str, **options: Any) -> None:
    """At bind, and at the restore that would have said that all is well; no byte is written by either."""
    before = [raw(tensor.tensor).clone() for tensor in slots.tensors]
    with keeper.restorer() as restorer:
        with pytest.raises(SlotMismatch, match=match):
            restorer.bind(slots, **options)
        with pytest.raises(InvalidInput, match="no slots are bound"):
            restorer.restore()
    assert all(torch.equal(raw(t.tensor), old) for t, old in zip(slots.tensors, before, strict=True))


# -- seen silently wrong -----------------------------------------------------------------------------------------


@pytest.fixture
def with_second_stack(model: Model) -> Model:
    """Three layers, and one more of a stack that counts anew: in the manifest it is layer 3."""
    names = {part: f"mtp.layers.0.mlp.experts.{{expert}}.{part}_proj" for part in PARTS}
    return Model(model.tensors | per_expert((3,), EXPERTS, HIDDEN, INNER, torch.bfloat16, names=names).tensors)


@pytest.mark.parametrize("stem", ["mtp.layers.0.mlp.experts.", "talker.model.layers.0.mlp.experts."])
@pytest.mark.parametrize("build", [Slots.fused, Slots.stacked])
def test_another_stacks_layer_is_not_given_the_main_models_of_that_number(
    keep: Callable[..., Keeper], with_second_stack: Model, stem: str, build: Callable[[Parameters], Slots]
) -> None:
    held = fused_parameters((3,), EXPERTS, HIDDEN, INNER, torch.bfloat16)
    with_second_stack.fill(Slots.fused(held).plan(with_second_stack.manifest))
    w13, w2 = held.values()
    names = ("w13_weight", "w2_weight") if build == Slots.fused else ("gate_up_proj", "down_proj")
    slots = build({stem + names[0]: w13, stem + names[1]: w2})
    refused(keep(with_second_stack), slots, "it holds expert 0 of layer 3, as the manifest counts")


def test_rows_that_a_kernel_interleaved_are_not_filled_as_gate_then_up(
    keep: Callable[..., Keeper], model: Model
) -> None:
    held = loaded(model)
    for name, tensor in held.items():
        if "w13" in name:
            gate, up = tensor.chunk(2, 1)
            tensor.copy_(torch.stack([gate, up], 2).reshape(tensor.shape))
    refused(keep(model), Slots.fused(held), r"gate_proj\.weight; .*the same bytes in another order")


def test_a_rank_of_two_of_four_experts_is_not_given_the_first_two(keep: Callable[..., Keeper], model: Model) -> None:
    held = loaded(model, 2, ep_rank=1, ep_size=2)
    keeper = keep(model)
    refused(keeper, Slots.fused(held), "it holds expert 2 of that layer: the ranks or the placement are others")
    with keeper.restorer() as restorer:
        assert restorer.bind(Slots.fused(held, ep_rank=1, ep_size=2)).experts_proved == 6


def test_a_map_of_ranks_that_are_no_more_is_refused(keep: Callable[..., Keeper], model: Model) -> None:
    """Four ranks of two slots became two ranks of four, and the map is still that of four."""
    of_two = {layer: [0, 1, 2, 3, 3, 2, 1, 0] for layer in LAYERS}
    of_four = {layer: [0, 2, 1, 3, 3, 1, 2, 0] for layer in LAYERS}
    held = loaded(model, physical_to_logical=of_two, ep_rank=0, ep_size=2)
    stale = Slots.fused(held, physical_to_logical=of_four, ep_rank=0, ep_size=2)
    refused(keep(model), stale, "it holds expert 2 of that layer")


@pytest.mark.parametrize("tp_size", [1, 2])
def test_slots_of_one_fine_tune_are_not_filled_from_another(
    keep: Callable[..., Keeper], model: Model, tp_size: int
) -> None:
    tuned = Model({key: {name: noise(t.shape, t.dtype) for name, t in of.items()} for key, of in model.tensors.items()})
    assert tuned.manifest == model.manifest
    slots = Slots.fused(loaded(tuned, tp_size=tp_size), tp_size=tp_size)
    refused(keep(model), slots, r"layer 0, expert 0: slot 0 .* 12 of 12 .* other weights than the nodes keep")


def test_one_tensor_of_one_expert_that_differs_is_named(keep: Callable[..., Keeper], model: Model) -> None:
    held = loaded(model)
    spoil({name: t[:, INNER:] for name, t in held.items() if "layers.2" in name and "w13" in name}, 3)
    name = re.escape("model.layers.2.mlp.experts.3.up_proj.weight")
    refused(keep(model), Slots.fused(held), f"layer 2, expert 3: .*does not hold {name}; 1 of 12 .*lost=")


# -- what was refused, and is the checkpoint's own bytes -----------------------------------------------------------


def packed(kinds: Mapping[str, tuple[torch.dtype, Callable[[int, int], tuple[int, ...]]]]) -> Model:
    tensors = {
        ExpertKey(layer, expert): {
            STEM + f"{{expert}}.{part}_proj.{kind}": noise(shape(*sides), dtype)
            if (sides := (64, 32) if part == "down" else (32, 64)) and shape(*sides)
            else noise((1,), dtype).reshape(())
            for part in PARTS
            for kind, (dtype, shape) in kinds.items()
        }
        for layer in (0, 1)
        for expert in range(3)
    }
    return Model(tensors)


NVFP4 = {
    "weight": (torch.uint8, lambda rows, columns: (rows, columns // 2)),
    "weight_scale": (FP8, lambda rows, columns: (rows, columns // 16)),
    "weight_scale_2": (torch.float32, lambda rows, columns: ()),
}
INT8_PACKED = {
    "weight": (torch.int8, lambda rows, columns: (rows, columns // 2)),
    "weight_scale": (torch.bfloat16, lambda rows, columns: (rows, columns // 32)),
}


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("viewed", [None, torch.uint8], ids=["as stored", "seen as bytes"])
@pytest.mark.parametrize("kinds", [NVFP4, INT8_PACKED], ids=["NVFP4", "int8, packed"])
def test_packed_weights_that_are_the_checkpoints_own_bytes_are_restored(
    keep: Callable[..., Keeper], kinds: Any, viewed: torch.dtype | None, tp_size: int
) -> None:
    model = packed(kinds)
    held: Parameters = {}
    for layer in (0, 1):
        for kind in kinds:
            parts = [
                torch.stack(
                    [model.tensors[ExpertKey(layer, e)][STEM + f"{{expert}}.{part}_proj.{kind}"] for e in range(3)]
                )
                for part in PARTS
            ]
            if parts[0].dim() == 1:
                w13, w2 = torch.stack(parts[:2], 1), parts[2].clone()
            else:
                gate, up = (part.chunk(tp_size, 1)[-1] for part in parts[:2])
                w13, w2 = torch.cat([gate, up], 1), parts[2].chunk(tp_size, 2)[-1].contiguous()
            for name, tensor in (("w13", w13), ("w2", w2)):
                is_bytes = viewed is not None and tensor.element_size() == 1
                held[STEM.format(layer=layer) + f"{name}_{kind}"] = tensor.view(viewed) if is_bytes else tensor
    right = copies(held)
    with keep(model).restorer() as restorer:
        assert restorer.bind(Slots.fused(held, tp_rank=tp_size - 1, tp_size=tp_size)).experts_proved == 6
        spoil({n: t.view(-1, 1) for n, t in held.items()})
        assert restorer.restore().ok
    assert is_same(held, right)


# -- what is known to be lost ---------------------------------------------------------------------------------------


def test_what_is_lost_is_named_and_the_others_speak_for_it(keep: Callable[..., Keeper], model: Model) -> None:
    held = loaded(model)
    right = copies(held)
    lost = [(0, 3), (1, 0), (1, 1)]
    for layer, expert in lost:
        spoil(held, expert, f"layers.{layer}.")
    keeper = keep(model)
    refused(keeper, Slots.fused(held), "lost=")
    with keeper.restorer() as restorer:
        report = restorer.bind(Slots.fused(held), lost=[*lost, (1, 99)])
        assert (report.ok, report.experts_lost, report.experts_proved, report.experts_unknown) == (True, 3, 9, 0)
        assert report.bytes_proved == 9 * int(model.manifest.nbytes[0])
        assert restorer.restore(lost).ok
    assert is_same(held, right)


def test_lost_ones_may_be_told_by_the_names_of_their_tensors(keep: Callable[..., Keeper], model: Model) -> None:
    held = loaded(model)
    spoil(held, 2, "layers.1.")
    with keep(model).restorer() as restorer:
        report = restorer.bind(Slots.fused(held), lost=lambda name: ".layers.1.mlp.experts.2." in name)
    assert (report.experts_lost, report.experts_proved) == (1, 11)


def unproved(report: SlotReport) -> set[tuple[int, int]]:
    assert all("nothing proves" in failed.reason and "lost=" in failed.reason for failed in report.failed)
    return {(failed.key.layer, failed.key.expert) for failed in report.failed}


def test_a_layer_that_nothing_speaks_for_is_left_as_it_is(keep: Callable[..., Keeper], model: Model) -> None:
    held = loaded(model)
    right = copies(held)
    spoil(held, layer="layers.1.")
    noise_before = copies(held)
    spoil(held, 0, "layers.2.")
    lost = [*((1, expert) for expert in range(EXPERTS)), (2, 0)]
    with keep(model).restorer() as restorer:
        report = restorer.bind(Slots.fused(held), lost=lost)
        assert (report.ok, report.unproved_layers) == (False, (1,))
        restored = restorer.restore(lost)
        assert not restored.ok
        assert unproved(restored) == {(1, expert) for expert in range(EXPERTS)}
        assert restored.experts_done == 1
        for name, tensor in held.items():
            assert same(tensor, (noise_before if "layers.1." in name else right)[name])

        assert restorer.bind(Slots.fused(held), lost="all", proof="none").ok
        assert restorer.restore(lost).ok, "vouched for"
    assert is_same(held, right)


def test_what_was_proved_before_the_loss_is_enough_when_experts_are_placed_anew(
    keep: Callable[..., Keeper], model: Model
) -> None:
    held = loaded(model)
    with keep(model).restorer() as restorer:
        restorer.bind(Slots.fused(held))
        spoil(held)
        placed = {layer: [3, 1, NO_EXPERT, 0] for layer in LAYERS}
        assert restorer.bind(Slots.fused(held, physical_to_logical=placed), lost="all").ok
        assert restorer.restore().ok
        assert same(held[STEM.format(layer=1) + "w13_weight"][0], loaded(model)[STEM.format(layer=1) + "w13_weight"][3])

        moved = copies(held)
        assert not restorer.bind(Slots.fused(moved, physical_to_logical=placed), lost="all").ok, "other memory"


def test_a_sample_looks_at_some_of_each_layer(keep: Callable[..., Keeper]) -> None:
    model = per_expert(LAYERS, 9, HIDDEN, INNER, torch.bfloat16)
    held = fused_parameters(LAYERS, 9, HIDDEN, INNER, torch.bfloat16)
    model.fill(Slots.fused(held).plan(model.manifest))
    with keep(model).restorer() as restorer:
        report = restorer.bind(Slots.fused(held), proof="sample")
        assert (report.ok, report.experts_proved) == (True, 12)
        spoil(held, 8, "layers.2.")
        with pytest.raises(SlotMismatch, match="layer 2, expert 8"):
            restorer.bind(Slots.fused(held), proof="sample")
        with pytest.raises(InvalidInput, match="whole, sample, none"):
            restorer.bind(Slots.fused(held), proof="some")  # type: ignore[arg-type]


# -- where nobody could be asked at bind ------------------------------------------------------------------------------


def test_without_anybody_to_ask_the_proof_is_made_at_the_first_restore(
    keep: Callable[..., Keeper], model: Model
) -> None:
    held = loaded(model)
    right = copies(held)
    keeper = keep(model)
    keeper.segment.unlink()
    with keeper.restorer() as restorer:
        report = restorer.bind(Slots.fused(held))
        assert (report.ok, report.experts_proved, report.unproved_layers) == (False, 0, LAYERS)
        spoil(held, 1, "layers.0.")
        assert not restorer.restore([(0, 1)]).ok
        keeper.fill(model)
        assert restorer.restore([(0, 1)]).ok
        assert is_same(held, right)
        assert unproved(restorer.restore()) == {(layer, expert) for layer in (1, 2) for expert in range(EXPERTS)}
        assert is_same(held, right)


def test_a_proof_that_fails_at_the_first_restore_stops_it(keep: Callable[..., Keeper], model: Model) -> None:
    held = loaded(model, 2, ep_rank=1, ep_size=2)
    before = copies(held)
    keeper = keep(model)
    keeper.segment.unlink()
    with keeper.restorer() as restorer:
        restorer.bind(Slots.fused(held))
        keeper.fill(model)
        with pytest.raises(SlotMismatch, match=r"layer 0, expert 1: .*it holds expert 3 of that layer"):
            restorer.restore([(0, 0)])
    assert is_same(held, before)


def test_parts_whose_block_is_on_no_memory_of_this_host_are_not_proved(
    keep: Callable[..., Keeper], model: Model
) -> None:
    held = loaded(model, tp_size=2)
    keeper = keep(model, {ExpertKey(0, expert) for expert in range(EXPERTS)} | {ExpertKey(1, 2)})
    with keeper.restorer() as restorer:
        report = restorer.bind(Slots.fused(held, tp_size=2))
    assert (report.unproved_layers, report.experts_unknown, report.experts_proved) == ((0,), 5, 7)


def test_slots_that_nothing_speaks_for_are_not_registered(keep: Callable[..., Keeper], model: Model) -> None:
    with keep(model).restorer() as restorer:
        restorer.bind(Slots.fused(loaded(model)), lost="all")
        with pytest.raises(RestoreError, match="nothing proves"):
            restorer.register("rank-0")


# -- the content stays what it was -------------------------------------------------------------------------------------


def test_a_segment_that_went_on_to_other_weights_is_left_aside_until_bound_anew(
    keep: Callable[..., Keeper], model: Model
) -> None:
    held = loaded(model)
    keeper = keep(model)
    tuned = Model({key: {name: noise(t.shape, t.dtype) for name, t in of.items()} for key, of in model.tensors.items()})
    with keeper.restorer() as restorer:
        restorer.bind(Slots.fused(held))
        keeper.segment.unlink()
        keeper.fill(tuned, content=b"the one after it")
        spoil(held, 2)
        noise_before = copies(held)
        report = restorer.restore()
        assert (report.ok, report.experts_done) == (False, 0)
        assert any("bind again once the engine has its weights" in note for note in report.notes)
        assert is_same(held, noise_before)

        tuned.fill(Slots.fused(held).plan(model.manifest))
        right = copies(held)
        assert restorer.bind(Slots.fused(held)).ok
        spoil(held, 2)
        assert restorer.restore().ok
        assert is_same(held, right)


@pytest.mark.usefixtures("kept_engines")
def test_a_node_and_a_directory_of_another_fine_tune_are_left_aside(
    tiny_qwen3_moe: Path,
    cluster: Callable[..., Any],
    serve: Callable[..., Any],
    free_port: Callable[[], int],
    tmp_path: Path,
) -> None:
    right = load_file(tiny_qwen3_moe / "model.safetensors")
    held = {name: tensor.clone() for name, tensor in right.items() if ".experts." in name}
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    (tuned / "config.json").write_bytes((tiny_qwen3_moe / "config.json").read_bytes())
    save_file({name: -tensor for name, tensor in right.items()}, tuned / "model.safetensors", {"format": "pt"})
    nodes = cluster("qwen", tiny_qwen3_moe, count=1, replicas=1)
    other = serve("other", {"other": free_port()}, checkpoint=tuned, model="qwen", fill="disk", replicas=1).wait_ready()
    with Restorer(nodes.urls[0], checkpoint=tuned) as restorer:
        assert restorer.bind(Slots.plain(held)).experts_proved == 15
        nodes.kill(0)
        Path(nodes.segment(0)).unlink()
        restorer._control.urls.append(other.url)
        report = restorer.restore()
        assert (report.experts_done, report.bytes_by_source["peer"], report.bytes_by_source["disk"]) == (0, 0, 0)
        assert any(other.url in note and "nothing is taken of it" in note for note in report.notes)
        assert all(str(tuned) in failed.reason for failed in report.failed)
    assert all(same(tensor, right[name]) for name, tensor in held.items())
    with Restorer(other.url) as restorer, pytest.raises(SlotMismatch, match="other weights than the nodes keep"):
        restorer.bind(Slots.plain(held))


@pytest.mark.usefixtures("kept_engines")
def test_experts_of_other_nodes_are_proved_by_the_checksums_that_those_have(
    tiny_qwen3_moe: Path, cluster: Callable[..., Any]
) -> None:
    right = load_file(tiny_qwen3_moe / "model.safetensors")
    held = {name: tensor.clone() for name, tensor in right.items() if ".experts." in name}
    nodes = cluster("qwen", tiny_qwen3_moe, count=2, replicas=1)
    with Restorer(nodes.urls[0]) as restorer:
        report = restorer.bind(Slots.plain(held))
        assert (report.ok, report.experts_proved) == (True, 15)
        here = {name for name, _ in restorer._segment.attachment.items()}  # type: ignore[union-attr]
        elsewhere = sorted(set(held) - here)
        raw(held[elsewhere[0]])[7] ^= 1
        with pytest.raises(SlotMismatch, match=re.escape(elsewhere[0])):
            restorer.bind(Slots.plain(held))
    with Restorer(NOBODY, model="qwen") as restorer:
        assert not restorer.bind(Slots.plain(held)).ok


# -- parts of blocks that this host has not ------------------------------------------------------------------------


@pytest.fixture
def far_rank(
    tiny_qwen3_moe: Path, cluster: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, Parameters]:
    """Two nodes, and the second of five tensor-parallel ranks, in a container that does not share their /dev/shm."""

    def nothing(*_: Any) -> Any:
        raise SegmentNotFound("there is no such object in the /dev/shm of this container")

    monkeypatch.setattr("transfer.client.local_segment.LocalSegment.open", nothing)
    content = load_file(tiny_qwen3_moe / "model.safetensors")
    held: Parameters = {}
    for layer in LAYERS:
        stem = f"model.layers.{layer}.mlp.experts."
        gates, ups, downs = (
            [content[f"{stem}{expert}.{part}_proj.weight"] for expert in range(5)] for part in ("gate", "up", "down")
        )
        halves = zip(gates, ups, strict=True)
        held[f"{stem}w13_weight"] = torch.stack([torch.cat([g.chunk(5)[1], u.chunk(5)[1]]) for g, u in halves])
        held[f"{stem}w2_weight"] = torch.stack([down.chunk(5, 1)[1] for down in downs]).contiguous()
    return cluster("qwen", tiny_qwen3_moe, count=2, replicas=2), held


def test_parts_of_a_rank_that_shares_no_memory_with_a_node_are_proved_by_blocks_that_are_brought(
    far_rank: tuple[Any, Parameters],
) -> None:
    """They could only be vouched for: what lies in the slots was compared with blocks in this host's memory alone."""
    nodes, held = far_rank
    before = copies(held)
    with Restorer(nodes.urls[0]) as restorer:
        report = restorer.bind(Slots.fused(held, tp_rank=1, tp_size=5))
        assert (report.ok, report.experts_proved, report.experts_unknown) == (True, 3, 12), report
        spoil(held)
        assert restorer.restore().ok
        assert is_same(held, before)
        with pytest.raises(SlotMismatch, match="layer 0, expert"):
            restorer.bind(Slots.fused(held, tp_rank=2, tp_size=5))


def test_a_block_that_cannot_be_had_for_a_proof_is_tried_at_the_next_replica_or_said(
    far_rank: tuple[Any, Parameters],
) -> None:
    nodes, held = far_rank
    with Restorer(nodes.urls[0]) as restorer:
        nodes.kill(1)
        assert restorer.bind(Slots.fused(held, tp_rank=1, tp_size=5)).ok
    with Restorer(nodes.urls[0]) as restorer:
        nodes.kill(0)
        report = restorer.bind(Slots.fused(held, tp_rank=1, tp_size=5))
        assert not report.ok
        assert report.notes


def test_a_rank_whose_proof_waited_for_the_first_restore_is_proved_by_blocks_that_are_brought(
    far_rank: tuple[Any, Parameters], monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes, held = far_rank
    with Restorer(nodes.urls[0]) as restorer:
        with monkeypatch.context() as patch:
            patch.setattr(restorer, "_borrow", lambda bound, tally, rows: ())
            assert not restorer.bind(Slots.fused(held, tp_rank=1, tp_size=5)).ok
        spoil(held, 0)
        assert restorer.restore([(layer, 0) for layer in LAYERS]).ok

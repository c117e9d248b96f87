"""Which checkpoints fit which parameters, and what is refused before a byte moves."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping

import pytest
import torch

from shm.block import ExpertKey, TensorEntry
from shm.errors import InvalidInput
from shm.manifest import FileSpec, Manifest
from tests.transfer.slots.checkpoints import (
    FP8,
    PARTS,
    STEM,
    Model,
    fused_parameters,
    noise,
    per_expert,
    same,
)
from transfer.slots import Slots
from transfer.slots.layouts import SlotMismatch

# -- per-expert and fused checkpoints -------------------------------------------------------------------------------


def test_w1_w3_w2_are_gate_up_and_down() -> None:
    stem = "model.layers.{layer}.block_sparse_moe.experts.{expert}."
    model = per_expert(
        (0,), 2, 5, 7, torch.bfloat16, names={"gate": stem + "w1", "up": stem + "w3", "down": stem + "w2"}
    )
    parameters = fused_parameters((0,), 2, 5, 7, torch.bfloat16)
    model.fill(Slots.fused(parameters).plan(model.manifest))
    w13, w2 = parameters.values()
    for expert in range(2):
        named = model.tensors[ExpertKey(0, expert)]
        assert same(w13[expert], torch.cat([named[stem + "w1.weight"], named[stem + "w3.weight"]]))
        assert same(w2[expert], named[stem + "w2.weight"])


def fused_checkpoint(hidden: int, inner: int, n_experts: int = 3) -> Model:
    shapes = {"gate_up_proj": (2 * inner, hidden), "down_proj": (hidden, inner)}
    return Model({
        ExpertKey(0, e): {f"{STEM}{n}[{{expert}}]": noise(s, torch.bfloat16) for n, s in shapes.items()}
        for e in range(n_experts)
    })  # fmt: skip


@pytest.mark.parametrize("layout", ["gate_first", "up_first"])
@pytest.mark.parametrize("tp_size", [1, 3])
def test_a_fused_checkpoint_fills_fused_parameters(layout: str, tp_size: int) -> None:
    model = fused_checkpoint(5, 9)
    for rank in range(tp_size):
        parameters = fused_parameters((0,), 3, 5, 9 // tp_size, torch.bfloat16)
        model.fill(Slots.fused(parameters, layout=layout, tp_rank=rank, tp_size=tp_size).plan(model.manifest))
        w13, w2 = parameters.values()
        for expert in range(3):
            gate_up, down = model.tensors[ExpertKey(0, expert)].values()
            halves = [half.chunk(tp_size)[rank] for half in gate_up.chunk(2)]
            assert same(w13[expert], torch.cat(halves if layout == "gate_first" else halves[::-1]))
            assert same(w2[expert], down.chunk(tp_size, 1)[rank])


def test_stacked_parameters_take_a_fused_checkpoint_as_it_is_even_transposed_and_interleaved() -> None:
    shapes = {"gate_up_proj": (6, 10), "gate_up_proj_bias": (10,), "down_proj": (5, 6), "down_proj_bias": (6,)}
    model = Model({
        ExpertKey(1, e): {f"{STEM}{n}[{{expert}}]": noise(s, torch.bfloat16) for n, s in shapes.items()}
        for e in range(3)
    })  # fmt: skip
    parameters = {STEM.format(layer=1) + n: noise((3, *s), torch.bfloat16) for n, s in shapes.items()}
    model.fill(Slots.stacked(parameters).plan(model.manifest))
    for name, tensor in parameters.items():
        for expert in range(3):
            expected = model.tensors[ExpertKey(1, expert)][name.replace("layers.1", "layers.{layer}") + "[{expert}]"]
            assert same(tensor[expert], expected)


def test_interleaved_biases_and_packed_rows_are_not_split() -> None:
    model = fused_checkpoint(5, 9, n_experts=1)
    for key in model.tensors:
        model.tensors[key][STEM + "gate_up_proj_bias[{expert}]"] = noise((18,), torch.bfloat16)
    model = Model(model.tensors)
    parameters = fused_parameters((0,), 1, 5, 9, torch.bfloat16)
    parameters[STEM.format(layer=0) + "w13_weight_bias"] = noise((1, 18), torch.bfloat16)
    with pytest.raises(SlotMismatch, match=r"gate_up_proj_bias\[0\] has no home"):
        Slots.fused(parameters).plan(model.manifest)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_plain_tensors_are_filled_whole_or_in_part(tp_size: int) -> None:
    model = per_expert((0, 3), 2, 10, 8, FP8, group=2)
    for rank in range(tp_size):
        named = {n: t for key in model.tensors for n, t in model.names(key).items()}
        expected = {n: t.chunk(tp_size, 1 if "down" in n else 0)[rank] for n, t in named.items()}
        mine = {n: noise(t.shape, t.dtype) for n, t in expected.items()}
        model.fill(Slots.plain(mine, tp_rank=rank, tp_size=tp_size).plan(model.manifest))
        assert all(same(mine[n], expected[n]) for n in mine)


def test_scalar_scales_go_to_one_number_a_slot() -> None:
    model = per_expert((0,), 2, 5, 7, FP8)
    for named in model.tensors.values():
        for part in PARTS:
            named[STEM + "{expert}." + f"{part}_proj.weight_scale"] = noise((1,), torch.float32).reshape(())
    model = Model(model.tensors)
    parameters = fused_parameters((0,), 2, 5, 7, FP8)
    w13 = parameters[STEM.format(layer=0) + "w13_weight_scale"] = noise((2, 2), torch.float32)
    w2 = parameters[STEM.format(layer=0) + "w2_weight_scale"] = noise((2,), torch.float32)
    model.fill(Slots.fused(parameters).plan(model.manifest))
    for expert in range(2):
        scales = [model.tensors[ExpertKey(0, expert)][STEM + "{expert}." + f"{p}_proj.weight_scale"] for p in PARTS]
        assert same(torch.cat([w13[expert], w2[expert : expert + 1]]), torch.stack(scales))


# -- refusals -------------------------------------------------------------------------------------------------------


def refused(parameters: Mapping[str, torch.Tensor], model: Model, match: str, **options: int | str) -> None:
    before = {n: t.clone() for n, t in parameters.items()}
    with pytest.raises(SlotMismatch, match=match):
        Slots.fused(parameters, **options).plan(model.manifest)  # type: ignore[arg-type]
    assert all(same(t, before[n]) for n, t in parameters.items())


def pair(w13: torch.Tensor, w2: torch.Tensor) -> dict[str, torch.Tensor]:
    return {STEM.format(layer=0) + "w13_weight": w13, STEM.format(layer=0) + "w2_weight": w2}


def test_another_dtype_is_refused_not_converted() -> None:
    model = per_expert((0,), 2, 5, 7, torch.bfloat16)
    refused(fused_parameters((0,), 2, 5, 7, torch.float16), model, "is BF16 in the checkpoint, F16 in the engine")
    refused(fused_parameters((0,), 2, 5, 7, torch.float32), model, "does not convert")


def test_another_shape_is_refused() -> None:
    model = per_expert((0,), 2, 5, 7, torch.bfloat16)
    refused(fused_parameters((0,), 2, 6, 7, torch.bfloat16), model, r"is \[5, 7\] in the checkpoint, and \[6, 7\]")
    refused(fused_parameters((0,), 2, 5, 8, torch.bfloat16), model, "in the checkpoint, and")


def test_kernels_that_hold_weights_transposed_are_refused_even_where_square() -> None:
    model = per_expert((0,), 2, 14, 7, torch.bfloat16)  # 2·I = H: w13 transposed has the same shape
    refused(pair(noise((2, 14, 14), torch.bfloat16), noise((2, 7, 14), torch.bfloat16)), model, "transposed")
    stacked = {
        STEM.format(layer=0) + "gate_up_proj": noise((2, 14, 14), torch.bfloat16),
        STEM.format(layer=0) + "down_proj": noise((2, 7, 14), torch.bfloat16),
    }
    with pytest.raises(SlotMismatch, match=r"down_proj.weight is \[14, 7\] in the checkpoint, and \[7, 14\]"):
        Slots.stacked(stacked).plan(model.manifest)


def test_transposed_on_both_sides_has_no_halves_to_order() -> None:
    shapes = {"gate_up_proj": (6, 10), "down_proj": (5, 6)}
    named = {f"{STEM}{n}[{{expert}}]": noise(s, torch.bfloat16) for n, s in shapes.items()}
    model = Model({ExpertKey(0, 0): named})
    transposed = pair(noise((1, 6, 10), torch.bfloat16), noise((1, 5, 6), torch.bfloat16))
    refused(transposed, model, r"not \[slots, 2·I, H/k\]", layout="up_first")


@pytest.mark.parametrize(
    "name",
    [
        "visual.blocks.3.mlp.experts.w13_weight",
        "model.decoder.mlp.experts.w2_weight_scale_inv",
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.5.down_proj.weight",
        "experts.w2",
    ],
)
def test_experts_that_would_be_passed_over_are_refused(name: str) -> None:
    parameters = fused_parameters((0,), 2, 5, 7, torch.bfloat16)
    with pytest.raises(SlotMismatch, match=f"^{re.escape(name)} is a parameter of experts"):
        Slots.fused({**parameters, name: noise((2, 5, 7), torch.bfloat16)})


def test_what_is_no_experts_is_passed_over() -> None:
    parameters = fused_parameters((0,), 2, 5, 7, torch.bfloat16)
    others = ("model.layers.0.mlp.shared_experts.gate_up_proj.weight", "model.layers.0.mlp.experts.bias", "lm_head.w2")
    more = {name: noise((5, 7), torch.bfloat16) for name in others}
    assert Slots.fused({**more, **parameters}).keys == Slots.fused(parameters).keys


def test_a_transposed_view_is_refused() -> None:
    model = per_expert((0,), 2, 5, 7, torch.bfloat16)
    refused(
        pair(noise((2, 5, 14), torch.bfloat16).mT, noise((2, 5, 7), torch.bfloat16)), model, "transposed or shuffled"
    )
    refused(pair(noise((14, 2, 5), torch.bfloat16).transpose(0, 1), noise((2, 5, 7), torch.bfloat16)), model, "strides")


@pytest.mark.parametrize("mark", ["is_shuffled", "format_ue8m0", "_xpu_weights_transposed"])
def test_a_parameter_marked_as_rewritten_is_refused(mark: str) -> None:
    model = per_expert((0,), 2, 5, 7, torch.bfloat16)
    parameters = fused_parameters((0,), 2, 5, 7, torch.bfloat16)
    setattr(next(iter(parameters.values())), mark, True)
    refused(parameters, model, "rewritten after loading")


def test_scales_packed_as_integers_are_refused() -> None:
    model = per_expert((0,), 2, 8, 8, FP8, group=4)
    parameters = fused_parameters((0,), 2, 8, 8, FP8, group=4)
    name = STEM.format(layer=0) + "w13_weight_scale_inv"
    parameters[name] = noise((2, 4, 2), torch.int32)
    refused(parameters, model, "is F32 in the checkpoint, I32 in the engine")


@pytest.mark.parametrize(
    ("stored", "held", "fits"),
    [
        (torch.int8, torch.uint8, True),
        (torch.uint8, torch.float8_e8m0fnu, True),
        (torch.uint8, FP8, True),
        (torch.uint8, torch.float4_e2m1fn_x2, True),
        (torch.bfloat16, torch.float16, False),
        (torch.int16, torch.bfloat16, False),
        (FP8, torch.float8_e5m2, False),
        (torch.int32, torch.int64, False),
    ],
    ids=str,
)
def test_two_names_for_the_same_bits_fit_and_two_formats_of_numbers_do_not(
    stored: torch.dtype, held: torch.dtype, fits: bool
) -> None:
    model = per_expert((0,), 2, 8, 6, stored)
    bits = torch.uint8 if held == torch.float4_e2m1fn_x2 else held  # torch makes none of these itself
    parameters = {name: tensor.view(held) for name, tensor in fused_parameters((0,), 2, 8, 6, bits).items()}
    if fits:
        model.fill(Slots.fused(parameters).plan(model.manifest))
        gate = model.tensors[ExpertKey(0, 1)][STEM + "{expert}.gate_proj.weight"]
        assert same(parameters[STEM.format(layer=0) + "w13_weight"][1, :6].view(torch.uint8), gate.view(torch.uint8))
    else:
        with pytest.raises(SlotMismatch, match="a raw copy does not convert"):
            Slots.fused(parameters).plan(model.manifest)


def test_a_checkpoint_of_half_bytes_fits_what_holds_two_in_each() -> None:
    entries = [
        TensorEntry(STEM + f"{{expert}}.{part}_proj.weight", "F4", shape, 0, 0)
        for part, shape in (("gate", (6, 8)), ("up", (6, 8)), ("down", (8, 6)))
    ]
    manifest = Manifest.build("m", "t", "experts", [FileSpec("f", 1 << 20, "0")], {ExpertKey(0, 0): entries})
    pair_of = pair(noise((1, 12, 4), torch.uint8), noise((1, 8, 3), torch.uint8))
    held = {name: tensor.view(torch.float4_e2m1fn_x2) for name, tensor in pair_of.items()}
    (copies,) = Slots.fused(held).plan(manifest).copies(ExpertKey(0, 0))
    assert sum(copy.nbytes for copy in copies) == 3 * 24


def test_weights_in_blocks_are_refused() -> None:
    model = per_expert((0,), 2, 8, 8, torch.bfloat16)
    refused(
        pair(noise((2, 4, 16, 2), torch.bfloat16), noise((2, 4, 8, 2), torch.bfloat16)),
        model,
        r"not \[slots, 2·I, H/k\]",
    )


@pytest.mark.parametrize("layout", ["marlin", "flashinfer_trtllm", "plain", ""])
def test_a_layout_that_is_not_known_to_be_plain_is_refused_with_a_reason(layout: str) -> None:
    with pytest.raises(SlotMismatch, match=f"layout '{layout}': .*gate_first"):
        Slots.fused(fused_parameters((0,), 2, 5, 7, torch.bfloat16), layout=layout)


def test_a_scale_that_the_engine_made_itself_is_refused() -> None:
    model = per_expert((0,), 2, 8, 8, FP8)
    refused(fused_parameters((0,), 2, 8, 8, FP8, group=4), model, "the engine made the rest itself")


def test_a_tensor_of_the_block_without_a_home_is_refused() -> None:
    model = per_expert((0,), 2, 8, 8, FP8, group=4)
    refused(fused_parameters((0,), 2, 8, 8, FP8), model, "weight_scale_inv has no home")


@pytest.mark.parametrize(("inner", "tp_size"), [(12, 2), (14, 2), (16, 3)])
def test_a_cut_inside_a_group_of_scales_is_refused(inner: int, tp_size: int) -> None:
    model = per_expert((0,), 1, 8, inner, FP8, group=8)
    refused(fused_parameters((0,), 1, 8, inner // tp_size, FP8, group=8), model, "divide", tp_size=tp_size)


def test_an_intermediate_size_that_does_not_divide_is_refused() -> None:
    model = per_expert((0,), 1, 8, 7, torch.bfloat16)
    refused(fused_parameters((0,), 1, 8, 4, torch.bfloat16), model, "does not divide among 2 ranks", tp_size=2)


def test_whole_parameters_bound_as_parts_are_refused() -> None:
    model = per_expert((0,), 1, 8, 6, torch.bfloat16)
    refused(fused_parameters((0,), 1, 8, 6, torch.bfloat16), model, "of which this rank holds", tp_size=2)


def test_a_layer_or_expert_that_the_model_has_not_is_refused() -> None:
    model = per_expert((0,), 2, 5, 7, torch.bfloat16)
    refused(fused_parameters((0, 1), 2, 5, 7, torch.bfloat16), model, "expert 0 in layer 1 is not in the checkpoint")
    refused(fused_parameters((0,), 3, 5, 7, torch.bfloat16), model, "expert 2 in layer 0 is not in the checkpoint")


def test_parameters_that_overlap_are_refused() -> None:
    memory = noise((2 * 14 * 5 + 2 * 5 * 7,), torch.bfloat16)
    w13, w2 = memory[: 2 * 14 * 5].view(2, 14, 5), memory[2 * 14 * 5 - 1 : -1].view(2, 5, 7)
    with pytest.raises(SlotMismatch, match="overlap in memory"):
        Slots.fused(pair(w13, w2))


def test_parameters_whose_slots_differ_in_number_are_refused() -> None:
    with pytest.raises(SlotMismatch, match="first axes differ"):
        Slots.fused(pair(noise((2, 14, 5), torch.bfloat16), noise((3, 5, 7), torch.bfloat16)))


def test_a_layer_with_half_its_parameters_is_refused() -> None:
    w13 = {STEM.format(layer=0) + "w13_weight": noise((2, 14, 5), torch.bfloat16)}
    with pytest.raises(SlotMismatch, match="both w13 and w2 belong"):
        Slots.fused(w13)


def test_parameters_without_memory_are_refused() -> None:
    with pytest.raises(SlotMismatch, match="no memory of its own"):
        Slots.fused({n: t.to("meta") for n, t in fused_parameters((0,), 2, 5, 7, torch.bfloat16).items()})


def test_a_model_without_expert_parameters_says_what_was_seen() -> None:
    with pytest.raises(InvalidInput, match=r"seen were lm_head.weight"):
        Slots.fused({"lm_head.weight": noise((2, 2), torch.bfloat16)})
    with pytest.raises(InvalidInput, match="no tensors"):
        Slots.plain({})


@pytest.mark.parametrize(
    ("maps", "match"),
    [
        ({0: [0, 1, 0]}, "has 3 experts, and 2 ranks of 2 slots hold 4"),
        ({1: [0, 1, 0, 1]}, "has no layer 0"),
        ([], "has no layer 0"),
        ({0: [0, 1, -2, 1]}, "has -2"),
    ],
)
def test_a_map_that_does_not_fit_is_refused(maps: Mapping[int, list[int]], match: str) -> None:
    with pytest.raises(InvalidInput, match=match):
        Slots.fused(fused_parameters((0,), 2, 5, 7, torch.bfloat16), physical_to_logical=maps, ep_size=2)


@pytest.mark.parametrize("ranks", [{"ep_rank": 2, "ep_size": 2}, {"tp_rank": -1}, {"tp_size": 0}])
def test_ranks_out_of_range_are_refused(ranks: dict[str, int]) -> None:
    with pytest.raises(InvalidInput, match="ranks count from 0"):
        Slots.fused(fused_parameters((0,), 2, 5, 7, torch.bfloat16), **ranks)


def test_plain_tensors_must_be_exactly_the_blocks() -> None:
    model = per_expert((0,), 1, 5, 7, torch.bfloat16)
    mine = model.names(ExpertKey(0, 0))
    gate = next(n for n in mine if "gate" in n)
    with pytest.raises(SlotMismatch, match=r"gate_proj.weight is not bound"):
        Slots.plain({n: t for n, t in mine.items() if n != gate}).plan(model.manifest)
    with pytest.raises(SlotMismatch, match="is not in the checkpoint"):
        Slots.plain({"other." + n: t for n, t in mine.items()}).plan(model.manifest)
    with pytest.raises(SlotMismatch, match="not the tensor of one expert"):
        Slots.plain({"model.layers.0.mlp.shared_experts.gate_proj.weight": mine[gate]})
    with pytest.raises(SlotMismatch, match="are the same tensor"):
        Slots.plain(mine | {gate.replace("gate_proj", "w1"): mine[gate].clone()})
    with pytest.raises(SlotMismatch, match=r"other\..*gate_proj.weight is not in the checkpoint"):
        Slots.plain(mine | {"other." + gate: mine[gate].clone()}).plan(model.manifest)


def test_layers_that_are_counted_anew_are_numbered_as_the_manifest_does() -> None:
    """Qwen3.5's `mtp.layers.0` beside `model.layers.0`: in the manifest it goes behind the last layer."""
    model = per_expert((0, 1, 2), 2, 5, 7, torch.bfloat16)
    ahead = per_expert(
        (3,), 2, 5, 7, torch.bfloat16, names={p: f"mtp.layers.0.mlp.experts.{{expert}}.{p}_proj" for p in PARTS}
    )
    model = Model(model.tensors | ahead.tensors)
    for layers in ((0, 1, 2, 3), (0, 3), (3,)):
        named = {n: t for key in model.tensors if key.layer in layers for n, t in model.names(key).items()}
        mine = {n: noise(t.shape, t.dtype) for n, t in named.items()}
        slots = Slots.plain(mine).keyed_by(model.manifest)
        assert {key.layer for key in slots.keys} == set(layers)
        assert {ref.parameter for ref in slots.refs(ExpertKey(3, 1))} == {
            n for n in named if "mtp.layers.0.mlp.experts.1" in n
        }
        model.fill(slots.plan(model.manifest))
        assert all(same(mine[n], named[n]) for n in mine)


def test_a_projection_of_unknown_name_is_refused() -> None:
    name = STEM + "{expert}.linear_v.weight"
    model = Model({ExpertKey(0, 0): {name: noise((5, 7), torch.bfloat16)}})
    refused(fused_parameters((0,), 1, 5, 7, torch.bfloat16), model, "linear_v.weight is not a gate, up or down")


def test_importing_slots_does_not_import_torch() -> None:
    code = "import sys, transfer.slots; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""Names tell experts from the rest, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest

from shm.block import DENSE, ExpertKey, fill_template
from transfer.checkpoint import families
from transfer.checkpoint.families import Grouping, Include, group_tensors
from transfer.checkpoint.names import split_name
from transfer.checkpoint.safetensors_header import StoredTensor
from transfer.errors import CheckpointError

FILES = ("one.safetensors",)
GATED = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
SHAPE = (3, 5)
NBYTES = 15  # U8


def stored(names: Iterable[str], shape: tuple[int, ...] = SHAPE) -> list[StoredTensor]:
    nbytes = 1
    for side in shape:
        nbytes *= side
    return [StoredTensor(name, "U8", shape, 0, 100 + i * nbytes, nbytes) for i, name in enumerate(names)]


def experts(
    prefix: str, layers: Sequence[int], count: int, parts: Sequence[str] = GATED, moe: str = "mlp"
) -> list[StoredTensor]:
    return stored(f"{prefix}.{n}.{moe}.experts.{e}.{part}" for n in layers for e in range(count) for part in parts)


def group(tensors: Iterable[StoredTensor], include: Include = "experts") -> Grouping:
    return group_tensors(tensors, FILES, include)


def names_by_key(grouping: Grouping) -> dict[ExpertKey, set[str]]:
    return {key: {fill_template(e.template, key) for e in entries} for key, entries in grouping.blocks.items()}


def templates(grouping: Grouping, key: tuple[int, int]) -> set[str]:
    return {entry.template for entry in grouping.blocks[ExpertKey(*key)]}


def refused(tensors: Iterable[StoredTensor], *says: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        group(tensors)
    for words in says:
        assert words in str(caught.value)


# -- families --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "family"),
    [
        (GATED, "gate-up-down"),
        ([p + s for p in GATED for s in ("", "_scale_inv")], "gate-up-down"),
        ([p + s for p in GATED for s in ("_packed", "_scale", "_shape")], "gate-up-down"),
        (GATED[1:], "gate-up-down"),
        (("w1.weight", "w2.weight", "w3.weight"), "w1-w2-w3"),
        (("w1.weight", "w2.weight"), "w1-w2-w3"),
        (("fc1.kernel", "fc2.kernel", "fc2.bias"), "generic"),
        (("weight",), "generic"),
    ],
)
def test_family_of_experts_one_by_one(parts: Sequence[str], family: str) -> None:
    grouping = group(experts("model.layers", [0, 1], 3, parts))
    assert grouping.family == family
    assert templates(grouping, (1, 2)) == {f"model.layers.{{layer}}.mlp.experts.{{expert}}.{part}" for part in parts}
    assert (grouping.n_layers, grouping.n_experts) == (2, {0: 3, 1: 3})


@pytest.mark.parametrize(
    "parts",
    [
        ("gate_up_proj", "down_proj"),
        ("gate_up_proj_blocks", "gate_up_proj_scales", "gate_up_proj_bias", "down_proj_blocks", "down_proj_bias"),
        ("w13_weight", "w2_weight"),
        ("gate_proj.weight", "up_proj.weight", "down_proj.weight"),
    ],
)
def test_fused_tensors_are_shared_out_along_their_first_axis(parts: Sequence[str]) -> None:
    tensors = stored((f"model.layers.4.mlp.experts.{part}" for part in parts), (7, 3, 5))
    grouping = group(tensors)
    assert grouping.family == "fused"
    assert sorted(grouping.blocks) == [ExpertKey(4, e) for e in range(7)]
    for e in range(7):
        assert [entry.file_offset for entry in grouping.blocks[ExpertKey(4, e)]] == [t.offset + e * 15 for t in tensors]
        assert {entry.shape for entry in grouping.blocks[ExpertKey(4, e)]} == {(3, 5)}
    assert templates(grouping, (4, 6)) == {f"model.layers.{{layer}}.mlp.experts.{part}[{{expert}}]" for part in parts}


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (1, 1, 5)])
def test_what_fused_experts_have_in_common_is_in_each_ones_block(shape: tuple[int, ...]) -> None:
    """Else an expert that is restored would lack the scale of its weights."""
    tensors = [
        *stored(["model.layers.0.mlp.experts.gate_up_proj"], (7, 3, 5)),
        *stored(["model.layers.0.mlp.experts.gate_up_proj_weight_scale"], (7,)),
        *stored(["model.layers.0.mlp.experts.gate_up_proj_input_scale"], shape),
    ]
    blocks = group(tensors, "all").blocks
    assert sorted(blocks) == [ExpertKey(0, e) for e in range(7)]
    for entries in blocks.values():
        common = entries[-1]
        assert common.template == "model.layers.{layer}.mlp.experts.gate_up_proj_input_scale[*{expert}]"
        assert (common.shape, common.file_offset) == (shape, tensors[-1].offset)
        assert len(entries) == 3


def test_a_single_expert_has_its_share_of_a_tensor_of_one() -> None:
    grouping = group(stored(["model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.w2"], (1, 3, 5)))
    assert {entry.shape for entry in grouping.blocks[ExpertKey(0, 0)]} == {(3, 5)}


def test_layers_of_several_families_are_mixed() -> None:
    tensors = [
        *experts("model.layers", [0], 3),
        *experts("model.layers", [1], 3, ("w1.weight", "w2.weight", "w3.weight"), "block_sparse_moe"),
        *stored(["model.layers.2.feed_forward.experts.gate_up_proj"], (5, 3)),
    ]
    grouping = group(tensors)
    assert (grouping.family, grouping.n_experts) == ("mixed", {0: 3, 1: 3, 2: 5})


# -- names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.3.mlp.shared_experts.0.up_proj.weight", "model.layers.3.mlp.shared_expert.up_proj.weight",
        "model.layers.3.mlp.gate.weight", "model.layers.3.mlp.shared_expert_gate.weight",
        "model.layers.3.mlp.router.experts_bias", "lm_head.weight",
    ],
)  # fmt: skip
def test_what_is_not_under_experts_is_dense(name: str) -> None:
    assert split_name(name) is None
    blocks = names_by_key(group([*experts("model.layers", [3], 2), *stored([name])], "all"))
    key = ExpertKey(DENSE, DENSE) if name == "lm_head.weight" else ExpertKey(3, DENSE)
    assert blocks[key] == {name}


def test_every_name_can_be_made_from_its_template() -> None:
    tensors = [
        *experts("model.layers", [0, 11], 12),
        *experts("mtp.layers", [0], 12),
        *stored(["3.experts.0.w1", "3.experts.0.w2", "lonely.experts.0.w1", "lonely.experts.0.w2"]),
        *stored(["model.layers.11.norm", "mtp.layers.0.norm", "model.layers.1.x.layers.1.y", "tower.layers.0.z"]),
    ]
    made = sorted(name for names in names_by_key(group(tensors, "all")).values() for name in names)
    assert made == sorted(tensor.name for tensor in tensors)


# -- stacks ----------------------------------------------------------------------------------------------------


def test_a_second_stack_goes_after_the_last_layer_of_the_main_one() -> None:
    tensors = [
        *experts("model.layers", [1, 2], 3),
        *stored(["model.layers.0.mlp.up_proj.weight", "model.layers.5.mlp.up_proj.weight", "mtp.layers.0.norm.weight"]),
        *experts("mtp.layers", [0], 4),
    ]
    grouping = group(tensors, "all")
    assert {key.layer for key in grouping.blocks} == {0, 1, 2, 5, 6}
    assert templates(grouping, (6, 3)) == {f"mtp.layers.0.mlp.experts.{{expert}}.{part}" for part in GATED}
    assert templates(grouping, (6, DENSE)) == {"mtp.layers.0.norm.weight"}
    assert (grouping.n_layers, grouping.n_experts) == (6, {1: 3, 2: 3})


def test_a_third_stack_goes_after_the_second() -> None:
    tensors = [
        *experts("model.layers", range(3), 2),
        *experts("talker.layers", [0, 1], 2),
        *experts("mtp.layers", [0], 2),
    ]
    blocks = names_by_key(group(tensors))
    assert blocks[ExpertKey(3, 0)] == {f"mtp.layers.0.mlp.experts.0.{part}" for part in GATED}
    assert blocks[ExpertKey(5, 1)] == {f"talker.layers.1.mlp.experts.1.{part}" for part in GATED}
    assert len(blocks) == 12


def test_a_second_stack_that_does_not_collide_keeps_its_numbers() -> None:
    grouping = group([*experts("model.layers", [0, 1], 2), *experts("model.mtp", [2], 2)])
    assert templates(grouping, (2, 1)) == {f"model.mtp.{{layer}}.mlp.experts.{{expert}}.{part}" for part in GATED}


# -- what is refused -------------------------------------------------------------------------------------------


def test_missing_expert_number() -> None:
    tensors = [t for t in experts("model.layers", [0, 1], 4) if ".1.mlp.experts.2." not in t.name]
    refused(tensors, "one.safetensors", "model.layers.1.", "an expert 3, but no expert 2")


def test_expert_without_one_of_its_tensors() -> None:
    tensors = [t for t in experts("model.layers", [0], 4) if t.name != "model.layers.0.mlp.experts.0.up_proj.weight"]
    refused(tensors, "one.safetensors", "'model.layers.0.mlp.experts.0.", "expert 0 lacks up_proj.weight, unlike")


def test_an_expert_with_one_tensor_more_is_kept_and_told_of() -> None:
    tensors = [*experts("model.layers", [0], 4), *stored(["model.layers.0.mlp.experts.3.up_proj.weight_scale"])]
    grouping = group(tensors)
    assert len(grouping.blocks[ExpertKey(0, 3)]) == 4
    assert grouping.notes == (
        "model.layers.N.mlp.experts: the experts of a layer differ in their tensors' names; all are kept",
    )


def test_layer_whose_experts_all_lost_a_projection() -> None:
    tensors = [t for t in experts("model.layers", [0, 1], 4) if ".1.mlp" not in t.name or "up_proj" not in t.name]
    refused(tensors, "model.layers.1.", "every expert of this layer lacks up_proj")


def test_fused_tensors_that_disagree_on_the_number_of_experts() -> None:
    tensors = [
        *stored(["model.layers.0.mlp.experts.gate_up_proj"], (7, 3, 5)),
        *stored(["model.layers.0.mlp.experts.down_proj"], (6, 3, 5)),
    ]
    refused(tensors, "model.layers.0.mlp.experts.", "[6, 7] experts")


def test_fused_tensor_whose_first_axis_is_not_the_expert() -> None:
    tensors = [
        *stored(["model.layers.0.mlp.experts.gate_up_proj"], (7, 3, 5)),
        *stored(["model.layers.0.mlp.experts.down_proj_bias"], (3,)),
    ]
    refused(tensors, "experts.down_proj_bias", "[3] does not begin with the layer's 7 experts")


def test_fused_names_that_are_not_known() -> None:
    refused(
        stored(["transformer.blocks.0.ffn.experts.mlp.w1"], (12, 5)), "experts.mlp.w1", "DBRX", "[12, 5]", "convert"
    )


def test_fused_tensor_without_bytes() -> None:
    refused(stored(["model.layers.0.mlp.experts.gate_up_proj"], (1 << 40, 0)), "holds no bytes")


def test_fused_tensor_of_too_many_experts() -> None:
    refused(stored(["model.layers.0.mlp.experts.gate_up_proj"], (1 << 17, 3)), "up to 65536")


def test_more_blocks_than_a_manifest_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "BLOCKS_MAX", 13)
    assert len(group(experts("model.layers", range(13), 1)).blocks) == 13
    refused(experts("model.layers", range(14), 1), "more than 13 experts")


def test_layer_number_beyond_the_limit() -> None:
    refused(experts("model.layers", [1 << 16], 1), "a layer has the number 65536")

"""A name says whose tensor it is: which stack's, layer's and expert's, or nobody's among experts."""

from __future__ import annotations

import pytest

from transfer.checkpoint.names import AmongExperts, LayerName, pattern_of, refused_as, split_name
from transfer.checkpoint.safetensors_header import StoredTensor


@pytest.mark.parametrize(
    ("name", "stack", "number", "expert"),
    [
        ("model.layers.3.mlp.experts.7.up_proj.weight", "model.layers", 3, 7),
        ("language_model.model.layers.60.mlp.experts.0.w1.weight", "language_model.model.layers", 60, 0),
        ("model.language_model.layers.12.mlp.experts.gate_up_proj", "model.language_model.layers", 12, None),
        ("layers.5.ffn.experts.255.w3.scale", "layers", 5, 255),
        ("mtp.0.ffn.experts.2.w1.weight", "mtp", 0, 2),
        ("backbone.layers.3.mixer.experts.5.up_proj.weight", "backbone.layers", 3, 5),
        ("model.0.layers.3.moe.1.experts.5.w1", "model.0.layers", 3, 5),
        ("3.experts.5.w1", "", 3, 5),
    ],
)
def test_stack_layer_and_expert_are_read_from_the_name(name: str, stack: str, number: int, expert: int | None) -> None:
    parts = split_name(name)
    assert parts is not None
    assert (parts[0].stack, parts[0].number, parts[1]) == (stack, number, expert)


def test_only_canonical_numbers_count() -> None:
    parts = split_name("model.layers.03.mlp.experts.07.w1")
    assert parts == AmongExperts(LayerName("model.layers.03.mlp", 0, "", is_numbered=False), None, "07.w1")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.3.block_sparse_moe.input_linear.weight", "model.layers.3.block_sparse_moe.output_linear.weight",
        "model.layers.3.moe.gate_proj.weight", "model.layers.3.moe.down_proj.weight_scale_inv",
        "model.layers.3.mlp.experts.fc1.weight", "model.layers.3.mlp.experts.gate_and_up_projs",
    ],
)  # fmt: skip
def test_fused_experts_are_known_wherever_a_family_keeps_them(name: str) -> None:
    parts = split_name(name)
    assert parts is not None
    assert (parts.head.number, parts.expert) == (3, None)
    assert parts.head.template(parts.tail, "3") == name
    assert parts.is_experts(stored(name, (5, 3, 7)))


def stored(name: str, shape: tuple[int, ...]) -> StoredTensor:
    return StoredTensor(name, "BF16", shape, 0, 0, 0)


@pytest.mark.parametrize(
    ("tail", "shape", "answer"),
    [
        ("e_score_correction_bias", (5,), False),
        ("e_score_correction_bias", (2, 5), False),
        ("post_expert_norm", (48,), False),
        ("act_fn.alpha_p", (1,), False),
        ("router.weight", (5, 48), False),
        ("gate.weight", (5, 48), False),
        ("something", (5,), False),
        ("something", (5, 48), None),
        ("router.weight", (5, 48, 24), None),
        ("down_bias", (5, 48), None),
        ("down_proj_bias", (5, 48), True),
        ("3.anything", (5, 48), True),
    ],
)
def test_what_lies_among_experts_is_theirs_or_not_or_not_known(
    tail: str, shape: tuple[int, ...], answer: bool | None
) -> None:
    name = f"model.layers.1.mlp.experts.{tail}"
    parts = split_name(name)
    assert parts is not None
    assert parts.is_experts(stored(name, shape)) is answer


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("model.layers.0.self_attention.experts.input_linear.weight", "JetMoE"),
        ("decoder.block.1.layer.2.mlp.experts.expert_0.wi.weight", "Switch"),
        ("model.decoder.layers.1.ffn.experts.expert_3.fc1.bias", "NLLB"),
        ("transformer.blocks.0.ffn.experts.mlp.v1", "DBRX"),
    ],
)
def test_namings_that_are_known_and_not_read_are_called_by_their_model(name: str, says: str) -> None:
    assert says in str(refused_as(name))
    assert refused_as("model.layers.0.mlp.experts.0.up_proj.weight") is None


def test_a_pattern_has_no_numbers_but_those_of_names() -> None:
    assert pattern_of("decoder.block.1.layer.2.mlp.experts.expert_0.w1.weight") == (
        "decoder.block.N.layer.N.mlp.experts.expert_N.w1.weight"
    )

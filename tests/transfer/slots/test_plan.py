"""Blocks against slots: copies that put the bytes where indexing the tensors would."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shm.block import ExpertKey
from tests.transfer.slots.checkpoints import (
    FP8,
    STEM,
    Model,
    fused_parameters,
    load_by_indexing,
    noise,
    per_expert,
    same,
)
from transfer.slots import Slots
from transfer.slots.copies import gather_copies
from transfer.slots.layouts import NO_EXPERT


@st.composite
def deployments(draw: st.DrawFn) -> tuple[int, int, int, int, int, int, int, str, dict[int, list[int]]]:
    tp_size, ep_size = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 3]))
    group = draw(st.sampled_from([0, 4, 8]))
    blocks = draw(st.integers(1, 3))
    inner = tp_size * blocks * (group or draw(st.sampled_from([1, 5, 7])))
    hidden = draw(st.integers(1, 23))
    n_experts, slots = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    physical = st.lists(st.integers(NO_EXPERT, n_experts - 1), min_size=slots * ep_size, max_size=slots * ep_size)
    maps = {layer: draw(physical) for layer in (1, 4)}
    return (
        hidden,
        inner,
        group,
        n_experts,
        slots,
        tp_size,
        ep_size,
        draw(st.sampled_from(["gate_first", "up_first"])),
        maps,
    )


@settings(max_examples=80, deadline=None)
@given(deployments(), st.sampled_from([torch.bfloat16, FP8, torch.float32]))
def test_every_rank_gets_what_indexing_gives(
    deployment: tuple[int, int, int, int, int, int, int, str, dict[int, list[int]]], dtype: torch.dtype
) -> None:
    hidden, inner, group, n_experts, slots, tp_size, ep_size, layout, maps = deployment
    model = per_expert((1, 4), n_experts, hidden, inner, dtype, group)
    for ep_rank in range(ep_size):
        for tp_rank in range(tp_size):
            parameters = fused_parameters((1, 4), slots, hidden, inner // tp_size, dtype, group)
            ranks = {"ep_rank": ep_rank, "ep_size": ep_size, "tp_rank": tp_rank, "tp_size": tp_size}
            expected = load_by_indexing(parameters, model, maps, layout, (ep_rank, ep_size), (tp_rank, tp_size))
            bound = Slots.fused(parameters, physical_to_logical=maps, layout=layout, **ranks)
            plan = bound.plan(model.manifest)
            model.fill(plan)
            for name, tensor in parameters.items():
                assert same(tensor, expected[name]), name
            rows = plan.table(plan.keys).tolist()
            flat = [(n, s, *c) for n, k in enumerate(plan.keys) for s, cs in enumerate(plan.copies(k)) for c in cs]
            assert rows == flat


def test_a_block_gathered_from_its_slot_is_the_block() -> None:
    model = per_expert((0,), 3, 17, 9, torch.bfloat16, group=4)
    plain = {n: noise(t.shape, t.dtype) for k in model.tensors for n, t in model.names(k).items()}
    plan = Slots.plain(plain).plan(model.manifest)
    model.fill(plan)
    for key in plan.keys:
        assert plan.is_whole(key)
        back = bytearray(len(model.block(key)))
        gather_copies(back, plan.copies(key)[0])
        assert bytes(back) == model.block(key)


def test_the_parts_of_all_tensor_parallel_ranks_make_the_block() -> None:
    model = per_expert((2,), 2, 11, 12, torch.bfloat16)
    back = {key: bytearray(len(model.block(key))) for key in model.tensors}
    for rank in range(3):
        parameters = fused_parameters((2,), 2, 11, 4, torch.bfloat16)
        plan = Slots.fused(parameters, tp_rank=rank, tp_size=3).plan(model.manifest)
        model.fill(plan)
        for key in plan.keys:
            assert not plan.is_whole(key)
            gather_copies(back[key], plan.copies(key)[0])
    assert {key: bytes(b) for key, b in back.items()} == {key: model.block(key) for key in model.tensors}


def test_a_table_of_unlike_layers_is_in_the_order_asked_for() -> None:
    wide, narrow = per_expert((0,), 3, 9, 6, torch.bfloat16), per_expert((1,), 3, 5, 4, FP8, group=4)
    model = Model(wide.tensors | narrow.tensors)
    parameters = fused_parameters((0,), 3, 9, 6, torch.bfloat16) | fused_parameters((1,), 3, 5, 4, FP8, group=4)
    plan = Slots.fused(parameters).plan(model.manifest)
    model.fill(plan)
    keys = [ExpertKey(1, 2), ExpertKey(0, 1), ExpertKey(1, 0), ExpertKey(0, 2)]
    expected = [(n, 0, *copy) for n, key in enumerate(keys) for copy in plan.copies(key)[0]]
    assert plan.table(keys).tolist() == expected
    assert len(plan.table([])) == 0
    with pytest.raises(KeyError):
        plan.table([ExpertKey(2, 0)])


# -- shape of the instructions -------------------------------------------------------------------------------------


def test_whole_experts_are_runs_and_gate_and_up_that_touch_are_one() -> None:
    model = per_expert((0,), 2, 64, 32, torch.bfloat16)  # 4,096 bytes a tensor: no padding between them
    plan = Slots.fused(fused_parameters((0,), 2, 64, 32, torch.bfloat16)).plan(model.manifest)
    for key in plan.keys:
        ((down, gate_up),) = plan.copies(key)
        assert down.nbytes == 4096
        assert gate_up.nbytes == 8192
        assert (down.rows, gate_up.rows) == (1, 1)


def test_up_first_keeps_gate_and_up_apart() -> None:
    model = per_expert((0,), 1, 64, 32, torch.bfloat16)
    plan = Slots.fused(fused_parameters((0,), 1, 64, 32, torch.bfloat16), layout="up_first").plan(model.manifest)
    assert [c.nbytes for c in plan.copies(ExpertKey(0, 0))[0]] == [4096, 4096, 4096]


def test_columns_of_down_are_one_strided_copy() -> None:
    model = per_expert((0,), 1, 33, 8, torch.bfloat16)
    parameters = fused_parameters((0,), 1, 33, 4, torch.bfloat16)
    slots = Slots.fused(parameters, tp_rank=1, tp_size=2)
    (down, gate, up) = slots.plan(model.manifest).copies(ExpertKey(0, 0))[0]
    assert (down.block_offset, down.rows, down.run_nbytes, down.block_pitch, down.address_pitch) == (8, 33, 8, 16, 8)
    assert (gate.rows, up.rows) == (1, 1)
    assert slots.tensors[down.tensor].name.endswith("w2_weight")
    assert gate.address == parameters[STEM.format(layer=0) + "w13_weight"].data_ptr()


def test_a_redundant_expert_has_a_set_of_copies_for_each_slot() -> None:
    model = per_expert((0,), 3, 5, 7, torch.bfloat16)
    parameters = fused_parameters((0,), 3, 5, 7, torch.bfloat16)
    maps = [[0, 1, 2, 1, 2, 1]]
    plan = Slots.fused(parameters, physical_to_logical=maps, ep_rank=1, ep_size=2).plan(model.manifest)
    assert plan.keys == (ExpertKey(0, 1), ExpertKey(0, 2))
    first, sibling = plan.copies(ExpertKey(0, 1))
    assert [c.block_offset for c in first] == [c.block_offset for c in sibling]
    slot_nbytes = {0: 2 * 7 * 5 * 2, 1: 5 * 7 * 2}  # of w13 and w2: two slots lie between the two copies
    assert [b.address - a.address for a, b in zip(first, sibling, strict=True)] == [
        2 * slot_nbytes[c.tensor] for c in first
    ]


def test_a_slot_without_an_expert_is_left_alone() -> None:
    model = per_expert((0,), 1, 5, 7, torch.bfloat16)
    parameters = fused_parameters((0,), 2, 5, 7, torch.bfloat16)
    before = {n: t.clone() for n, t in parameters.items()}
    model.fill(Slots.fused(parameters, physical_to_logical={0: [0, NO_EXPERT]}).plan(model.manifest))
    for name, tensor in parameters.items():
        assert not same(tensor[0], before[name][0])
        assert same(tensor[1], before[name][1])


def test_padded_rows_keep_their_padding() -> None:
    model = per_expert((0,), 2, 5, 7, torch.bfloat16)
    stem = STEM.format(layer=0)
    padded = noise((2, 14, 9), torch.bfloat16)
    before = padded.clone()
    parameters = {stem + "w13_weight": padded[:, :, :5], stem + "w2_weight": noise((2, 5, 7), torch.bfloat16)}
    model.fill(Slots.fused(parameters).plan(model.manifest))
    assert same(padded[:, :, 5:], before[:, :, 5:])
    for expert in range(2):
        named = model.tensors[ExpertKey(0, expert)]
        expected = [named[STEM + "{expert}." + part + "_proj.weight"] for part in ("gate", "up")]
        assert same(padded[expert, :, :5], torch.cat(expected))


def test_names_that_are_no_expert_parameters_are_passed_over() -> None:
    model = per_expert((0,), 2, 5, 7, torch.bfloat16)
    parameters = fused_parameters((0,), 2, 5, 7, torch.bfloat16)
    others = [
        "model.embed_tokens.weight",
        "model.layers.0.mlp.shared_experts.w13_weight",
        "model.layers.0.mlp.gate.weight",
    ]
    slots = Slots.fused(parameters | {name: noise((3, 3), torch.float32) for name in others})
    assert {t.name for t in slots.tensors} == set(parameters)
    assert slots.plan(model.manifest).keys == slots.keys == tuple(sorted(model.tensors))


def test_ranges_that_touch_are_registered_as_one() -> None:
    memory = noise((3 * 14 * 5 + 3 * 5 * 7,), torch.bfloat16)
    stem = STEM.format(layer=0)
    w13, w2 = memory[: 3 * 14 * 5].view(3, 14, 5), memory[3 * 14 * 5 :].view(3, 5, 7)
    (only,) = Slots.fused({stem + "w13_weight": w13, stem + "w2_weight": w2}).ranges
    assert only == ("cpu", memory.data_ptr(), memory.nbytes)

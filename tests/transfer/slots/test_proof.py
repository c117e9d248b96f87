"""What lies in slots is told right from wrong to the byte, and what cannot be told is said to be so."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from shm.block import ExpertKey
from shm.checksum import checksum
from tests.transfer.slots.checkpoints import STEM, Model, fused_parameters, noise, per_expert
from transfer.memory import view
from transfer.slots import Slots
from transfer.slots.host import HostSlots
from transfer.slots.layouts import SlotMismatch
from transfer.slots.mismatch import Reference
from transfer.slots.proof import SAMPLE_EXPERTS, Findings, Proofs, compare, sample
from transfer.slots.table import SlotTable

HIDDEN, INNER, EXPERTS = 10, 14, 7
PLACEMENT = {layer: [0, 1, 2, 3, 4, 5, 6, 2] for layer in (0, 3)}


class Held:
    """A rank that holds all experts of a model, one of them twice, and the model's blocks in this process's memory."""

    def __init__(self, tp: int = 1) -> None:
        self.model = per_expert((0, 3), EXPERTS, HIDDEN, INNER, torch.bfloat16)
        self.parameters = fused_parameters((0, 3), EXPERTS + 1, HIDDEN, INNER // tp, torch.bfloat16)
        self.slots = Slots.fused(self.parameters, physical_to_logical=PLACEMENT, tp_rank=tp - 1, tp_size=tp)
        plan = self.slots.plan(self.model.manifest)
        self.model.fill(plan)
        self.table = SlotTable(plan, self.model.manifest)
        self.memory = HostSlots(self.table)
        self.references, self.alive = in_memory(self.model)

    def find(self, references: Mapping[int, Reference] | None = None) -> Findings:
        return compare(self.table, self.memory, self.references if references is None else references, self.table.rows)

    def byte(self, layer: int, slot: int, part: str, at: int) -> None:
        """Flip a bit of a slot."""
        raw = self.parameters[STEM.format(layer=layer) + f"{part}_weight"][slot].view(torch.uint8)
        raw.view(-1)[at] ^= 1


def in_memory(model: Model) -> tuple[dict[int, Reference], Any]:
    blocks = [ctypes.create_string_buffer(block, len(block)) for block in map(model.block, model.manifest.keys)]
    references = {
        row: Reference(checksum(bytes(block)), ctypes.addressof(block)) for row, block in enumerate(blocks)
    }  # fmt: skip
    return references, blocks


def rows_of(held: Held, *keys: tuple[int, int]) -> tuple[int, ...]:
    return tuple(held.model.manifest.index(*key) for key in keys)


@pytest.mark.parametrize("tp", [1, 2, 7])
def test_right_slots_are_right_and_one_bit_anywhere_is_wrong(tp: int) -> None:
    held = Held(tp)
    assert held.find() == Findings(tuple(held.table.rows), (), ())
    for layer, slot, part, at in ((0, 4, "w13", 0), (3, 6, "w2", -1), (3, 7, "w13", -1)):
        held.byte(layer, slot, part, at)
        expert = PLACEMENT[layer][slot]
        assert held.find().wrong == rows_of(held, (layer, expert)), "the second slot of an expert counts as much"
        held.byte(layer, slot, part, at)
    assert held.find().wrong == ()


@pytest.mark.parametrize("tp", [1, 2])
def test_rows_that_are_padded_in_memory_are_looked_at_without_the_padding(tp: int) -> None:
    model = per_expert((0,), 2, HIDDEN, INNER, torch.bfloat16)
    parameters = fused_parameters((0,), 2, HIDDEN, INNER // tp, torch.bfloat16)
    w2 = STEM.format(layer=0) + "w2_weight"
    wider = noise((2, HIDDEN, INNER // tp + 3), torch.bfloat16)
    parameters[w2] = wider[..., : INNER // tp]
    plan = Slots.fused(parameters, tp_size=tp).plan(model.manifest)
    model.fill(plan)
    table = SlotTable(plan, model.manifest)
    references, _alive = in_memory(model)
    wider[..., INNER // tp :] = 3
    assert compare(table, HostSlots(table), references, table.rows).right == (0, 1)
    wider.view(torch.uint8)[1, 3, 0] ^= 1
    assert compare(table, HostSlots(table), references, table.rows).wrong == (1,)


def test_what_nobody_knows_is_unknown_and_the_checksum_of_a_whole_block_is_enough() -> None:
    held = Held()
    checksums = {row: Reference(reference.checksum) for row, reference in held.references.items() if row != 3}
    held.byte(3, 5, "w2", 8)
    (wrong,) = rows_of(held, (3, 5))
    assert held.find(checksums) == Findings(tuple(set(held.table.rows) - {3, wrong}), (wrong,), (3,))


def test_parts_are_unknown_without_the_block_and_beside_one_that_is_rotten() -> None:
    held = Held(tp=2)
    references = dict(held.references)
    references[2] = Reference(references[2].checksum)
    rotten = references[5]
    assert rotten.address is not None
    view(rotten.address, int(held.model.manifest.nbytes[5]))[-1] ^= 1  # of up_proj, whose last rows this rank has
    assert held.find(references) == Findings(tuple(set(held.table.rows) - {2, 5}), (), (2, 5))


def test_a_sample_has_some_of_each_layer() -> None:
    held = Held()
    chosen = [held.model.manifest.keys[row] for row in sample(held.table, held.table.rows)]
    for layer in (0, 3):
        experts = [key.expert for key in chosen if key.layer == layer]
        assert len(experts) == SAMPLE_EXPERTS
        assert {0, EXPERTS - 1} <= set(experts)
    assert sample(held.table, [5]) == [5]
    assert sample(held.table, []) == []


def test_one_expert_proves_the_layout_of_its_layer_and_no_other() -> None:
    held, proofs = Held(), Proofs()
    proofs.begin("a content")
    proofs.prove(held.table, held.memory, held.references, rows_of(held, (3, 2)))
    assert [held.model.manifest.keys[row].layer for row in proofs.lacking(held.table, held.table.rows)] == [0] * EXPERTS


def test_a_slot_that_differs_proves_nothing() -> None:
    held, proofs = Held(), Proofs()
    held.byte(0, 1, "w2", 3)
    with pytest.raises(SlotMismatch, match="layer 0, expert 1"):
        proofs.prove(held.table, held.memory, held.references, held.table.rows)
    assert proofs.lacking(held.table, held.table.rows) == held.table.rows


@pytest.mark.parametrize(("content", "stays"), [("one", True), ("another", False), (None, False)])
def test_a_proof_outlives_a_new_placement_but_not_another_content(content: str | None, stays: bool) -> None:
    held, proofs = Held(), Proofs()
    proofs.begin("one")
    proofs.prove(held.table, held.memory, held.references, held.table.rows)
    proofs.begin(content)
    turned = {layer: row[::-1] for layer, row in PLACEMENT.items()}
    table = SlotTable(
        Slots.fused(held.parameters, physical_to_logical=turned).plan(held.model.manifest), held.model.manifest
    )
    assert (proofs.lacking(table, table.rows) == []) == stays


@pytest.mark.parametrize("changed", ["memory", "order of the halves", "tensor-parallel rank"])
def test_a_proof_is_of_these_parameters_in_this_layout(changed: str) -> None:
    held, proofs = Held(tp=2), Proofs()
    proofs.prove(held.table, held.memory, held.references, held.table.rows)
    parameters = dict(held.parameters)
    if changed == "memory":
        parameters = {name: tensor.clone() for name, tensor in parameters.items()}
    layout = "up_first" if "order" in changed else "gate_first"
    rank = 0 if "rank" in changed else 1
    slots = Slots.fused(parameters, physical_to_logical=PLACEMENT, layout=layout, tp_rank=rank, tp_size=2)
    table = SlotTable(slots.plan(held.model.manifest), held.model.manifest)
    assert proofs.lacking(table, table.rows) == table.rows


def test_experts_in_tensors_of_their_own_are_proved_by_each_other() -> None:
    model = per_expert((1,), 4, HIDDEN, INNER, torch.bfloat16)
    named = {name: tensor for key in model.manifest.keys for name, tensor in model.names(key).items()}
    table = SlotTable(Slots.plain(named).plan(model.manifest), model.manifest)
    references, _alive = in_memory(model)
    proofs = Proofs()
    proofs.prove(table, HostSlots(table), references, [model.manifest.index(*ExpertKey(1, 2))])
    assert proofs.lacking(table, table.rows) == []

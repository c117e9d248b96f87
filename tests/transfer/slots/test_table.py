"""Every copy of a rank's slots, by manifest row."""

from __future__ import annotations

import pytest
import torch

from shm.block import ExpertKey
from tests.transfer.slots.checkpoints import Model, fused_parameters, per_expert
from transfer.slots import Slots
from transfer.slots.table import SlotTable

PLACEMENT = [2, 0, 2]  # two slots of expert 2, none of expert 1


@pytest.fixture
def model() -> Model:
    return per_expert((0, 1), 3, 17, 8, torch.bfloat16)


def table_of(model: Model, **ranks: int) -> SlotTable:
    parameters = fused_parameters((0, 1), len(PLACEMENT), 17, 8 // ranks.get("tp_size", 1), torch.bfloat16)
    maps = dict.fromkeys((0, 1), PLACEMENT)
    slots = Slots.fused(parameters, physical_to_logical=maps, **ranks)
    return SlotTable(slots.plan(model.manifest), model.manifest)


def test_it_has_the_rows_that_have_a_slot(model: Model) -> None:
    table = table_of(model)
    assert table.rows == [model.manifest.index(layer, expert) for layer in (0, 1) for expert in (0, 2)]
    assert model.manifest.index(0, 2) in table
    assert model.manifest.index(0, 1) not in table


def test_copies_of_a_block_are_by_slot_and_the_same_as_those_of_several_blocks(model: Model) -> None:
    table = table_of(model)
    twice, once = model.manifest.index(0, 2), model.manifest.index(1, 0)
    first, second = table.by_slot(twice)
    assert [copy._replace(address=0) for copy in first] == [copy._replace(address=0) for copy in second]
    assert {copy.address for copy in first}.isdisjoint(copy.address for copy in second)
    together, block_of = table.copies_of([once, twice])
    assert together.tolist() == table.copies(once).tolist() + table.copies(twice).tolist()
    assert block_of.tolist() == [0] * len(table.copies(once)) + [1] * len(table.copies(twice))


def test_parts_of_blocks_are_neither_whole_nor_direct_and_whole_ones_are_both(model: Model) -> None:
    row = model.manifest.index(0, 0)
    whole, part = table_of(model), table_of(model, tp_rank=1, tp_size=2)
    assert (whole.is_whole(row), whole.is_direct(row)) == (True, True)
    assert (part.is_whole(row), part.is_direct(row)) == (False, False)
    assert any(copy.rows > 1 for copies in part.by_slot(row) for copy in copies), "columns of down are strided"


def test_a_whole_block_in_padded_rows_is_not_direct(model: Model) -> None:
    padded = {
        name: torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 5, dtype=tensor.dtype)[..., : tensor.shape[-1]]
        for name, tensor in fused_parameters((0, 1), 3, 17, 8, torch.bfloat16).items()
    }
    table = SlotTable(Slots.fused(padded).plan(model.manifest), model.manifest)
    row = model.manifest.index(1, 1)
    assert table.keys[0] == ExpertKey(0, 0)
    assert (table.is_whole(row), table.is_direct(row)) == (True, False)

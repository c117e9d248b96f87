"""Whoever described slots wrongly is told which expert and tensor differ, and what to give instead."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.transfer.slots.checkpoints import STEM, fused_parameters, per_expert
from tests.transfer.slots.test_proof import in_memory
from transfer.slots import Slots
from transfer.slots.host import HostSlots
from transfer.slots.layouts import SlotMismatch
from transfer.slots.mismatch import Reference
from transfer.slots.proof import Proofs
from transfer.slots.table import SlotTable

HIDDEN, INNER, EXPERTS = 6, 8, 9
W13, W2 = STEM.format(layer=1) + "w13_weight", STEM.format(layer=1) + "w2_weight"


class Rank:
    """Layers 0 and 1 of a model, in parameters that `spoil` may change before they are looked at."""

    def __init__(self, tp: int = 1) -> None:
        self.tp = tp
        self.model = per_expert((0, 1), EXPERTS, HIDDEN, INNER, torch.bfloat16)
        self.parameters = fused_parameters((0, 1), EXPERTS, HIDDEN, INNER // tp, torch.bfloat16)
        self.model.fill(Slots.fused(self.parameters, tp_size=tp).plan(self.model.manifest))
        self.references, self._alive = in_memory(self.model)

    def said(self, **described: object) -> str:
        slots = Slots.fused(self.parameters, tp_size=self.tp, **described)  # type: ignore[arg-type]
        table = SlotTable(slots.plan(self.model.manifest), self.model.manifest)
        with pytest.raises(SlotMismatch) as raised:
            Proofs().prove(table, HostSlots(table), self.references, table.rows)
        return str(raised.value)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    ("parameter", "row", "tensor"), [(W13, 0, "gate_proj"), (W13, -1, "up_proj"), (W2, 2, "down_proj")]
)
def test_the_tensor_and_the_slot_are_named(tp: int, parameter: str, row: int, tensor: str) -> None:
    rank = Rank(tp)
    rank.parameters[parameter].view(torch.uint8)[7, row, 1] ^= 3
    said = rank.said()
    assert said.startswith("layer 1, expert 7: ")
    assert f"slot 7 of {parameter} does not hold model.layers.1.mlp.experts.7.{tensor}.weight" in said
    assert "1 of 18 experts that were looked at differ" in said
    assert "name them with bind(…, lost=…)" in said


def interleave(w13: torch.Tensor) -> torch.Tensor:
    gate, up = w13.chunk(2, 1)
    return torch.stack([gate, up], 2).reshape(w13.shape)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    "rewrite",
    [interleave, lambda w13: torch.cat(w13.chunk(2, 1)[::-1], 1), lambda w13: w13.flip(1)],
    ids=["rows in turn", "up first", "rows reversed"],
)
def test_the_same_bytes_in_another_order_are_told_from_other_weights(
    rewrite: Callable[[torch.Tensor], torch.Tensor], tp: int
) -> None:
    rank = Rank(tp)
    for layer in (0, 1):
        w13 = rank.parameters[STEM.format(layer=layer) + "w13_weight"]
        w13.copy_(rewrite(w13.clone()))
    said = rank.said()
    assert "the same bytes in another order" in said
    assert "gate_proj.weight" in said


@pytest.mark.parametrize("tp", [1, 2])
def test_experts_of_other_ranks_are_told_by_their_number(tp: int) -> None:
    rank = Rank(tp)
    turned = [[*range(3, EXPERTS), 0, 1, 2]] * 2
    assert "it holds expert 6 of that layer: the ranks or the placement are others" in rank.said(
        physical_to_logical=turned
    )


def test_the_layer_that_it_is_in_truth_is_named() -> None:
    rank = Rank()
    swapped = {
        name.replace("layers.0", "layers.x").replace("layers.1", "layers.0").replace("layers.x", "layers.1"): tensor
        for name, tensor in rank.parameters.items()
    }
    rank.parameters = swapped
    assert "it holds expert 0 of layer 1, as the manifest counts: the parameter is of another layer" in rank.said()


def test_other_weights_are_told_from_a_few_that_were_lost() -> None:
    rank = Rank()
    for tensor in rank.parameters.values():
        tensor.view(torch.uint8).bitwise_xor_(1)
    assert "18 of 18 experts that were looked at differ; other weights than the nodes keep" in rank.said()


def test_without_the_block_on_this_host_the_expert_and_its_tensors_are_named() -> None:
    rank = Rank()
    rank.references = {row: Reference(reference.checksum) for row, reference in rank.references.items()}
    rank.parameters[W2].view(torch.uint8)[4] ^= 1
    said = rank.said()
    assert said.startswith("layer 1, expert 4: slot 4 of ")
    for part in ("gate", "up", "down"):
        assert f"model.layers.1.mlp.experts.4.{part}_proj.weight" in said

"""What lies in a slot is what was verified, also where it is a part of a block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from shm.block import ExpertKey, TensorEntry
from shm.checksum import checksum
from shm.manifest import FileSpec, Manifest
from transfer.memory import view
from transfer.slots import Slots, host
from transfer.slots.copies import SlotCopy, apply_copies
from transfer.slots.host import UNEQUAL, HostSlots, agreed
from transfer.slots.table import SlotTable

HIDDEN, ROWS = 33, 14
SHAPES = {"gate": (ROWS, HIDDEN), "up": (ROWS, HIDDEN), "down": (HIDDEN, ROWS)}


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("placement", [[0, 1], [1, 0, 1]], ids=["once", "twice"])
def test_a_slot_that_is_not_what_was_copied_is_not_called_good(
    tp: int, placement: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [
        TensorEntry(f"model.layers.{{layer}}.mlp.experts.{{expert}}.{part}_proj.weight", "BF16", shape, 0, 0)
        for part, shape in SHAPES.items()
    ]
    keys = [ExpertKey(0, expert) for expert in range(2)]
    manifest = Manifest.build("m", "t", "experts", [FileSpec("f", 1 << 20, "0")], dict.fromkeys(keys, entries))
    stem, slots, rows = "model.layers.0.mlp.experts.", len(placement), ROWS // tp
    held = {
        f"{stem}w13_weight": torch.zeros((slots, 2 * rows, HIDDEN), dtype=torch.bfloat16),
        f"{stem}w2_weight": torch.zeros((slots, HIDDEN, rows + 1), dtype=torch.bfloat16)[..., :rows],  # padded rows
    }
    described = Slots.fused(held, physical_to_logical=[placement], tp_rank=tp - 1, tp_size=tp)
    memory = HostSlots(SlotTable(described.plan(manifest), manifest))
    block = np.zeros(int(manifest.nbytes[1]), np.uint8)
    for tensor in manifest.schema(1).tensors:
        block[tensor.offset : tensor.offset + tensor.nbytes] = np.frombuffer(
            np.random.default_rng(3).bytes(tensor.nbytes), np.uint8
        )
    where = [(1, int(block.ctypes.data))]
    assert memory.put(where) == {1: checksum(memoryview(block))}

    def slip(source: Any, copies: Sequence[SlotCopy]) -> None:
        apply_copies(source, copies)
        last = copies[-1]
        view(last.address + (last.rows - 1) * last.address_pitch, last.run_nbytes)[-1] ^= 1

    monkeypatch.setattr(host, "apply_copies", slip)
    found = memory.put(where)[1]
    assert found != checksum(memoryview(block))
    if tp > 1:
        assert found == UNEQUAL


def test_slots_of_one_expert_have_a_checksum_only_where_they_agree() -> None:
    assert agreed([b"3" * 16, b"3" * 16]) == b"3" * 16
    assert agreed([b"3" * 16, b"5" * 16, b"3" * 16]) == UNEQUAL
    assert agreed([]) == UNEQUAL

"""Whole blocks, one behind the other in memory of their own, are filled and verified as slots are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from shm.checksum import checksum
from transfer.slots.host import HostSlots
from transfer.slots.layouts import SlotMismatch
from transfer.slots.whole import ALIGNMENT, offsets_of, whole_blocks


def test_blocks_are_filled_side_by_side(make_manifest: Callable[..., Any]) -> None:
    manifest = make_manifest()
    rows = [5, 1, 3]
    offsets, total = offsets_of(manifest, rows)
    assert [at % ALIGNMENT for at in offsets.values()] == [0, 0, 0]
    memory = torch.zeros(total, dtype=torch.uint8)
    table = whole_blocks(manifest, offsets, memory)
    assert table.rows == sorted(rows)
    assert all(table.is_whole(row) and table.is_direct(row) for row in rows)
    blocks = {row: bytes([row]) * int(manifest.nbytes[row]) for row in rows}
    held = {row: torch.frombuffer(bytearray(block), dtype=torch.uint8) for row, block in blocks.items()}
    taken = HostSlots(table).put([(row, tensor.data_ptr()) for row, tensor in held.items()])
    assert taken == {row: checksum(memoryview(block)) for row, block in blocks.items()}
    for row, at in offsets.items():
        assert bytes(memory[at : at + len(blocks[row])].tolist()) == blocks[row]


def test_memory_that_is_not_plain_is_refused(make_manifest: Callable[..., Any]) -> None:
    manifest = make_manifest()
    offsets, total = offsets_of(manifest, [0])
    with pytest.raises(SlotMismatch, match="strides"):
        whole_blocks(manifest, offsets, torch.zeros(2 * total, dtype=torch.uint8)[::2])

"""Whole blocks in memory of their own, described as slots are.

An engine that starts has no slots yet: what it asks for are blocks as they are, somewhere. Such a place is a slot that
takes all of a block in one run, so that everything which fills and verifies slots fills these too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from shm.manifest import Manifest
from transfer.slots.copies import SlotCopy
from transfer.slots.layouts import Form, describe
from transfer.slots.plan import Places, SlotPlan
from transfer.slots.table import SlotTable

if TYPE_CHECKING:
    import torch

ALIGNMENT = 256  # bytes; what CUDA aligns its own allocations to


def offsets_of(manifest: Manifest, rows: Sequence[int]) -> tuple[dict[int, int], int]:
    """Where blocks begin that lie one behind the other, by manifest row, and how many bytes they take in all."""
    offsets, end = {}, 0
    for row, nbytes in zip(rows, manifest.nbytes[list(rows)].tolist(), strict=True):
        offsets[row] = end
        end += -(-nbytes // ALIGNMENT) * ALIGNMENT
    return offsets, end


def whole_blocks(manifest: Manifest, offsets: dict[int, int], memory: torch.Tensor) -> SlotTable:
    """These blocks at these offsets of `memory`, uint8 [bytes], on any device. Raises SlotMismatch for other memory."""
    described = describe("memory for blocks", memory)
    places, templates = {}, {}
    for row, offset in offsets.items():
        key, nbytes = manifest.keys[row], int(manifest.nbytes[row])
        places[key] = Places(Form((), (nbytes,), 0, 1), (0,), ((described.address + offset,),), None)
        templates[key] = (SlotCopy(0, 0, 1, nbytes, nbytes, nbytes, 0),)
    return SlotTable(SlotPlan((described,), places, templates), manifest)

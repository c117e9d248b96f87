"""What to say of slots that do not hold what they should: where, which tensor, and the likely reason.

Found out from the bytes: whoever reads it has to know whether to give other ranks, another layout, or other weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shm.block import fill_template
from shm.checksum import checksum
from transfer.slots.copies import SlotCopy, gather_copies, within
from transfer.slots.host import SlotMemory
from transfer.slots.layouts import SlotMismatch
from transfer.slots.table import SlotTable

OTHER_WEIGHTS = (
    "other weights than the nodes keep, or a kernel has packed or quantised them again: bind beside nodes that keep "
    "these very weights, or reload from disk"
)
FEW = 0.5  # of the experts that were looked at: if fewer are wrong, the layout is right and these slots were lost


class Reference(NamedTuple):
    """A block as it should be: its xxh3-128, and its address in this process's memory, where it lies there."""

    checksum: bytes
    address: int | None = None


def explain(
    table: SlotTable, memory: SlotMemory, references: Mapping[int, Reference], wrong: Sequence[int], right_count: int
) -> SlotMismatch:
    """The error for slots whose bytes differ. Names one expert and tensor, of one whose right bytes are at hand."""
    row = next((row for row in wrong if references[row].address is not None), wrong[0])
    layer, expert = table.manifest.keys[row]
    looked = len(wrong) + right_count
    said = f"{len(wrong)} of {looked} experts that were looked at differ"
    where, reason = _first(table, memory, references, row)
    if len(wrong) < FEW * looked:
        lost = "the others are right: if these were lost, name them with bind(…, lost=…)"
        reason = lost if reason is None else f"{reason}; {lost}"
    return SlotMismatch(f"layer {layer}, expert {expert}: {where}; {said}; {reason or OTHER_WEIGHTS}")


def _first(
    table: SlotTable, memory: SlotMemory, references: Mapping[int, Reference], row: int
) -> tuple[str, str | None]:
    """What differs where, and the reason if the bytes tell one."""
    reference = references[row]
    for slot, copies in enumerate(table.by_slot(row)):
        taken = memory.gather(row, slot)
        right = None if reference.address is None else _part(table, reference.address, row, copies)
        if right == taken or (right is None and checksum(memoryview(taken)) == reference.checksum):
            continue
        owner = _owner(table, references, row, copies, taken)
        misplaced = None if owner is None else _misplaced(table, row, owner)
        if right is None:
            names = " or ".join(table.manifest.tensor_names(row))
            return f"{_slot_of(table, row, copies[0])} does not hold {names} as the nodes have it", misplaced
        at = int(np.argmax(np.frombuffer(taken, np.uint8) != np.frombuffer(right, np.uint8)))
        where = f"{_slot_of(table, row, _covering(copies, at))} does not hold {_tensor_at(table, row, at)}"
        return where, misplaced or _rearranged(taken, right)
    return "its slots changed while they were looked at", "bind while nothing writes to them"


def _part(table: SlotTable, address: int, row: int, copies: Sequence[SlotCopy]) -> bytearray:
    """What a slot with these copies should have of the block at `address`."""
    part = bytearray(int(table.manifest.nbytes[row]))
    gather_copies(part, within(copies, address))
    return part


def _owner(
    table: SlotTable, references: Mapping[int, Reference], row: int, copies: Sequence[SlotCopy], taken: bytearray
) -> int | None:
    """The row whose bytes these are, as far as the references tell."""
    if table.is_whole(row):
        held = checksum(memoryview(taken))
        return next((other for other, it in references.items() if it.checksum == held), None)
    schemas, layers = table.manifest.rows["schema"], table.manifest.rows["layer"]
    for other, reference in references.items():
        is_like = schemas[other] == schemas[row] and layers[other] == layers[row]
        if is_like and reference.address is not None and _part(table, reference.address, other, copies) == taken:
            return other
    return None


def _misplaced(table: SlotTable, row: int, owner: int) -> str:
    (layer, _), (found, expert) = table.manifest.keys[row], table.manifest.keys[owner]
    if found == layer:
        return (
            f"it holds expert {expert} of that layer: the ranks or the placement are others, so give the right "
            "ep_rank, ep_size and physical_to_logical"
        )
    return (
        f"it holds expert {expert} of layer {found}, as the manifest counts: the parameter is of another layer or "
        "stack than its name says; leave it out, or bind its tensors with Slots.plain"
    )


def _rearranged(taken: bytearray, right: bytearray) -> str | None:
    if not np.array_equal(_counts(taken), _counts(right)):
        return None
    return (
        "the same bytes in another order: the halves of w13 are the other way round (layout=), or a kernel has "
        "interleaved, shuffled or transposed them; reload from disk"
    )


def _counts(block: bytearray) -> npt.NDArray[np.intp]:
    """How often each value of a byte is there."""
    return np.bincount(np.frombuffer(block, np.uint8), minlength=256)


def _covering(copies: Sequence[SlotCopy], at: int) -> SlotCopy:
    """The copy that brings this byte of the block."""
    for copy in copies:
        number, within_run = divmod(at - copy.block_offset, copy.block_pitch)
        if 0 <= number < copy.rows and within_run < copy.run_nbytes:
            return copy
    raise AssertionError("a byte that no copy brings cannot differ")


def _slot_of(table: SlotTable, row: int, copy: SlotCopy) -> str:
    tensor = table.tensors[copy.tensor]
    if not table.layout(row).parameters:  # it holds this expert and no other
        return tensor.name
    return f"slot {(copy.address - tensor.address) // tensor.strides[0]} of {tensor.name}"


def _tensor_at(table: SlotTable, row: int, at: int) -> str:
    key = table.manifest.keys[row]
    tensors = table.manifest.schema(row).tensors
    return fill_template(next(t.name for t in tensors if t.offset <= at < t.offset + t.nbytes), key)

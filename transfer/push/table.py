"""Where blocks belong in another process's memory, small enough to send: relative copies by form, bases by slot.

A *form* is the list of copies of slots that look alike, counted from base addresses; a *slot* names its expert, its
form and its bases. DeepSeek-V3's 14,848 experts are one form and 14,848 short rows. Nothing here trusts the sender:
every byte that a table can write lies within its block and within a range that was given, and no two copies overlap.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from shm.block import NBYTES_MAX
from shm.errors import InvalidInput
from shm.manifest import Manifest
from transfer.engine import Copy
from transfer.slots import Slots

RANGES_MAX = 1 << 17  # a rank with one parameter a tensor: DeepSeek-V3 whole has 89,088
FORMS_MAX = 1 << 12
SLOTS_MAX = 1 << 17
COPIES_PER_FORM_MAX = 1 << 12
COPIES_MAX = 1 << 20  # of all slots
RUNS_PER_SLOT_MAX = 1 << 18  # a strided copy is one run a row
BASES_MAX = 1 << 12
ADDRESS_MAX = 1 << 62

Int64s = npt.NDArray[np.int64]


class FormCopy(NamedTuple):
    """`rows` runs of `run_nbytes`, `block_pitch` apart in the block, `pitch` apart at bases[`base`] + `offset`."""

    block_offset: int
    base: int
    offset: int
    rows: int
    run_nbytes: int
    block_pitch: int
    pitch: int

    @property
    def block_end(self) -> int:
        return self.block_offset + (self.rows - 1) * self.block_pitch + self.run_nbytes

    @property
    def span(self) -> int:
        return (self.rows - 1) * self.pitch + self.run_nbytes


class SlotBases(NamedTuple):
    """One slot: which expert it holds, what it looks like, and where. Two slots of one expert are siblings."""

    layer: int
    expert: int
    form: int
    bases: tuple[int, ...]


class PushTable:
    """The places of blocks in the memory of the process that `session_id` names. Immutable; build with `build`."""

    def __init__(
        self,
        session_id: str,
        ranges: Int64s,
        forms: tuple[tuple[FormCopy, ...], ...],
        slots: Mapping[int, tuple[SlotBases, ...]],
    ) -> None:
        self.session_id = session_id
        self._ranges = ranges
        self._forms = forms
        self._slots = slots

    @classmethod
    def build(
        cls,
        manifest: Manifest,
        session_id: str,
        ranges: Iterable[Sequence[int]],
        forms: Iterable[Sequence[FormCopy]],
        slots: Iterable[SlotBases],
    ) -> PushTable:
        """Check everything. `ranges` are (address, nbytes) of registered memory.

        Raises InvalidInput for what is out of limits or out of place, BlockUnavailable for experts of another model.
        """
        checked = _check_ranges([(int(address), int(nbytes)) for address, nbytes in ranges])
        made = tuple(tuple(form) for form in forms)
        _check_count("forms", len(made), FORMS_MAX)
        for number, form in enumerate(made):
            _check_form(number, form)
        by_row: dict[int, list[SlotBases]] = defaultdict(list)
        by_form: dict[int, list[SlotBases]] = defaultdict(list)
        for slot in slots:
            row = manifest.index(slot.layer, slot.expert)
            _check_slot(slot, made, int(manifest.nbytes[row]))
            by_row[row].append(slot)
            by_form[slot.form].append(slot)
        _check_count("slots", sum(map(len, by_row.values())), SLOTS_MAX)
        _check_count("copies", sum(len(made[f]) * len(alike) for f, alike in by_form.items()), COPIES_MAX)
        _check_places(checked, [_spans(made[f], alike) for f, alike in by_form.items()])
        return cls(session_id, checked, made, {row: tuple(by_row[row]) for row in sorted(by_row)})

    # -- reading ---------------------------------------------------------------------------------------------

    @property
    def rows(self) -> tuple[int, ...]:
        """Manifest rows of the blocks that have a slot, ascending."""
        return tuple(self._slots)

    @property
    def slot_count(self) -> int:
        return sum(map(len, self._slots.values()))

    @property
    def range_count(self) -> int:
        return len(self._ranges)

    @property
    def nbytes(self) -> int:
        """Bytes that a push of every block writes."""
        sizes = [sum(copy.rows * copy.run_nbytes for copy in form) for form in self._forms]
        return sum(sizes[slot.form] for slots in self._slots.values() for slot in slots)

    def __contains__(self, row: int) -> bool:
        return row in self._slots

    def copies(self, row: int, address: int) -> list[Copy]:
        """What to write so that the block at `address` in our memory gets into every slot it has."""
        return [
            Copy(
                slot.bases[copy.base] + copy.offset + number * copy.pitch,
                address + copy.block_offset + number * copy.block_pitch,
                copy.run_nbytes,
            )
            for slot in self._slots[row]
            for copy in self._forms[slot.form]
            for number in range(copy.rows)
        ]

    # -- sending ---------------------------------------------------------------------------------------------

    def part(self, rows: Iterable[int]) -> dict[str, Any]:
        """The table of these blocks alone, as JSON: `session_id`, `ranges`, `forms`, `slots`."""
        slots = [slot for row in rows for slot in self._slots[row]]
        used = sorted({slot.form for slot in slots})
        numbers = {form: number for number, form in enumerate(used)}
        spans = [_spans(self._forms[f], [s for s in slots if s.form == f]) for f in used]
        found = {int(i) for starts, _ in spans for i in np.unique(_range_of(self._ranges, starts.reshape(-1)))}
        return {
            "session_id": self.session_id,
            "ranges": self._ranges[sorted(found)].tolist(),
            "forms": [[copy._asdict() for copy in self._forms[f]] for f in used],
            "slots": [
                {"layer": s.layer, "expert": s.expert, "form": numbers[s.form], "bases": list(s.bases)} for s in slots
            ],
        }


def consumer_document(
    slots: Slots, manifest: Manifest, session_id: str, ttl_s: float, content_digest: str | None = None
) -> dict[str, Any]:
    """What an engine sends as `PUT /v1/consumers/{id}`, after it registered `slots.ranges` with its own engine.

    `session_id` is that engine's. `content_digest` is of the weights that the slots hold, as `GET /v1/node` tells it:
    of no others a byte is written; with None those count that the node has when it takes the registration. Raises
    SlotMismatch where the slots do not take plain copies of the blocks.
    """
    plan = slots.plan(manifest)
    keys = plan.keys
    copies = plan.table(keys)
    forms: dict[tuple[tuple[int, ...], ...], int] = {}
    made: list[dict[str, Any]] = []
    groups: dict[tuple[int, int], list[tuple[int, ...]]] = defaultdict(list)
    for key, slot, *copy in copies.tolist():
        groups[key, slot].append(tuple(copy))
    for (key, _), group in groups.items():
        bases, form = _relative(group)
        number = forms.setdefault(form, len(forms))
        made.append({**keys[key]._asdict(), "form": number, "bases": list(bases)})
    return {
        "session_id": session_id,
        "manifest_digest": manifest.digest,
        "content_digest": content_digest,
        "ranges": [[r.address, r.nbytes] for r in slots.ranges],
        "forms": [[FormCopy(*copy)._asdict() for copy in form] for form in forms],
        "slots": made,
        "ttl_s": ttl_s,
    }


def _relative(group: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """A slot's copies counted from the lowest address in each of its tensors: what slots that look alike share."""
    lowest: dict[int, int] = {}
    for _, address, *_, tensor in group:
        lowest[tensor] = min(address, lowest.get(tensor, address))
    numbers = {tensor: number for number, tensor in enumerate(lowest)}
    form = tuple(
        (offset, numbers[tensor], address - lowest[tensor], rows, run, block_pitch, pitch)
        for offset, address, rows, run, block_pitch, pitch, tensor in group
    )
    return tuple(lowest.values()), form


# -- checking --------------------------------------------------------------------------------------------------


def _check_count(what: str, count: int, most: int) -> None:
    if not 0 < count <= most:
        raise InvalidInput(f"{count:,} {what}: give 1 to {most:,}")


def _check_ranges(ranges: Sequence[tuple[int, int]]) -> Int64s:
    """The ranges in ascending order."""
    _check_count("ranges", len(ranges), RANGES_MAX)
    if not all(0 < address <= ADDRESS_MAX and 0 < nbytes <= NBYTES_MAX for address, nbytes in ranges):
        raise InvalidInput("ranges: an address or a length is out of its limits; give [address, nbytes] above 0")
    ordered = np.array(sorted(ranges), dtype=np.int64)
    if (ordered[:-1].sum(axis=1) > ordered[1:, 0]).any():
        raise InvalidInput("ranges overlap: name memory once")
    return ordered


def _check_form(number: int, form: Sequence[FormCopy]) -> None:
    _check_count(f"copies in form {number}", len(form), COPIES_PER_FORM_MAX)
    for copy in form:
        numbers = (copy.block_offset, copy.offset, copy.block_pitch, copy.pitch)
        if min(numbers) < 0 or max(numbers) > NBYTES_MAX or not 0 <= copy.base < BASES_MAX:
            raise InvalidInput(f"form {number}: {copy} has a number out of its limits")
        if not (1 <= copy.rows <= RUNS_PER_SLOT_MAX and 1 <= copy.run_nbytes <= NBYTES_MAX):
            raise InvalidInput(f"form {number}: {copy} copies nothing, or more than any block has")
        if copy.rows > 1 and min(copy.pitch, copy.block_pitch) < copy.run_nbytes:
            raise InvalidInput(f"form {number}: rows of {copy} overlap: a pitch is at least a run")
        if max(copy.span, copy.block_end) > NBYTES_MAX:
            raise InvalidInput(f"form {number}: {copy} is larger than any block")
    _check_count(f"runs in form {number}", sum(copy.rows for copy in form), RUNS_PER_SLOT_MAX)


def _check_slot(slot: SlotBases, forms: Sequence[Sequence[FormCopy]], nbytes: int) -> None:
    where = f"slot of layer {slot.layer}, expert {slot.expert}"
    if not 0 <= slot.form < len(forms):
        raise InvalidInput(f"{where}: there is no form {slot.form}")
    form = forms[slot.form]
    if len(slot.bases) != 1 + max(copy.base for copy in form):
        raise InvalidInput(f"{where}: {len(slot.bases)} bases, form {slot.form} has another number")
    if min(slot.bases) <= 0 or max(slot.bases) > ADDRESS_MAX:
        raise InvalidInput(f"{where}: a base is no address")
    if (end := max(copy.block_end for copy in form)) > nbytes:
        raise InvalidInput(f"{where}: form {slot.form} takes byte {end:,} of a block of {nbytes:,}")


def _spans(form: Sequence[FormCopy], slots: Sequence[SlotBases]) -> tuple[Int64s, Int64s]:
    """First address and end of every copy of slots of one form: [slots, copies]."""
    bases = np.array([slot.bases for slot in slots], dtype=np.int64)
    table = np.array([(copy.base, copy.offset, copy.span) for copy in form], dtype=np.int64)
    starts = bases[:, table[:, 0]] + table[:, 1]
    return starts, starts + table[:, 2]


def _range_of(ranges: Int64s, starts: Int64s) -> Int64s:
    """Index of the last range that begins at or before each address; -1 where none does."""
    found: Int64s = np.searchsorted(ranges[:, 0], starts, "right") - 1
    return found


def _check_places(ranges: Int64s, spans: Sequence[tuple[Int64s, Int64s]]) -> None:
    starts = np.concatenate([s.reshape(-1) for s, _ in spans])
    ends = np.concatenate([e.reshape(-1) for _, e in spans])
    within = _range_of(ranges, starts)
    outside = (within < 0) | (ends > ranges[within].sum(axis=1))
    if outside.any():
        first = int(np.argmax(outside))
        raise InvalidInput(
            f"{int(ends[first] - starts[first]):,} bytes at {int(starts[first]):#x} are not within one of the ranges: "
            "only registered memory is written"
        )
    order = np.argsort(starts)
    overlaps = ends[order][:-1] > starts[order][1:]
    if overlaps.any():
        raise InvalidInput(f"two copies overlap at {int(starts[order][1:][np.argmax(overlaps)]):#x}")

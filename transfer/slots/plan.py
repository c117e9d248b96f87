"""Blocks against slots: what of each block goes where. Pure.

Blocks of one schema and slots of one form agree or disagree alike, so the comparison and the list of copies are made
once for each such pair, relative to a slot's base addresses. Real addresses are added when a block is asked for.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shm.block import BlockSchema, ExpertKey, TensorTemplate, fill_template
from shm.manifest import Manifest
from transfer.slots.copies import SlotCopy, coalesce
from transfer.slots.layouts import Form, Home, Role, SlotMismatch, SlotTensor, checkpoint_role, may_be_same_bits

# Kinds whose elements follow the weight's rows and columns, so that a tensor-parallel part can be cut out of them.
_CUT_WITH_THE_WEIGHT = frozenset({"weight", "weight_packed", "bias", "weight_scale", "weight_scale_inv"})
# Kinds whose rows in a fused checkpoint tensor are known to be the gate's, then the up's. Others may be interleaved.
_CONCATENATED = frozenset({"weight", "weight_scale", "weight_scale_inv"})
_CUT_AXIS = {"gate": 0, "up": 0, "down": 1}

COPY_ROW = np.dtype(
    [("key", "<i4"), ("slot", "<i4")] + [(field, "<i8") for field in SlotCopy._fields[:-1]] + [("tensor", "<i4")]
)
"""`SlotCopy`'s fields, after the index of the expert's key as asked for, and which of its slots the copy fills."""


class Places(NamedTuple):
    """Where one logical expert lies: the base address of each of the form's parameters, for every slot that holds it.

    `tensors` are the parameters' indices in `Slots.tensors`; `names` the checkpoint names, where they are known.
    """

    form: Form
    tensors: tuple[int, ...]
    bases: tuple[tuple[int, ...], ...]
    names: frozenset[str] | None


class Layout(NamedTuple):
    """What slots that one rule laid out have in common: those of a layer, in the same parameters.

    `parameters` are names and addresses, none where every expert has its own. Which expert a slot holds is not part of
    it: that changes when experts are placed anew.
    """

    layer: int
    form: Form
    parameters: tuple[tuple[str, int], ...]


class _Piece(NamedTuple):
    """A tensor of a block, or one half of a fused one, as a matrix of rows."""

    name: str
    role: Role
    dtype: str
    shape: tuple[int, ...]
    offset: int
    row_nbytes: int


@dataclass(frozen=True)
class SlotPlan:
    """The copies of every expert of a rank, checked against a manifest. Build with `Slots.plan`."""

    tensors: tuple[SlotTensor, ...]
    _places: Mapping[ExpertKey, Places]
    _templates: Mapping[ExpertKey, tuple[SlotCopy, ...]]

    @classmethod
    def build(cls, manifest: Manifest, places: Mapping[ExpertKey, Places], tensors: tuple[SlotTensor, ...]) -> SlotPlan:
        """Compare; raises SlotMismatch for the first expert whose block does not fit its slots."""
        rows = dict(zip(manifest.keys, manifest.rows["schema"].tolist(), strict=True))
        made: dict[tuple[int, int], tuple[SlotCopy, ...]] = {}
        templates: dict[ExpertKey, tuple[SlotCopy, ...]] = {}
        for key, place in places.items():
            schema = rows.get(key)
            if schema is None:
                what = f"expert {key.expert} in layer {key.layer}" if place.names is None else min(place.names)
                raise SlotMismatch(f"{what} is not in the checkpoint of {manifest.model}: bind no slot to it")
            if place.names is not None:
                _check_names(key, place.names, manifest.schemas[schema])
            pair = (id(place.form), schema)
            if pair not in made:
                made[pair] = _relative_copies(key, place, manifest.schemas[schema], tensors)
            templates[key] = made[pair]
        return cls(tensors, places, templates)

    @property
    def keys(self) -> tuple[ExpertKey, ...]:
        """The logical experts that have a slot, ascending, each once."""
        return tuple(sorted(self._places))

    def copies(self, key: ExpertKey) -> tuple[tuple[SlotCopy, ...], ...]:
        """The copies that fill each slot of `key`: the first slot's, then its siblings'. In order of block offset.

        Siblings take the same bytes to other addresses. Raises KeyError for an expert without a slot here.
        """
        place, template = self._places[key], self._templates[key]
        indices, new = place.tensors, tuple.__new__  # SlotCopy's own constructor takes twice as long
        return tuple(
            tuple(
                [
                    new(SlotCopy, (offset, bases[p] + at, rows, run, block_pitch, pitch, indices[p]))
                    for offset, at, rows, run, block_pitch, pitch, p in template
                ]
            )
            for bases in place.bases
        )

    def table(self, keys: Sequence[ExpertKey]) -> npt.NDArray[np.void]:
        """The copies of many experts at once, one row of COPY_ROW each: `copies` without an object a copy.

        Rows are in order of `keys`, then slot, then block offset. Raises KeyError as `copies` does.
        """
        groups: dict[int, list[int]] = defaultdict(list)
        for number, key in enumerate(keys):
            groups[id(self._templates[key])].append(number)
        tables = [self._table_of_alike(keys, numbers) for numbers in groups.values()]
        if not tables:
            return np.empty(0, COPY_ROW)
        table = np.concatenate(tables)
        return table if len(tables) == 1 else table[np.argsort(table["key"], kind="stable")]

    def _table_of_alike(self, keys: Sequence[ExpertKey], numbers: Sequence[int]) -> npt.NDArray[np.void]:
        """The rows of keys that share one template; `numbers` are their indices in `keys`."""
        places = [self._places[keys[n]] for n in numbers]
        template = np.array(self._templates[keys[numbers[0]]], np.int64).reshape(-1, len(SlotCopy._fields))
        counts = [len(place.bases) for place in places]
        bases = np.array([base for place in places for base in place.bases], np.int64)
        parameter = template[:, -1]
        table = np.empty((len(bases), len(template)), COPY_ROW)
        table["key"] = np.repeat(np.array(numbers), counts)[:, None]
        table["slot"] = np.array([slot for count in counts for slot in range(count)])[:, None]
        for column, field in enumerate(SlotCopy._fields[:-1]):
            table[field] = template[:, column]
        table["address"] += bases[:, parameter]
        table["tensor"] = np.repeat(np.array([place.tensors for place in places]), counts, axis=0)[:, parameter]
        return table.reshape(-1)

    def layout(self, key: ExpertKey) -> Layout:
        """The layout that the slots of `key` belong to. Raises KeyError for an expert without a slot here."""
        place = self._places[key]
        shared = () if place.names is not None else place.tensors
        return Layout(key.layer, place.form, tuple((self.tensors[i].name, self.tensors[i].address) for i in shared))

    def is_whole(self, key: ExpertKey) -> bool:
        """Whether a slot of `key` holds every tensor byte of its block, and not a tensor-parallel part of it."""
        return self._places[key].form.tp_size == 1


def _check_names(key: ExpertKey, names: frozenset[str], schema: BlockSchema) -> None:
    expected = {fill_template(t.name, key) for t in schema.tensors}
    if foreign := sorted(names - expected):
        raise SlotMismatch(f"{foreign[0]} is not in the checkpoint, which has {sorted(expected)[0]}: name it as there")
    if missing := sorted(expected - names):
        raise SlotMismatch(f"{missing[0]} is not bound, and others of its expert are: bind all of a block's tensors")


def _relative_copies(
    key: ExpertKey, place: Places, schema: BlockSchema, tensors: Sequence[SlotTensor]
) -> tuple[SlotCopy, ...]:
    """The copies of one slot, with addresses counted from its parameters' bases and `tensor` the parameter's number."""
    form = place.form
    homes = dict(form.homes)
    pieces = [piece for tensor in schema.tensors for piece in _pieces(key, tensor, homes)]
    copies = []
    filled = [0] * len(form.nbytes)
    for piece in pieces:
        home = homes[piece.role]
        copy = _copy(piece, home, form, pieces)
        filled[home.parameter] += copy.nbytes
        copies.append(copy)
    for index, nbytes, got in zip(place.tensors, form.nbytes, filled, strict=True):
        if got != nbytes:
            raise SlotMismatch(
                f"{tensors[index].name} has {nbytes} bytes a slot, the block of layer {key.layer}, expert {key.expert} "
                f"fills {got} of them: the engine made the rest itself, so reload it from disk"
            )
    return coalesce(copies)


def _pieces(key: ExpertKey, tensor: TensorTemplate, homes: Mapping[Role, Home]) -> Iterator[_Piece]:
    name, role = fill_template(tensor.name, key), checkpoint_role(tensor.name)
    shape, dtype = tensor.shape or (1,), tensor.dtype
    if dtype == "F4":  # no torch has half a byte: two elements are one
        shape, dtype = (*shape[:-1], shape[-1] // 2), "U8"
    piece = _Piece(name, role, dtype, shape, tensor.offset, tensor.nbytes // max(shape[0], 1))
    split = [Role(part, role.kind) for part in ("gate", "up")]
    if role in homes:
        yield piece
    elif role.part == "gate_up" and role.kind in _CONCATENATED and shape[0] % 2 == 0 and all(r in homes for r in split):
        rows = shape[0] // 2
        for number, half in enumerate(split):
            offset = tensor.offset + number * rows * piece.row_nbytes
            yield piece._replace(role=half, shape=(rows, *shape[1:]), offset=offset)
    else:
        raise SlotMismatch(f"{name} has no home: no parameter of this rank takes it as a plain copy; reload from disk")


def _copy(piece: _Piece, home: Home, form: Form, pieces: Sequence[_Piece]) -> SlotCopy:
    if not may_be_same_bits(piece.dtype, home.dtype):
        raise SlotMismatch(
            f"{piece.name} is {piece.dtype} in the checkpoint, {home.dtype} in the engine: a raw copy does not "
            "convert; reload it from disk"
        )
    axis, start, count = _cut(piece, form, pieces)
    shape = tuple(count if a == axis else n for a, n in enumerate(piece.shape))
    if shape != home.shape:
        part = f", of which this rank holds {list(shape)}" if shape != piece.shape else ""
        raise SlotMismatch(
            f"{piece.name} is {list(piece.shape)} in the checkpoint{part}, and {list(home.shape)} in the engine: it "
            "was transposed, packed or padded, or the ranks are others; reload it from disk"
        )
    run, step = piece.row_nbytes, piece.row_nbytes
    if axis == 1:
        step //= piece.shape[1]
        run = count * step
    offset = piece.offset + start * step
    return SlotCopy(offset, home.offset, shape[0], run, piece.row_nbytes, home.pitch, home.parameter)


def _cut(piece: _Piece, form: Form, pieces: Sequence[_Piece]) -> tuple[int, int, int]:
    """(axis, first, count) of this rank's part of a tensor; all of axis 0 where every rank has it whole."""
    everything = (0, 0, piece.shape[0])
    axis = _CUT_AXIS.get(piece.role.part)
    if form.tp_size == 1 or math.prod(piece.shape) == 1:
        return everything
    if axis is None or piece.role.kind not in _CUT_WITH_THE_WEIGHT:
        raise SlotMismatch(f"{piece.name}: how {form.tp_size} ranks share it is not known; reload it from disk")
    if axis >= len(piece.shape) or piece.shape[axis] == 1:
        return everything  # a bias or scale for whole rows of down, or one scale for all columns
    side = piece.shape[axis]
    full = max(p.shape[axis] for p in pieces if p.role.part == piece.role.part and len(p.shape) > axis)
    group = full // side
    # A scale covers a group of `group` rows or columns. Groups are powers of two in every known format, so another
    # quotient means a last group that is not full, and then no rank's part begins at a group's edge.
    if full % side or group & (group - 1) or side % form.tp_size:
        raise SlotMismatch(
            f"{piece.name} {list(piece.shape)} does not divide among {form.tp_size} ranks at the edges of its groups: "
            "reload it from disk"
        )
    count = side // form.tp_size
    return axis, form.tp_rank * count, count

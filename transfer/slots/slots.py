"""Where a rank's expert slots lie in its own CPU or GPU tensors.

A *slot* holds one physical expert. Which logical expert that is, a map says; one logical expert may be in several
slots, and is then fetched once and copied to each. `Slots` describes memory only and knows no checkpoint:
`Slots.plan` compares it with a manifest, before a byte moves, and gives the copies of every block.

This module and those below it do not import torch: tensors are read through their own methods.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from shm.block import ExpertKey, fill_template
from shm.errors import BlockUnavailable, InvalidInput
from shm.manifest import Manifest
from transfer.slots.layouts import (
    LAYOUTS,
    NO_EXPERT,
    REWRITTEN,
    ExpertName,
    Form,
    Home,
    Role,
    SlotMismatch,
    SlotTensor,
    checkpoint_role,
    describe,
    expert_name,
    fused_name,
    halves,
    home_in,
    is_experts,
)
from transfer.slots.plan import Places, SlotPlan

if TYPE_CHECKING:
    import torch

RANKS_MAX = 1 << 16

SlotMap = Mapping[int, Sequence[int]] | Sequence[Sequence[int]]
"""Per layer, the logical expert of every physical one, of all ranks; NO_EXPERT where a slot holds none."""


class Range(NamedTuple):
    """Memory that may be written: what is registered with a transfer engine. Bytes."""

    device: str
    address: int
    nbytes: int


class SlotRef(NamedTuple):
    """A slot by the names of the engine: a parameter, and the index on its first axis; None: the parameter is one."""

    parameter: str
    slot: int | None

    def __str__(self) -> str:
        return self.parameter if self.slot is None else f"{self.parameter}[{self.slot}]"


@dataclass(frozen=True)
class Slots:
    """The slots of one rank. Build with `fused`, `stacked` or `plain`.

    `tensors` are the parameters that may be written. The object keeps them alive, but cannot keep an engine from
    giving a parameter new memory (`param.data = …`): describe the slots again after that.
    """

    tensors: tuple[SlotTensor, ...]
    _places: Mapping[ExpertKey, Places]

    @classmethod
    def fused(
        cls,
        parameters: Mapping[str, torch.Tensor],
        *,
        physical_to_logical: SlotMap | None = None,
        ep_rank: int = 0,
        ep_size: int = 1,
        tp_rank: int = 0,
        tp_size: int = 1,
        layout: str = "gate_first",
    ) -> Slots:
        """SGLang's and vLLM's parameters: `…layers.L…experts.w13_weight`, `w2_weight`, scales and biases beside them.

        w13 is [slots, 2·I/tp, H], w2 [slots, H, I/tp]. Names that are no such parameter are passed over, so
        `dict(model.named_parameters())` will do. `physical_to_logical` is the map of all ranks: rank r of `ep_size`
        has the r-th of as many equal parts of it. Without it, experts follow each other. `layout` is the order of
        w13's halves. Raises SlotMismatch for what is not plain, InvalidInput for ranks or maps that do not fit.
        """
        _check_rank("ep", ep_rank, ep_size)
        _check_rank("tp", tp_rank, tp_size)
        _check_layout(layout)
        builder = _Builder()
        for layer, roles in _by_layer(parameters, ("w13", "w2")).items():
            described = {role: describe(name, tensor) for role, (name, tensor) in roles.items()}
            _check_fused_shapes(layer, described)
            count = _slot_count(layer, described.values())
            form = _fused_form(described, layout, tp_rank, tp_size, whole=False)
            experts = _local_experts(layer, physical_to_logical, count, ep_rank, ep_size)
            builder.add_layer(layer, form, tuple(described.values()), experts)
        return builder.build()

    @classmethod
    def stacked(cls, parameters: Mapping[str, torch.Tensor]) -> Slots:
        """Transformers' parameters: `…layers.L…experts.gate_up_proj` [E, 2·I, H] and `down_proj` [E, H, I].

        A fused checkpoint's tensors of the same names and shapes are copied as they are, also transposed or
        interleaved ones (gpt-oss, Llama-4). One tensor an expert goes to untransposed parameters only. Names that
        are no such parameter are passed over. Raises SlotMismatch for what is not plain.
        """
        builder = _Builder()
        for layer, roles in _by_layer(parameters, ("gate_up_proj", "down_proj")).items():
            described = {role: describe(name, tensor) for role, (name, tensor) in roles.items()}
            count = _slot_count(layer, described.values())
            form = _fused_form(described, "gate_first", 0, 1, whole=True)
            builder.add_layer(layer, form, tuple(described.values()), range(count))
        return builder.build()

    @classmethod
    def plain(cls, tensors: Mapping[str, torch.Tensor], *, tp_rank: int = 0, tp_size: int = 1) -> Slots:
        """One tensor an expert, by the names of the checkpoint, `…gate_up_proj[7]` for a share of a fused one.

        With `tp_size` above 1 each holds this rank's part: rows of gate and up, columns of down. Layers of a stack that
        counts anew (`mtp.layers.0` beside `model.layers.0`) are numbered as in the manifest, once that is known. Raises
        SlotMismatch for a name that is no expert's, and for a tensor that is not plain.
        """
        _check_rank("tp", tp_rank, tp_size)
        if not tensors:
            raise InvalidInput("no tensors: give the experts' tensors by their names in the checkpoint")
        by_expert: dict[ExpertName, dict[Role, SlotTensor]] = defaultdict(dict)
        for name, tensor in tensors.items():
            expert, role = _expert_name(name), checkpoint_role(name)
            held = by_expert[expert]
            if role in held:
                raise SlotMismatch(f"{name} and {held[role].name} are the same tensor of one expert: give one")
            held[role] = describe(name, tensor)
        builder = _Builder()
        for key, described in _numbered(by_expert).items():
            builder.add_expert(key, _plain_form(described, tp_rank, tp_size), tuple(described.values()))
        return builder.build()

    def __post_init__(self) -> None:
        _check_apart(self.tensors)

    @property
    def keys(self) -> tuple[ExpertKey, ...]:
        """The logical experts that this rank holds, ascending, each once."""
        return tuple(sorted(self._places))

    @property
    def ranges(self) -> tuple[Range, ...]:
        """The memory of all tensors, ascending, ranges that touch made one."""
        out: list[Range] = []
        for tensor in sorted(self.tensors, key=lambda t: (t.device, t.address)):
            if out and out[-1].device == tensor.device and out[-1].address + out[-1].nbytes == tensor.address:
                out[-1] = out[-1]._replace(nbytes=out[-1].nbytes + tensor.nbytes)
            else:
                out.append(Range(tensor.device, tensor.address, tensor.nbytes))
        return tuple(out)

    def refs(self, key: ExpertKey) -> tuple[SlotRef, ...]:
        """Every part of the parameters that belongs to an expert. Raises KeyError for one without a slot here."""
        place = self._places[key]
        return tuple(
            SlotRef(tensor.name, None if place.names is not None else (base - tensor.address) // tensor.strides[0])
            for bases in place.bases
            for tensor, base in zip((self.tensors[i] for i in place.tensors), bases, strict=True)
        )

    def plan(self, manifest: Manifest) -> SlotPlan:
        """The copies that fill these slots from the manifest's blocks.

        Every tensor of each block must have a home of its dtype and shape, and every byte of a slot must be filled
        by one: else SlotMismatch, and the reason.
        """
        return SlotPlan.build(manifest, self.keyed_by(manifest)._places, self.tensors)

    def keyed_by(self, manifest: Manifest) -> Slots:
        """The same slots, with each expert under the key that the manifest has for the names of its tensors."""
        moved: dict[ExpertKey, ExpertKey] = {}
        for key, place in self._places.items():
            if place.names is not None and not _is_named(manifest, key, place.names):
                with suppress(BlockUnavailable):  # names that the model lacks: `plan` says which
                    moved[key] = manifest.keys[manifest.find(min(place.names))[0]]
        if not moved:
            return self
        return Slots(self.tensors, {moved.get(key, key): place for key, place in self._places.items()})


class _Builder:
    """Collects tensors and places; forms that are equal are kept once, so that a plan is made once for each."""

    def __init__(self) -> None:
        self._tensors: list[SlotTensor] = []
        self._places: dict[ExpertKey, Places] = {}
        self._forms: dict[Form, Form] = {}

    def add_layer(self, layer: int, form: Form, tensors: tuple[SlotTensor, ...], experts: Sequence[int]) -> None:
        indices = self._keep(tensors)
        form = self._forms.setdefault(form, form)
        strides = [t.strides[0] for t in tensors]
        slots: dict[int, list[tuple[int, ...]]] = defaultdict(list)
        for slot, expert in enumerate(experts):
            if expert != NO_EXPERT:
                slots[expert].append(tuple(t.address + slot * s for t, s in zip(tensors, strides, strict=True)))
        for expert, bases in slots.items():
            self._places[ExpertKey(layer, expert)] = Places(form, indices, tuple(bases), None)

    def add_expert(self, key: ExpertKey, form: Form, tensors: tuple[SlotTensor, ...]) -> None:
        form = self._forms.setdefault(form, form)
        names = frozenset(t.name for t in tensors)
        self._places[key] = Places(form, self._keep(tensors), (tuple(t.address for t in tensors),), names)

    def build(self) -> Slots:
        return Slots(tuple(self._tensors), self._places)

    def _keep(self, tensors: Sequence[SlotTensor]) -> tuple[int, ...]:
        start = len(self._tensors)
        self._tensors.extend(tensors)
        return tuple(range(start, len(self._tensors)))


Described = Mapping[Role, SlotTensor]


def _by_layer(
    parameters: Mapping[str, torch.Tensor], parts: tuple[str, str]
) -> dict[int, dict[Role, tuple[str, torch.Tensor]]]:
    layers: dict[int, dict[Role, tuple[str, torch.Tensor]]] = defaultdict(dict)
    for name, tensor in parameters.items():
        if (found := fused_name(name)) is None or found.part not in parts:
            _check_passed_over(name)
            continue
        if found.role in layers[found.layer]:
            raise SlotMismatch(f"{name} and {layers[found.layer][found.role][0]} are the same parameter: give one")
        layers[found.layer][found.role] = (name, tensor)
    if not layers:
        seen = ", ".join(list(parameters)[:3]) or "nothing"
        raise InvalidInput(f"no parameter is named like …layers.3.mlp.experts.{parts[0]}…: seen were {seen}, …")
    for layer, roles in layers.items():
        if {"gate_up", "down"} - {role.part for role in roles}:
            raise SlotMismatch(f"layer {layer} has {[n for n, _ in roles.values()]}: both {' and '.join(parts)} belong")
    return dict(sorted(layers.items()))


def _check_passed_over(name: str) -> None:
    if is_experts(name):
        raise SlotMismatch(
            f"{name} is a parameter of experts, and not named like …layers.3.mlp.experts.w13_weight: its layer is not "
            "known here; leave it out of what is bound, and reload it from disk, or bind it with Slots.plain"
        )


def _slot_count(layer: int, tensors: Iterable[SlotTensor]) -> int:
    counts = {t.name: t.shape[0] if t.shape else 0 for t in tensors}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        raise SlotMismatch(f"layer {layer}: the parameters' first axes differ, {counts}: each must count the slots")
    return next(iter(counts.values()))


def _fused_form(described: Described, layout: str, tp_rank: int, tp_size: int, *, whole: bool) -> Form:
    homes: list[tuple[Role, Home]] = []
    for index, (role, tensor) in enumerate(described.items()):
        home = home_in(index, tensor, axes=1)
        if role.part == "down" or whole:
            homes.append((role, home))
        if role.part == "gate_up" and home.shape[0] % 2 == 0:
            first, second = halves(home)
            gate, up = (first, second) if layout == "gate_first" else (second, first)
            homes += [(Role("gate", role.kind), gate), (Role("up", role.kind), up)]
    return Form(tuple(homes), _slot_nbytes(described, axes=1), tp_rank, tp_size)


def _plain_form(described: Described, tp_rank: int, tp_size: int) -> Form:
    homes = tuple((role, home_in(i, tensor, axes=0)) for i, (role, tensor) in enumerate(described.items()))
    return Form(homes, _slot_nbytes(described, axes=0), tp_rank, tp_size)


def _slot_nbytes(described: Described, axes: int) -> tuple[int, ...]:
    return tuple(t.itemsize * math.prod(t.shape[axes:]) for t in described.values())


def _local_experts(layer: int, maps: SlotMap | None, count: int, ep_rank: int, ep_size: int) -> Sequence[int]:
    if maps is None:
        return range(ep_rank * count, (ep_rank + 1) * count)
    try:
        experts = [int(e) for e in maps[layer]]
    except (KeyError, IndexError):
        raise InvalidInput(f"physical_to_logical has no layer {layer}: give one row for each layer bound") from None
    if len(experts) != count * ep_size:
        raise InvalidInput(
            f"layer {layer}: physical_to_logical has {len(experts)} experts, and {ep_size} ranks of {count} slots hold "
            f"{count * ep_size}: give the map of all ranks, and {NO_EXPERT} for a slot without an expert"
        )
    if min(experts) < NO_EXPERT:
        raise InvalidInput(f"layer {layer}: physical_to_logical has {min(experts)}: experts count from 0")
    return experts[ep_rank * count : (ep_rank + 1) * count]


def _expert_name(name: str) -> ExpertName:
    if (found := expert_name(name)) is None:
        raise SlotMismatch(f"{name} is not the tensor of one expert: leave it out, or name it as the checkpoint does")
    return found


def _numbered(by_expert: Mapping[ExpertName, Described]) -> dict[ExpertKey, Described]:
    """By key. A stack that counts its layers as a larger one does goes behind that, as in a manifest of both."""
    stacks: dict[str, list[ExpertName]] = defaultdict(list)
    for expert in by_expert:
        stacks[expert.stack].append(expert)
    numbered: dict[ExpertKey, Described] = {}
    for experts in sorted(stacks.values(), key=len, reverse=True):
        is_taken = any((expert.layer, expert.expert) in numbered for expert in experts)
        first = 1 + max(key.layer for key in numbered) if is_taken else 0
        numbered |= {ExpertKey(first + e.layer, e.expert): by_expert[e] for e in experts}
    return numbered


def _is_named(manifest: Manifest, key: ExpertKey, names: frozenset[str]) -> bool:
    """Whether the block of that key has tensors of these names, as far as the first one tells."""
    try:
        schema = manifest.schema(manifest.index(*key))
    except BlockUnavailable:
        return False
    return fill_template(schema.tensors[0].name, key) in names


def _check_rank(what: str, rank: int, size: int) -> None:
    if not 0 <= rank < size <= RANKS_MAX:
        raise InvalidInput(f"{what}_rank {rank} of {what}_size {size}: ranks count from 0, sizes from 1 to {RANKS_MAX}")


def _check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        why = REWRITTEN.get(layout, "it is not known to be a plain copy")
        raise SlotMismatch(f"layout {layout!r}: {why}. Reload from disk, or use one of {', '.join(LAYOUTS)}")


def _check_fused_shapes(layer: int, described: Described) -> None:
    """w13 [S, 2·I, H] beside w2 [S, H, I], both with k columns in an element; others have them the other way round."""
    w13, w2 = described.get(Role("gate_up", "weight")), described.get(Role("down", "weight"))
    if w13 is None or w2 is None:
        return
    if len(w13.shape) == len(w2.shape) == 3:
        _, rows, columns = w13.shape
        _, hidden, inner = w2.shape
        if rows % 2 == hidden % columns == 0 and rows // 2 == hidden // columns * inner:
            return
    raise SlotMismatch(
        f"layer {layer}: {w13.name} {list(w13.shape)} and {w2.name} {list(w2.shape)} are not [slots, 2·I, H/k] and "
        "[slots, H, I/k]: a kernel has transposed or padded them; reload from disk"
    )


def _check_apart(tensors: Sequence[SlotTensor]) -> None:
    ordered: Iterator[SlotTensor] = iter(sorted(tensors, key=lambda t: (t.device, t.address)))
    last = next(ordered)
    for tensor in ordered:
        if tensor.device == last.device and tensor.address < last.address + last.nbytes:
            raise SlotMismatch(
                f"{last.name} and {tensor.name} overlap in memory: filling one would overwrite the other"
            )
        last = tensor

"""Which tensors belong to which expert, told from their names, layer by layer.

    gate-up-down   ….experts.<n>.{gate,up,down}_proj.…    DeepSeek, Kimi, Qwen3, GLM; also without a gate
    w1-w2-w3       ….experts.<n>.{w1,w2,w3}.…             Mixtral, MiniMax; also without w3
    fused          ….experts.{gate_up_proj,down_proj,…}   gpt-oss, Llama-4, Qwen3.5, Aria; Granite, Step-3 (`names`)
    generic        ….experts.<n>.…                        any other names
    mixed          more than one of these in one model

What follows the projection's name (weight, weight_scale_inv, weight_packed, _blocks, …) is free: an expert's scales go
with it. A fused tensor's first axis is the expert; the share of expert e is called `<name>[e]`. What the experts of a
fused layer have in common, such as one scale for all, is in each of their blocks, as `<name>[*e]`: whoever restores one
expert has all that it needs. Every other tensor is dense: routers, shared experts, attention.

A stack is a run of layers that have experts. The one with the most layers is the main one. Another whose layer numbers
collide with it (`mtp.layers.0` beside `model.layers.0`) goes after the main stack's last layer, in order of name. So do
the second experts of a layer that has two kinds (ERNIE's `text_moe` and `vision_moe`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, NamedTuple

from shm.block import COMMON, DENSE, SHARE, ExpertKey, TensorEntry
from shm.manifest import BLOCKS_MAX
from transfer.checkpoint.names import AmongExperts, LayerName, dense_layer, pattern_of, refused_as, split_name
from transfer.checkpoint.safetensors_header import StoredTensor
from transfer.errors import CheckpointError

Include = Literal["experts", "all"]

LAYERS_MAX = 1 << 16
EXPERTS_MAX = 1 << 16  # of one layer
FUSED_RANK_MIN = 3  # experts, rows, columns
SAMPLE_NAMES = 8  # name patterns shown of a checkpoint without experts

_PROJECTIONS: Mapping[str, tuple[frozenset[str], ...]] = {  # the whole sets of each family
    "gate-up-down": (frozenset({"gate_proj", "up_proj", "down_proj"}), frozenset({"up_proj", "down_proj"})),
    "w1-w2-w3": (frozenset({"w1", "w2", "w3"}), frozenset({"w1", "w2"})),
}
_READABLE = (
    "convert the checkpoint to one tensor an expert (….experts.<number>.…), or to fused ones (….experts.gate_up_proj)"
)

Found = tuple[StoredTensor, AmongExperts]


class _Stack(NamedTuple):
    """A run of layers. `aside` is empty, or the place in the layer of second experts, a stack of their own."""

    name: str
    aside: str = ""


@dataclass(slots=True)
class _Group:
    """The experts at one place of a layer, as they were found: one by one, or fused."""

    numbered: dict[int, list[Found]] = field(default_factory=lambda: defaultdict(list))
    fused: list[Found] = field(default_factory=list)

    @property
    def is_dense(self) -> bool:
        """Whether it is a dense layer's matrices after all, under a name that some families fuse experts under."""
        return not self.numbered and all(
            not at.is_under_experts and len(tensor.shape) < FUSED_RANK_MIN for tensor, at in self.fused
        )


@dataclass(frozen=True, slots=True)
class Grouping:
    """A checkpoint's kept tensors by block. `n_layers`, and `n_experts` by layer, are the main stack's."""

    family: str
    blocks: Mapping[ExpertKey, Sequence[TensorEntry]]
    n_layers: int
    n_experts: Mapping[int, int]
    notes: tuple[str, ...] = ()
    """What is out of the ordinary, and how it was taken."""


def group_tensors(
    tensors: Iterable[StoredTensor], files: Sequence[str], include: Include, zero_experts: int = 0
) -> Grouping:
    """Sort tensors into expert blocks, and with "all" dense ones too.

    A layer's dense tensors go into ExpertKey(layer, DENSE), those of no layer into ExpertKey(DENSE, DENSE). The last
    `zero_experts` of a layer may lack tensors: they compute nothing (LongCat). Raises CheckpointError if there is no
    expert, one is incomplete, or a tensor lies among them in a naming that is not known; `files` gives the names for
    messages.
    """
    sorter = _Sorter(files, zero_experts)
    for tensor in tensors:
        sorter.add(tensor)
    return sorter.grouping(include)


def _nothing_found(dense: Sequence[StoredTensor]) -> str:
    patterns: dict[str, StoredTensor] = {}
    for tensor in dense:
        patterns.setdefault(pattern_of(tensor.name), tensor)

    def likeness(pattern: str) -> tuple[bool, bool, str]:
        return "expert" not in pattern and "moe" not in pattern, len(patterns[pattern].shape) < FUSED_RANK_MIN, pattern

    names = sorted(patterns, key=likeness)
    seen = ", ".join(f"{name} {list(patterns[name].shape)}" for name in names[:SAMPLE_NAMES]) or "no tensor at all"
    return (
        f"no expert found: no tensor is called ….experts.<number>.… or ….experts.gate_up_proj. Seen: {seen}"
        f"{', …' if len(names) > SAMPLE_NAMES else ''}. Give a mixture-of-experts checkpoint of a known naming"
    )


class _Sorter:
    """Takes tensors one by one, then sorts them in one pass."""

    def __init__(self, files: Sequence[str], zero_experts: int) -> None:
        self.files = files
        self.zero_experts = zero_experts
        self.found: dict[tuple[str, int], dict[str, _Group]] = defaultdict(lambda: defaultdict(_Group))
        self.dense: list[StoredTensor] = []
        self.blocks: dict[ExpertKey, list[TensorEntry]] = defaultdict(list)
        self.kinds: set[str] = set()
        self.notes: dict[str, None] = {}

    def add(self, tensor: StoredTensor) -> None:
        parts = split_name(tensor.name)
        if parts is None:
            self.dense.append(tensor)
            return
        group = self.found[parts.head.stack, parts.head.number][parts.head.rest]
        if parts.expert is not None:
            group.numbered[parts.expert].append((tensor, parts))
            return
        self._refuse_unknown(tensor, parts)
        if parts.is_experts(tensor):
            group.fused.append((tensor, parts))
        else:
            self._note(f"{pattern_of(tensor.name)} lies among experts and is none's: dense")
            self.dense.append(tensor)

    def _refuse_unknown(self, tensor: StoredTensor, parts: AmongExperts) -> None:
        what = refused_as(tensor.name)
        if what is None and parts.is_experts(tensor) is None:
            what = "a naming that is not known"
        if what is not None:
            raise CheckpointError(
                f"{self._where(tensor)} {list(tensor.shape)}: {pattern_of(tensor.name)} is {what}, which is not read; "
                f"{_READABLE}"
            )

    def grouping(self, include: Include) -> Grouping:
        layers = self._stacks()
        if not layers:
            raise CheckpointError(_nothing_found(self.dense))
        counts = Counter(stack for stack, _ in layers)
        main = min(counts, key=lambda stack: (-counts[stack], stack))
        shifts, n_layers = self._shifts(layers, main)
        n_experts = {}
        for (stack, number), group in sorted(layers.items()):
            n = self._sort_group(group, number + shifts[stack], is_literal=shifts[stack] > 0)
            if stack == main:
                n_experts[number] = n
            if len(self.blocks) > BLOCKS_MAX:
                raise CheckpointError(f"more than {BLOCKS_MAX:,} experts: beyond what Hotspare keeps of one model")
        if include == "all":
            for tensor in self.dense:
                self._place_dense(tensor, shifts)
        family = next(iter(self.kinds)) if len(self.kinds) == 1 else "mixed"
        return Grouping(family, self.blocks, n_layers, n_experts, tuple(self.notes))

    # -- stacks ----------------------------------------------------------------------------------------------

    def _stacks(self) -> dict[tuple[_Stack, int], _Group]:
        """Each group of experts under its stack and layer; of a layer with several, all but the usual one aside."""
        for layer in list(self.found):
            for rest, group in list(self.found[layer].items()):
                if group.is_dense:
                    self.dense += [tensor for tensor, _ in self.found[layer].pop(rest).fused]
            if not self.found[layer]:
                del self.found[layer]
        usual = Counter((stack, rest) for (stack, _), groups in self.found.items() for rest in groups)
        layers: dict[tuple[_Stack, int], _Group] = {}
        for (name, number), groups in self.found.items():
            first, *others = sorted(groups, key=lambda rest: (-usual[name, rest], rest))
            layers[_Stack(name), number] = groups[first]
            for rest in others:
                layers[_Stack(name, rest), number] = groups[rest]
        return layers

    def _shifts(self, layers: Mapping[tuple[_Stack, int], _Group], main: _Stack) -> tuple[dict[_Stack, int], int]:
        """What to add to each stack's layer numbers, and the number of layers of the main one, dense ones included."""
        numbers: dict[_Stack, set[int]] = defaultdict(set)
        for stack, number in layers:
            numbers[stack].add(number)
        for tensor in self.dense:
            if (layer := _layer_of(tensor.name, numbers)) is not None:
                numbers[_Stack(layer.stack)].add(layer.number)
        shifts, taken = {main: 0}, set(numbers[main])
        for stack in sorted(numbers.keys() - {main}):
            shifts[stack] = 0 if taken.isdisjoint(numbers[stack]) else max(taken) + 1
            taken |= {number + shifts[stack] for number in numbers[stack]}
        if max(taken) >= LAYERS_MAX:
            raise CheckpointError(
                f"a layer has the number {max(taken)}, the limit is {LAYERS_MAX}: convert the checkpoint anew"
            )
        return shifts, max(numbers[main]) + 1

    # -- one layer -------------------------------------------------------------------------------------------

    def _sort_group(self, group: _Group, number: int, *, is_literal: bool) -> int:
        """Put a layer's experts into blocks; returns how many it has."""

        @lru_cache
        def template(head: LayerName, tail: str) -> str:
            return head.template(tail, str(head.number) if is_literal else "{layer}")

        sizes = {len(group.numbered)} if group.numbered else set()
        if group.numbered:
            self._check_numbered(group)
        if group.fused:
            sizes = self._sizes(group)
            self.kinds.add("fused")
        for expert, parts in group.numbered.items():
            block = self.blocks[ExpertKey(number, expert)]
            for tensor, at in parts:
                block.append(_entry(tensor, template(at.head, at.tail), tensor.shape, 0))
        for tensor, at in group.fused:
            self._share_out(tensor, template(at.head, at.tail), number, sizes)
        return max(sizes)

    def _check_numbered(self, group: _Group) -> None:
        """Expert numbers are 0..E-1, and all experts have the same projections, but for those that compute nothing."""
        any_tensor = group.numbered[min(group.numbered)][0][0]
        count = len(group.numbered)
        if max(group.numbered) >= count:
            missing = next(i for i in range(count) if i not in group.numbered)
            raise CheckpointError(
                f"{self._where(any_tensor)}: the layer has an expert {max(group.numbered)}, but no expert {missing}: "
                "finish the download if files are missing; experts that were pruned away must be numbered anew"
            )
        names = {expert: frozenset(at.rest for _, at in group.numbered[expert]) for expert in range(count)}
        made = {rests: frozenset(map(_projection, rests)) for rests in set(names.values())}
        sets = {expert: made[rests] for expert, rests in names.items()}
        usual = Counter(sets.values()).most_common(1)[0][0]
        for expert in range(count - self.zero_experts if self.zero_experts < count else count):
            if lacks := usual - sets[expert]:
                model = next(names[other] for other in names if sets[other] == usual)
                lost = ", ".join(sorted(rest for rest in model if _projection(rest) in lacks))
                raise CheckpointError(
                    f"{self._where(group.numbered[expert][0][0])}: expert {expert} lacks {lost}, "
                    "unlike the layer's other experts: convert the checkpoint anew"
                )
        if len(set(names.values())) > 1:
            rest = group.numbered[0][0][1].head.template("experts", "N")
            self._note(f"{rest}: the experts of a layer differ in their tensors' names; all are kept")
        self.kinds.add(self._kind(any_tensor, usual))

    def _kind(self, tensor: StoredTensor, projections: frozenset[str]) -> str:
        for kind, whole in _PROJECTIONS.items():
            if projections in whole:
                return kind
            if projections < whole[0]:
                lacks = ", ".join(sorted(whole[0] - projections))
                raise CheckpointError(
                    f"{self._where(tensor)}: every expert of this layer lacks {lacks}: convert the checkpoint anew"
                )
        return "generic"

    def _sizes(self, group: _Group) -> set[int]:
        """How many experts a layer's tensors hold: their first axis; two numbers only where some compute nothing."""
        for tensor, _ in group.fused:
            if tensor.nbytes == 0:
                raise CheckpointError(
                    f"{self._where(tensor)}: shape {list(tensor.shape)} holds no bytes: convert the checkpoint anew"
                )
        rank = max(len(tensor.shape) for tensor, _ in group.fused)
        sizes = {tensor.shape[0] for tensor, _ in group.fused if len(tensor.shape) == rank > 1}
        if group.numbered:
            sizes.add(len(group.numbered))
        if len(sizes) > 1:
            sizes.discard(1)  # a scale for all of them
        tensor = group.fused[0][0]
        if not sizes:
            raise CheckpointError(
                f"{self._where(tensor)} {list(tensor.shape)}: nothing in this layer tells how many experts there are; "
                f"{_READABLE}"
            )
        if (len(sizes) == 1 or max(sizes) - min(sizes) == self.zero_experts) and max(sizes) <= EXPERTS_MAX:
            return sizes
        raise CheckpointError(
            f"{self._where(tensor)}: the experts' tensors of this layer tell {sorted(sizes)} experts, one number up to "
            f"{EXPERTS_MAX} is wanted: convert the checkpoint anew"
        )

    def _share_out(self, tensor: StoredTensor, template: str, layer: int, sizes: set[int]) -> None:
        """Give each expert its share of a tensor, or all of one that they have in common."""
        if tensor.shape and tensor.shape[0] in sizes:
            if tensor.nbytes % tensor.shape[0]:
                raise CheckpointError(
                    f"{self._where(tensor)}: a share of it is not whole bytes: convert the checkpoint anew"
                )
            step = tensor.nbytes // tensor.shape[0]
            for expert in range(tensor.shape[0]):
                entry = _entry(tensor, template + SHARE, tensor.shape[1:], expert * step)
                self.blocks[ExpertKey(layer, expert)].append(entry)
        elif not tensor.shape or tensor.shape[0] == 1:
            for expert in range(max(sizes)):
                self.blocks[ExpertKey(layer, expert)].append(_entry(tensor, template + COMMON, tensor.shape, 0))
        else:
            raise CheckpointError(
                f"{self._where(tensor)}: shape {list(tensor.shape)} does not begin with the layer's {max(sizes)} "
                "experts: convert the checkpoint anew"
            )

    # -- dense tensors ---------------------------------------------------------------------------------------

    def _place_dense(self, tensor: StoredTensor, shifts: Mapping[_Stack, int]) -> None:
        key, name = ExpertKey(DENSE, DENSE), tensor.name
        if (layer := _layer_of(tensor.name, shifts)) is not None:
            shift = shifts[_Stack(layer.stack)]
            key = ExpertKey(layer.number + shift, DENSE)
            if not shift:
                name = layer.template("", "{layer}")
        self.blocks[key].append(_entry(tensor, name, tensor.shape, 0))

    def _where(self, tensor: StoredTensor) -> str:
        return f"{self.files[tensor.file]}: tensor {tensor.name!r}"

    def _note(self, note: str) -> None:
        self.notes[note] = None


def _entry(tensor: StoredTensor, template: str, shape: tuple[int, ...], at: int) -> TensorEntry:
    return TensorEntry(template, tensor.dtype, shape, tensor.file, tensor.offset + at)


def _projection(rest: str) -> str:
    return rest.partition(".")[0]


def _layer_of(name: str, stacks: Iterable[_Stack]) -> LayerName | None:
    """The layer that a dense tensor belongs to, if its stack is one of those that have experts."""
    for stack in stacks:
        if not stack.aside and (layer := dense_layer(name, stack.name)) is not None:
            return layer
    return None

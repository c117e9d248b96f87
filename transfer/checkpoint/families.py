"""Which tensors belong to which expert, told from their names, layer by layer.

    gate-up-down   <stack>.<layer>.….experts.<n>.{gate,up,down}_proj.…   DeepSeek, Kimi, Qwen3, GLM; also without a gate
    w1-w2-w3       <stack>.<layer>.….experts.<n>.{w1,w2,w3}.…            Mixtral, MiniMax; also without w3
    fused          <stack>.<layer>.….experts.{gate_up_proj,down_proj,…}  gpt-oss, Llama-4, Qwen3.5
    generic        <stack>.<layer>.….experts.<n>.…                       any other names
    mixed          more than one of these in one model

What follows the projection's name (weight, weight_scale_inv, weight_packed, _blocks, …) is free: an expert's scales go
with it. A fused tensor's first axis is the expert; the share of expert e is called `<name>[e]`. Every other tensor is
dense: routers, shared experts, attention, and a single number that the experts of a fused layer have in common.

A stack is a run of layers that have experts. The one with the most layers is the main one. Another whose layer numbers
collide with it (`mtp.layers.0` beside `model.layers.0`) goes after the main stack's last layer, in order of name.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, NamedTuple

from shm.block import DENSE, ExpertKey, TensorEntry
from shm.manifest import BLOCKS_MAX
from transfer.checkpoint.safetensors_header import StoredTensor
from transfer.errors import CheckpointError

Include = Literal["experts", "all"]

LAYERS_MAX = 1 << 16
EXPERTS_MAX = 1 << 16  # of one layer
SAMPLE_NAMES = 8  # names shown of a checkpoint without experts

_EXPERTS = re.compile(r"(?:^|\.)experts\.")  # not shared_experts
_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")
_LAYER_WORDS = frozenset({"layers", "layer", "blocks", "block", "h"})
_FUSED = re.compile(r"(?:gate_up_proj|gate_proj|up_proj|down_proj|w13|w1|w2|w3)(?:[._].+)?")
_PROJECTIONS: Mapping[str, tuple[frozenset[str], ...]] = {  # the whole sets of each family
    "gate-up-down": (frozenset({"gate_proj", "up_proj", "down_proj"}), frozenset({"up_proj", "down_proj"})),
    "w1-w2-w3": (frozenset({"w1", "w2", "w3"}), frozenset({"w1", "w2"})),
}
_MEND = "download the checkpoint again, or convert it anew"


class LayerName(NamedTuple):
    """`<stack>.<number>.<rest>`; a stack without a number has one layer, 0."""

    stack: str
    number: int
    rest: str
    is_numbered: bool = True

    def template(self, tail: str, layer: str) -> str:
        parts = (self.stack, layer if self.is_numbered else "", self.rest, tail)
        return ".".join(part for part in parts if part)


@dataclass(slots=True)
class _Layer:
    """What was seen of one layer of one stack: (tensor, head of its name, rest of its name)."""

    numbered: dict[int, list[tuple[StoredTensor, LayerName, str]]] = field(default_factory=lambda: defaultdict(list))
    fused: list[tuple[StoredTensor, LayerName, str]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Grouping:
    """A checkpoint's kept tensors by block. `n_layers`, and `n_experts` by layer, are the main stack's."""

    family: str
    blocks: Mapping[ExpertKey, Sequence[TensorEntry]]
    n_layers: int
    n_experts: Mapping[int, int]


def group_tensors(tensors: Iterable[StoredTensor], files: Sequence[str], include: Include) -> Grouping:
    """Sort tensors into expert blocks, and with "all" dense ones too.

    A layer's dense tensors go into ExpertKey(layer, DENSE), those of no layer into ExpertKey(DENSE, DENSE).
    Raises CheckpointError if there is no expert, or one is incomplete; `files` gives the names for messages.
    """
    layers: dict[tuple[str, int], _Layer] = defaultdict(_Layer)
    dense: list[StoredTensor] = []
    for tensor in tensors:
        if (parts := split_name(tensor.name)) is None:
            dense.append(tensor)
            continue
        head, number, rest = parts
        if number is None:
            layers[head.stack, head.number].fused.append((tensor, head, rest))
        else:
            layers[head.stack, head.number].numbered[number].append((tensor, head, rest))
    sorter = _Sorter(files, layers, dense)
    if not layers:
        raise CheckpointError(_nothing_found(dense))
    return sorter.grouping(include)


@lru_cache(maxsize=1 << 12)
def _split_head(head: str) -> LayerName:
    parts = head.split(".") if head else []
    numbers = [i for i, part in enumerate(parts) if _NUMBER.fullmatch(part)]
    if not numbers:
        return LayerName(head, 0, "", is_numbered=False)
    after_word = [i for i in numbers if i and parts[i - 1] in _LAYER_WORDS]
    at = after_word[-1] if after_word else numbers[0]
    return LayerName(".".join(parts[:at]), int(parts[at]), ".".join(parts[at + 1 :]))


def split_name(name: str) -> tuple[LayerName, int | None, str] | None:
    """(layer, expert number or None if fused, rest of the name) of a tensor under `experts.`; None for any other."""
    match = _EXPERTS.search(name)
    if match is None:
        return None
    head, tail = name[: match.start()], name[match.end() :]
    number, _, rest = tail.partition(".")
    if _NUMBER.fullmatch(number):
        return _split_head(head), int(number), rest
    return _split_head(head), None, tail


def _nothing_found(dense: Sequence[StoredTensor]) -> str:
    names = sorted((t.name for t in dense), key=lambda name: ("expert" not in name and "moe" not in name, name))
    seen = ", ".join(names[:SAMPLE_NAMES]) or "no tensor at all"
    return (
        f"no expert found: no tensor is called ….experts.<number>.… or ….experts.gate_up_proj. Seen: {seen}"
        f"{', …' if len(names) > SAMPLE_NAMES else ''}. Give a mixture-of-experts checkpoint of a known naming"
    )


class _Sorter:
    """One pass over what `group_tensors` has collected."""

    def __init__(
        self, files: Sequence[str], layers: Mapping[tuple[str, int], _Layer], dense: list[StoredTensor]
    ) -> None:
        self.files = files
        self.layers = layers
        self.dense = dense
        self.blocks: dict[ExpertKey, list[TensorEntry]] = defaultdict(list)
        self.kinds: set[str] = set()

    def grouping(self, include: Include) -> Grouping:
        counts = Counter(stack for stack, _ in self.layers)
        main = min(counts, key=lambda stack: (-counts[stack], stack))
        shifts, n_layers = self._shifts(main)
        n_experts = {}
        for (stack, number), layer in sorted(self.layers.items()):
            n = self._sort_layer(layer, number + shifts[stack], is_literal=shifts[stack] > 0)
            if stack == main:
                n_experts[number] = n
            if len(self.blocks) > BLOCKS_MAX:
                raise CheckpointError(f"more than {BLOCKS_MAX:,} experts: beyond what Hotspare keeps of one model")
        if include == "all":
            for tensor in self.dense:
                self._place_dense(tensor, shifts)
        family = next(iter(self.kinds)) if len(self.kinds) == 1 else "mixed"
        return Grouping(family, self.blocks, n_layers, n_experts)

    def _shifts(self, main: str) -> tuple[dict[str, int], int]:
        """What to add to each stack's layer numbers, and the number of layers of the main one, dense ones included."""
        stacks = {stack for stack, _ in self.layers}
        numbers: dict[str, set[int]] = {stack: set() for stack in stacks}
        for stack, number in self.layers:
            numbers[stack].add(number)
        for tensor in self.dense:
            if (layer := _layer_of(tensor.name, stacks)) is not None:
                numbers[layer.stack].add(layer.number)
        shifts, taken = {main: 0}, set(numbers[main])
        for stack in sorted(stacks - {main}):
            shifts[stack] = 0 if taken.isdisjoint(numbers[stack]) else max(taken) + 1
            taken |= {number + shifts[stack] for number in numbers[stack]}
        if max(taken) >= LAYERS_MAX:
            raise CheckpointError(f"a layer has the number {max(taken)}, the limit is {LAYERS_MAX}: {_MEND}")
        return shifts, max(numbers[main]) + 1

    # -- one layer -------------------------------------------------------------------------------------------

    def _sort_layer(self, layer: _Layer, number: int, *, is_literal: bool) -> int:
        """Put the layer's experts into blocks; returns how many it has."""

        @lru_cache
        def template(head: LayerName, tail: str) -> str:
            return head.template(tail, str(head.number) if is_literal else "{layer}")

        n_experts = len(layer.numbered)
        if layer.numbered:
            self._check_numbered(layer)
            self.kinds.add(self._kind(layer))
        if layer.fused:
            n_experts = self._fused_count(layer) or n_experts
            self.kinds.add("fused")
        for expert, parts in layer.numbered.items():
            block = self.blocks[ExpertKey(number, expert)]
            for tensor, head, rest in parts:
                name = template(head, f"experts.{{expert}}.{rest}".rstrip("."))
                block.append(TensorEntry(name, tensor.dtype, tensor.shape, tensor.file, tensor.offset))
        for tensor, head, rest in layer.fused:
            self._share_out(tensor, template(head, f"experts.{rest}[{{expert}}]"), number, n_experts)
        return n_experts

    def _check_numbered(self, layer: _Layer) -> None:
        """Expert numbers are 0..E-1, and all have tensors of the same names."""
        sets = {expert: frozenset((h.rest, rest) for _, h, rest in parts) for expert, parts in layer.numbered.items()}
        usual = Counter(sets.values()).most_common(1)[0][0]
        any_tensor = layer.numbered[min(sets)][0][0]
        if max(sets) >= len(sets):
            missing = next(i for i in range(len(sets)) if i not in sets)
            raise CheckpointError(
                f"{self._where(any_tensor)}: the layer has an expert {max(sets)}, but no expert {missing}; {_MEND}"
            )
        for expert, names in sets.items():
            if names != usual:
                raise CheckpointError(self._odd_one(layer.numbered[expert][0][0], expert, names, usual))

    def _odd_one(
        self, tensor: StoredTensor, expert: int, names: frozenset[tuple[str, str]], usual: frozenset[tuple[str, str]]
    ) -> str:
        lacks = ", ".join(sorted(rest for _, rest in usual - names))
        extra = ", ".join(sorted(rest for _, rest in names - usual))
        says = " and ".join(filter(None, [f"lacks {lacks}" if lacks else "", f"has {extra} beside" if extra else ""]))
        return f"{self._where(tensor)}: expert {expert} {says}, unlike the layer's other experts; {_MEND}"

    def _kind(self, layer: _Layer) -> str:
        tensor, _, _ = layer.numbered[0][0]
        projections = {rest.partition(".")[0] for _, _, rest in layer.numbered[0]}
        for kind, whole in _PROJECTIONS.items():
            if projections in whole:
                return kind
            if projections < whole[0]:
                lacks = ", ".join(sorted(whole[0] - projections))
                raise CheckpointError(f"{self._where(tensor)}: every expert of this layer lacks {lacks}; {_MEND}")
        return "generic"

    def _fused_count(self, layer: _Layer) -> int:
        """How many experts the fused tensors of a layer hold: their first axis, which must be the same."""
        counts = {len(layer.numbered)} if layer.numbered else set()
        for tensor, _, rest in layer.fused:
            if tensor.nbytes == 0:
                raise CheckpointError(f"{self._where(tensor)}: shape {list(tensor.shape)} holds no bytes; {_MEND}")
            if _FUSED.fullmatch(rest) and len(tensor.shape) > 1:
                counts.add(tensor.shape[0])
        if len(counts) == 1 and max(counts) <= EXPERTS_MAX:
            return counts.pop()
        tensor = layer.fused[0][0]
        if not counts:
            raise CheckpointError(
                f"{self._where(tensor)} lies under 'experts', in a naming that tells no number of experts: "
                "convert the checkpoint to a known naming"
            )
        raise CheckpointError(
            f"{self._where(tensor)}: the experts' tensors of this layer tell {sorted(counts)} experts, one number "
            f"up to {EXPERTS_MAX} is wanted; {_MEND}"
        )

    def _share_out(self, tensor: StoredTensor, template: str, layer: int, n_experts: int) -> None:
        if not tensor.shape or tensor.shape[0] != n_experts:
            if all(side == 1 for side in tensor.shape):
                self.dense.append(tensor)  # one number for all experts
                return
            raise CheckpointError(
                f"{self._where(tensor)}: shape {list(tensor.shape)} does not begin with the layer's {n_experts} "
                f"experts; {_MEND}"
            )
        if tensor.nbytes % n_experts:
            raise CheckpointError(f"{self._where(tensor)}: a share of it is not whole bytes; {_MEND}")
        share = tensor.nbytes // n_experts
        for expert in range(n_experts):
            entry = TensorEntry(template, tensor.dtype, tensor.shape[1:], tensor.file, tensor.offset + expert * share)
            self.blocks[ExpertKey(layer, expert)].append(entry)

    # -- dense tensors ---------------------------------------------------------------------------------------

    def _place_dense(self, tensor: StoredTensor, shifts: Mapping[str, int]) -> None:
        key, name = ExpertKey(DENSE, DENSE), tensor.name
        if (layer := _layer_of(tensor.name, shifts)) is not None:
            key = ExpertKey(layer.number + shifts[layer.stack], DENSE)
            if not shifts[layer.stack]:
                name = layer.template("", "{layer}")
        self.blocks[key].append(TensorEntry(name, tensor.dtype, tensor.shape, tensor.file, tensor.offset))

    def _where(self, tensor: StoredTensor) -> str:
        return f"{self.files[tensor.file]}: tensor {tensor.name!r}"


def _layer_of(name: str, stacks: Iterable[str]) -> LayerName | None:
    """The layer that a dense tensor belongs to, if its stack is one of those that have experts."""
    for stack in stacks:
        if not stack or name.startswith(stack + "."):
            number, _, rest = name[len(stack) + bool(stack) :].partition(".")
            if _NUMBER.fullmatch(number):
                return LayerName(stack, int(number), rest)
    return None

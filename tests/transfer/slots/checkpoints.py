"""Checkpoints and parameters of a few small experts, with random bytes, and what loading by indexing makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from shm.block import ExpertKey, TensorEntry
from shm.manifest import FileSpec, Manifest
from transfer.slots.copies import apply_copies
from transfer.slots.layouts import DTYPES, NO_EXPERT
from transfer.slots.plan import SlotPlan

STEM = "model.layers.{layer}.mlp.experts."
PARTS = ("gate", "up", "down")
FP8 = torch.float8_e4m3fn


def noise(shape: Iterable[int], dtype: torch.dtype) -> torch.Tensor:
    """Random bytes, as what engines and checkpoints hold is to a copy."""
    shape = tuple(shape)
    size = torch.empty((), dtype=dtype).element_size()
    return torch.randint(0, 256, (*shape[:-1], shape[-1] * size), dtype=torch.uint8).view(dtype)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(raw(one), raw(other))


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


@dataclass
class Model:
    """A checkpoint's tensors by key and name template, its manifest and its blocks."""

    tensors: dict[ExpertKey, dict[str, torch.Tensor]]

    def __post_init__(self) -> None:
        entries = {
            key: [TensorEntry(n, DTYPES[str(t.dtype)], tuple(t.shape), 0, 0) for n, t in named.items()]
            for key, named in self.tensors.items()
        }
        files = [FileSpec("model.safetensors", 1 << 40, "0" * 32)]
        self.manifest = Manifest.build("tiny", "test", "experts", files, entries)

    def block(self, key: ExpertKey) -> bytes:
        block = self.manifest.block(self.manifest.index(*key))
        out = bytearray(block.nbytes)
        names = {n.format(layer=key.layer, expert=key.expert): t for n, t in self.tensors[key].items()}
        for spec in block.tensors:
            out[spec.offset : spec.offset + spec.nbytes] = raw(names[spec.name]).numpy().tobytes()
        return bytes(out)

    def names(self, key: ExpertKey) -> dict[str, torch.Tensor]:
        return {n.format(layer=key.layer, expert=key.expert): t for n, t in self.tensors[key].items()}

    def fill(self, plan: SlotPlan) -> None:
        for key in plan.keys:
            for copies in plan.copies(key):
                apply_copies(self.block(key), copies)


def per_expert(
    layers: Iterable[int], n_experts: int, hidden: int, inner: int, dtype: torch.dtype, group: int = 0,
    names: Mapping[str, str] | None = None,
) -> Model:  # fmt: skip
    """Gate, up and down of every expert; with `group`, block scales as DeepSeek's beside them."""
    names = names or {part: STEM + "{expert}." + part + "_proj" for part in PARTS}
    tensors: dict[ExpertKey, dict[str, torch.Tensor]] = {}
    for layer in layers:
        for expert in range(n_experts):
            named = tensors[ExpertKey(layer, expert)] = {}
            for part in PARTS:
                shape = (hidden, inner) if part == "down" else (inner, hidden)
                named[names[part] + ".weight"] = noise(shape, dtype)
                if group:
                    scales = [-(-side // group) for side in shape]
                    named[names[part] + ".weight_scale_inv"] = noise(scales, torch.float32)
    return Model(tensors)


def fused_parameters(
    layers: Iterable[int], slots: int, hidden: int, inner: int, dtype: torch.dtype, group: int = 0
) -> dict[str, torch.Tensor]:
    """What a rank has, `inner` being its part: full of noise."""
    out = {}
    for layer in layers:
        stem = STEM.format(layer=layer)
        out[stem + "w13_weight"] = noise((slots, 2 * inner, hidden), dtype)
        out[stem + "w2_weight"] = noise((slots, hidden, inner), dtype)
        if group:
            rows, columns = -(-inner // group), -(-hidden // group)
            out[stem + "w13_weight_scale_inv"] = noise((slots, 2 * rows, columns), torch.float32)
            out[stem + "w2_weight_scale_inv"] = noise((slots, columns, rows), torch.float32)
    return out


def load_by_indexing(
    parameters: Mapping[str, torch.Tensor], model: Model, maps: Mapping[int, list[int]], layout: str,
    ep: tuple[int, int], tp: tuple[int, int],
) -> dict[str, torch.Tensor]:  # fmt: skip
    """What an engine's own loader would leave, done with indexing alone."""
    out = {name: tensor.clone() for name, tensor in parameters.items()}
    for name, tensor in out.items():
        layer, kind = int(name.split(".")[2]), name.split("_", 1)[1]
        mine = maps[layer][ep[0] * len(tensor) : (ep[0] + 1) * len(tensor)]
        for slot, expert in enumerate(mine):
            if expert == NO_EXPERT:
                continue
            found = {p: model.tensors[ExpertKey(layer, expert)][STEM + "{expert}." + f"{p}_proj.{kind}"] for p in PARTS}
            if ".w2_" in name:
                tensor[slot] = found["down"].chunk(tp[1], 1)[tp[0]]
            else:
                order = ("gate", "up") if layout == "gate_first" else ("up", "gate")
                tensor[slot] = torch.cat([found[part].chunk(tp[1], 0)[tp[0]] for part in order])
    return out

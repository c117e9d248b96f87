"""A rank that is made like vLLM's, as far as ours looks at it: modules of experts whose kernel packs their weights."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch

from transfer.slots.layouts import expert_of
from transfer.vllm.experts import slots_of

EXPERTS, HIDDEN, WIDTH = 5, 48, 40  # of the tiny qwen3_moe
Named = tuple[str, torch.Tensor]


class Experts(torch.nn.Module):
    """A layer's experts on one of `ranks` ranks, which take them one after the other, or turn about."""

    def __init__(self, rank: int, ranks: int, *, is_balanced: bool = False, is_packing: bool = True) -> None:
        super().__init__()
        self.is_packing = is_packing
        mine = list(range(EXPERTS))[rank::ranks]
        self.expert_map_manager = SimpleNamespace(
            global_num_experts=EXPERTS, map_global_to_local=lambda e: torch.tensor(mine.index(e) if e in mine else -1)
        )
        parallel = SimpleNamespace(enable_eplb=is_balanced)
        self.moe_config = SimpleNamespace(moe_parallel_config=parallel, tp_rank=0, tp_size=1)
        for name, shape in (("w13_weight", (2 * WIDTH, HIDDEN)), ("w2_weight", (HIDDEN, WIDTH))):
            weight = torch.nn.Parameter(torch.empty(len(mine), *shape, dtype=torch.bfloat16), requires_grad=False)
            self.register_parameter(name, weight)

    def take(self, tensors: Iterable[Named]) -> None:
        """As vLLM at the start: into their slots, and then as the kernel wants them."""
        slots = slots_of(self)
        for name, tensor in tensors:
            key = expert_of(name)
            assert key is not None
            w13, w2 = self.w13_weight.data[slots[key[1]]], self.w2_weight.data[slots[key[1]]]
            part = {"gate_proj": w13[:WIDTH], "up_proj": w13[WIDTH:], "down_proj": w2}[name.split(".")[-2]]
            part.copy_(tensor)
        for weight in self.parameters() if self.is_packing else ():
            weight.data.copy_(packed(weight.data))


def packed(weight: torch.Tensor) -> torch.Tensor:
    """Two rows in turns, as processors with a unit for bf16 products want them: shape and dtype stay."""
    slots, rows, columns = weight.shape
    return weight.reshape(slots, rows // 2, 2, columns).transpose(2, 3).reshape(weight.shape)


class Model(torch.nn.Module):
    """Its layers of experts, named as vLLM names them."""

    def __init__(self, layers: int = 3, rank: int = 0, ranks: int = 1, **more: Any) -> None:
        super().__init__()
        self.model = torch.nn.Module()
        self.model.layers = torch.nn.ModuleList()
        for _ in range(layers):
            layer, mlp, experts = torch.nn.Module(), torch.nn.Module(), torch.nn.Module()
            experts.routed_experts = Experts(rank, ranks, **more)
            mlp.experts, layer.mlp = experts, mlp
            self.model.layers.append(layer)

    def start(self, tensors: Iterable[Named]) -> None:
        """Take the experts of a checkpoint that this rank has."""
        tensors = list(tensors)
        for number, layer in enumerate(self.model.layers):
            experts = layer.mlp.experts.routed_experts
            mine = [(n, t) for n, t in tensors if (key := expert_of(n)) and key[0] == number]
            experts.take([(n, t) for n, t in mine if expert_of(n)[1] in slots_of(experts)])  # type: ignore[index]

    def held(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.named_parameters()}

    def spoil(self, layer: int, expert: int) -> None:
        experts = self.model.layers[layer].mlp.experts.routed_experts
        for weight in experts.parameters():
            weight.data[slots_of(experts)[expert]].normal_()

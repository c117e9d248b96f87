"""What a load of some experts does to all others: SGLang processes the whole model after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch

from transfer.sglang.reloading import reload_experts

EXPERTS, SLOTS = 6, 3


class Engine:
    """The second of two ranks; its `process` is what a quantisation method does after each load."""

    ep_rank, ep_size, physical_count = 1, 2, 2 * SLOTS

    def __init__(self, process: Callable[[Engine], None]) -> None:
        torch.manual_seed(3333)
        self.checkpoint = {
            f"model.layers.0.mlp.experts.{e}.down_proj.weight": torch.randn(7, 5) for e in range(EXPERTS)
        }
        self.checkpoint["model.norm.weight"] = torch.randn(33)
        self._parameters = {
            "model.layers.0.mlp.experts.w2_weight": torch.zeros(SLOTS, 7, 5),
            "model.norm.weight": torch.zeros(33),
        }
        self._process = process
        self.loads: list[set[str]] = []
        self.reload(lambda name: True)
        self.loads.clear()

    def parameters(self) -> Mapping[str, torch.Tensor]:
        return self._parameters

    def physical_of(self, layer: int, expert: int) -> Sequence[int]:
        return [expert]

    def reload(self, wanted: Callable[[str], bool]) -> None:
        self.loads.append({name for name in self.checkpoint if wanted(name)})
        slots = self._parameters["model.layers.0.mlp.experts.w2_weight"]
        for slot in range(SLOTS):
            name = f"model.layers.0.mlp.experts.{SLOTS + slot}.down_proj.weight"
            if name in self.loads[-1]:
                slots[slot] = self.checkpoint[name]
        if "model.norm.weight" in self.loads[-1]:
            self._parameters["model.norm.weight"].copy_(self.checkpoint["model.norm.weight"])
        self._process(self)


def leave(engine: Engine) -> None:
    """Most kernels."""


def mirror_experts(engine: Engine) -> None:
    slots = engine._parameters["model.layers.0.mlp.experts.w2_weight"]
    slots.copy_(slots.flip(1))


def halve_norm(engine: Engine) -> None:
    engine._parameters["model.norm.weight"].mul_(0.5)


def widen_norm(engine: Engine) -> None:
    engine._parameters["model.norm.weight"] = engine._parameters["model.norm.weight"].double()


def lost(name: str) -> bool:
    return ".experts.4." in name


@pytest.mark.parametrize("process", [leave, mirror_experts, halve_norm])
def test_what_was_not_lost_is_as_it_was(process: Any) -> None:
    engine = Engine(process)
    right = {name: tensor.clone() for name, tensor in engine.parameters().items()}
    engine._parameters["model.layers.0.mlp.experts.w2_weight"][1] = torch.nan
    reload_experts(engine, lost)  # type: ignore[arg-type]
    assert {name: torch.equal(tensor, right[name]) for name, tensor in engine.parameters().items()} == dict.fromkeys(
        right, True
    )
    only = {name for name in engine.checkpoint if lost(name)}
    assert engine.loads == ([only] if process is leave else [only, set(engine.checkpoint)])


def test_parameters_of_another_dtype_were_changed() -> None:
    engine = Engine(leave)
    engine._process = widen_norm
    reload_experts(engine, lost)  # type: ignore[arg-type]
    assert engine.loads[1:] == [set(engine.checkpoint)]


def test_nothing_is_compared_where_more_than_experts_was_asked_for() -> None:
    engine = Engine(halve_norm)
    reload_experts(engine, lambda name: True)  # type: ignore[arg-type]
    assert engine.loads == [set(engine.checkpoint)]

"""A rank is brought the experts that its modules keep, and everything that is not known to be dropped."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Sequence

import pytest
import torch

from transfer.sglang.engine import EXPERT_LOCATION
from transfer.sglang.share import of_rank

SLOTS = 4


class Experts(torch.nn.Module):
    """As much of SGLang's `FusedMoE` as is asked: two ranks of four slots, this one the second."""

    def __init__(self, layer: int, *, uses_expert_location: bool = True) -> None:
        super().__init__()
        self.layer_id, self.uses_expert_location = layer, uses_expert_location
        self.num_global_routed_experts, self.num_local_experts = 2 * SLOTS, SLOTS
        self.w13_weight = torch.nn.Parameter(torch.zeros(SLOTS, 2, 2))

    def _map_global_expert_id_to_local_expert_id(self, physical: int) -> int:
        return physical - SLOTS if SLOTS <= physical < 2 * SLOTS else -1


def model(**layers: Experts) -> torch.nn.Module:
    root = torch.nn.Module()
    root.model = torch.nn.Module()
    root.model.layers = torch.nn.ModuleDict()
    for name, experts in layers.items():
        root.model.layers[name.removeprefix("layer")] = layer = torch.nn.Module()
        layer.mlp = torch.nn.Module()
        layer.mlp.experts = experts
    return root


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`place({layer: logical experts of the slots})` → SGLang's placement; None without one."""

    def make(placement: dict[int, Sequence[int]] | None) -> None:
        location = types.ModuleType(EXPERT_LOCATION)
        metadata = types.SimpleNamespace(
            num_logical_experts=6,
            logical_to_all_physical=lambda layer, expert: [
                at for at, logical in enumerate((placement or {})[layer]) if logical == expert
            ],
        )
        location.get_global_expert_location_metadata = lambda: None if placement is None else metadata  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, EXPERT_LOCATION, location)

    return make


def wanted(
    root: torch.nn.Module | None, layer: int, name: str = "down_proj.weight", stack: str = "model."
) -> list[int]:
    share = of_rank(root)
    return [e for e in range(2 * SLOTS) if share(f"{stack}layers.{layer}.mlp.experts.{e}.{name}")]


def test_experts_are_wanted_where_they_are_placed_in_each_layer(place: Callable[..., None]) -> None:
    place({0: [0, 1, 2, 3, 4, 5, 0, 1], 1: [5, 4, 3, 2, 1, 0, 5, 5]})
    root = model(layer0=Experts(0), layer1=Experts(1))
    assert wanted(root, 0) == [0, 1, 4, 5]
    assert wanted(root, 1, "gate_proj.weight_scale_inv") == wanted(root, 1, "up_proj.weight_packed") == [0, 1, 5]


def test_without_a_placement_a_rank_has_its_range(place: Callable[..., None]) -> None:
    place(None)
    assert wanted(model(layer0=Experts(0)), 0) == [4, 5, 6, 7]
    place({0: [0] * 8})
    assert wanted(model(layer0=Experts(0, uses_expert_location=False)), 0) == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("layer", "name", "stack"),
    [(0, "down_proj.input_scale", "model."), (7, "down_proj.weight", "model."), (0, "down_proj.weight", "mtp.")],
    ids=["scales of activations", "a layer without a module", "a draft model's stack"],
)
def test_what_is_not_known_to_be_dropped_is_wanted(
    place: Callable[..., None], layer: int, name: str, stack: str
) -> None:
    place(None)
    assert wanted(model(layer0=Experts(0)), layer, name, stack) == list(range(8))
    assert of_rank(model(layer0=Experts(0)))("model.embed_tokens.weight")


def test_a_draft_whose_layers_are_numbered_anew_gets_everything(place: Callable[..., None]) -> None:
    place(None)
    assert wanted(model(layer0=Experts(61)), 0) == list(range(8))


def test_modules_that_are_built_otherwise_get_everything(place: Callable[..., None]) -> None:
    place(None)
    root = model(layer0=Experts(0))
    del root.get_submodule("model.layers.0.mlp.experts").num_local_experts
    assert wanted(root, 0) == list(range(8))
    assert wanted(None, 0) == list(range(8))

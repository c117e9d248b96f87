"""Which of a checkpoint's tensors a rank of SGLang has a use for: without that, each rank would be brought them all.

SGLang hands every tensor to its expert modules, which drop what is not theirs as it comes. So a module is asked what it
would drop. Where it says nothing, or where names and modules do not go together (a draft model, whose layers are
numbered anew), everything is wanted: too much costs time, and too little would leave a slot with whatever was in it.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from transfer.sglang.engine import EXPERT_LOCATION, NameFilter
from transfer.slots.layouts import expert_name, fused_name

KEPT_ALONE = (".weight", ".weight_scale_inv", ".weight_scale", ".weight_packed", ".weight_shape")
"""Tensors that only a rank with a slot for the expert keeps. Of scales of activations every rank keeps all."""

Held = Mapping[tuple[str, int], Collection[int]]
"""(what the names of a stack begin with, layer) → the logical experts that have a slot here."""


def of_rank(model: Any) -> NameFilter:
    """Whether a tensor of this checkpoint name may have a place in this model, or None. Never raises."""
    try:
        held = dict(_held(model))
    except Exception:  # an SGLang that is built otherwise: it drops what it does not want itself
        return lambda name: True
    return lambda name: _is_wanted(held, name)


def _is_wanted(held: Held, name: str) -> bool:
    found = expert_name(name)
    if found is None or not name.endswith(KEPT_ALONE):
        return True
    experts = held.get((found.stack, found.layer))
    return experts is None or found.expert in experts


def _held(model: Any) -> Iterator[tuple[tuple[str, int], frozenset[int]]]:
    for path, module in model.named_modules():
        named = fused_name(f"{path}.w13_weight")
        if named is not None and hasattr(module, "w13_weight") and module.layer_id == named.layer:
            stack = path[: path.rindex(f"layers.{named.layer}.")]
            yield (stack, named.layer), frozenset(_logical(module))


def _logical(module: Any) -> Iterator[int]:
    """The logical experts of an expert module, as `FusedMoE.weight_loader` finds them."""
    placement = importlib.import_module(EXPERT_LOCATION).get_global_expert_location_metadata()
    if placement is None or not module.uses_expert_location:
        yield from (expert for expert in range(module.num_global_routed_experts) if _is_local(module, expert))
        return
    for expert in range(placement.num_logical_experts):
        if any(_is_local(module, at) for at in placement.logical_to_all_physical(module.layer_id, expert)):
            yield expert


def _is_local(module: Any, physical: int) -> bool:
    local = int(module._map_global_expert_id_to_local_expert_id(physical))
    return 0 <= local < int(module.num_local_experts)

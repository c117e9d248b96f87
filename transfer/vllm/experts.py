"""Where a rank of vLLM has its experts: its modules, asked themselves.

Facts of vLLM that are relied on are here, in `model_loader`, `worker` and `plugin` beside it, and nowhere else. Read
and tried in release 0.32.
"""

from __future__ import annotations

from typing import Any

from transfer.slots.layouts import fused_name

_OF_ALL_RANKS = "input_scale"


def expert_modules(model: Any) -> dict[str, Any]:
    """Its modules with the weights of a layer's experts, by their names."""
    modules = model.named_modules()
    return {name: m for name, m in modules if hasattr(m, "expert_map_manager") and hasattr(m, "w13_weight")}


def layer_of(name: str) -> int | None:
    """The layer that a module of that name has the experts of; None where the name does not say."""
    return None if (found := fused_name(f"{name}.w13_weight")) is None else found.layer


def is_balanced(module: Any) -> bool:
    """Whether vLLM places its experts anew while it runs (EPLB): what is asked below is then of its start."""
    return bool(module.moe_config.moe_parallel_config.enable_eplb)


def part_of(module: Any) -> tuple[int, int]:
    """Which part of each expert the rank has, of how many: its tensor-parallel rank and size among experts."""
    return int(module.moe_config.tp_rank), int(module.moe_config.tp_size)


def slots_of(module: Any) -> dict[int, int]:
    """Logical expert → the slot that the rank has it in."""
    manager = module.expert_map_manager
    found = ((expert, int(manager.map_global_to_local(expert))) for expert in range(manager.global_num_experts))
    return {expert: slot for expert, slot in found if slot >= 0}


def has_other_memory(module: Any) -> bool:
    """Whether the module's kernel has numbers for each slot that are no parameters: made of them, filling the
    parameters would not reach them.
    """
    method = getattr(module, "quant_method", None)
    config, kernel = getattr(method, "moe_quant_config", None), getattr(method, "moe_kernel", None)
    holders = [module, method, config, *_attributes(config), kernel, getattr(kernel, "fused_experts", None)]
    known = {parameter.data_ptr() for parameter in module.parameters()}
    slots = module.w13_weight.shape[0]
    return any(
        tensor.dim() > 0 and tensor.shape[0] == slots and tensor.data_ptr() not in known
        for holder in holders
        for tensor in _attributes(holder)
        if hasattr(tensor, "data_ptr") and (tensor.dim() > 1 or tensor.is_floating_point())
    )


def _attributes(holder: Any) -> list[Any]:
    return list(getattr(holder, "__dict__", {}).values())


def is_of_all_ranks(name: str) -> bool:
    """Whether a tensor of an expert is for ranks without it, too: they may take the largest of all, as NVFP4 does."""
    return _OF_ALL_RANKS in name

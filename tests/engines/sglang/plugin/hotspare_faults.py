"""A plugin of SGLang for tests: a rank that is lost on demand, and what a rank's slots hold after that.

A rank counts as dead from one forward pass to the next, as if a dispatcher had found it so, and its experts are noise.
It takes part in collectives still, since those of a CPU have nobody who would do without it. On a CPU the experts of
SGLang do not know of expert parallelism, so they are computed here.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

ORDERS = "HOTSPARE_FAULTS"  # a file that is read and removed before a forward pass: {"dead": rank}
RIGHT = "HOTSPARE_FAULTS_RIGHT"  # a safetensors file of what slots should hold
SWAPPED = "HOTSPARE_FAULTS_SWAPPED"  # set: after every load w13's halves change places, without a word
EXPERTS = "sglang.srt.layers.moe.fused_moe_native.moe_forward_native"
FORWARD = "sglang.srt.model_executor.model_runner.ModelRunner.forward"
MOVES = "sglang.srt.eplb.expert_location_updater._update_expert_weights"
PROCESSING = "sglang.srt.layers.quantization.unquant.UnquantizedFusedMoEMethod.process_weights_after_loading"

_log = logging.getLogger("hotspare.faults")
_last_said: list[str] = [""]


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if not hasattr(torch.cpu, "empty_cache"):  # as SGLang calls it before its first rebalance
        torch.cpu.empty_cache = lambda: None
    if not torch.cuda.is_available():
        HookRegistry.register(EXPERTS, compute_experts, HookType.AROUND)
    HookRegistry.register(FORWARD, forward, HookType.AROUND)
    HookRegistry.register(MOVES, move_experts, HookType.AROUND)
    if os.environ.get(SWAPPED):
        HookRegistry.register(PROCESSING, swap_halves, HookType.AFTER)


def compute_experts(original: Any, layer: Any, x: torch.Tensor, topk_output: Any, config: Any) -> torch.Tensor:
    """x [tokens, hidden] through this rank's experts; of others the router's indices are -1."""
    weights, chosen, _ = topk_output
    out = torch.zeros(x.shape, dtype=torch.float32)
    for slot in range(layer.w13_weight.shape[0]):
        token, choice = (chosen == slot).nonzero(as_tuple=True)
        if len(token):
            halves = torch.nn.functional.linear(x[token], layer.w13_weight[slot]).chunk(2, dim=-1)
            gate, up = halves[::-1] if os.environ.get(SWAPPED) else halves
            y = torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, layer.w2_weight[slot])
            out.index_add_(0, token, y.float() * weights[token, choice].float()[:, None])
    return out.to(x.dtype)


def swap_halves(result: Any, method: Any, layer: Any) -> None:
    """As some kernels want it: not the checkpoint's layout any more, and nothing says so."""
    w13 = layer.w13_weight.data
    w13.copy_(w13.roll(w13.shape[1] // 2, 1))


def forward(original: Callable[..., Any], runner: Any, *arguments: Any, **keywords: Any) -> Any:
    state = _state()
    if state is not None and (dead := _ordered()) >= 0:
        rank = _group().rank_in_group
        if rank == dead:
            _spoil(runner.model)
        state.active_ranks[dead] = 0
        _log.warning("rank %d: rank %d counts as dead", rank, dead)
    out = original(runner, *arguments, **keywords)
    if state is not None and os.environ.get(RIGHT):
        _look_at_slots(runner.model)
    return out


def move_experts(original: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    state = _state()
    if state is not None and not state.active_ranks[keywords["rank"]]:
        return {}  # it is dead: nobody brings it anything
    return original(*arguments, **keywords)


def _state() -> Any:
    from sglang.srt.elastic_ep.elastic_ep import ElasticEPStateManager

    return ElasticEPStateManager.instance()


def _group() -> Any:
    from sglang.srt.runtime_context import get_parallel

    return get_parallel().tp_group


def _ordered() -> int:
    """The rank that is to die now, in all ranks alike; -1 for none."""
    group = _group()
    order = torch.full((1,), -1, dtype=torch.int64)
    file = Path(os.environ[ORDERS])
    if group.rank_in_group == 0 and file.exists():
        order[0] = json.loads(file.read_text())["dead"]
        file.unlink()
    torch.distributed.broadcast(order, src=group.ranks[0], group=group.cpu_group)
    return int(order)


def _experts(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, p.data) for name, p in model.named_parameters() if ".experts.w" in name)


def _spoil(model: torch.nn.Module) -> None:
    for _, slots in _experts(model):
        slots.normal_()


def _look_at_slots(model: torch.nn.Module) -> None:
    """Say once for each placement how many tensors of this rank's slots are the checkpoint's, to the byte."""
    from safetensors import safe_open
    from sglang.srt.eplb.expert_location import get_global_expert_location_metadata
    from sglang.srt.runtime_context import get_parallel

    placement = get_global_expert_location_metadata().physical_to_logical_map_cpu
    rank, size = get_parallel().moe_ep_rank, get_parallel().moe_ep_size
    if _last_said[0] == str(placement.tolist()):
        return
    _last_said[0] = str(placement.tolist())
    share = placement.shape[1] // size
    right, wrong = 0, 0
    with safe_open(os.environ[RIGHT], "pt") as file:
        for name, slots in _experts(model):
            stem, _, part = name.rpartition(".")
            layer = int(stem.split(".layers.")[1].split(".")[0])
            for slot in range(share):
                expert = int(placement[layer, rank * share + slot])
                parts = ("gate_proj", "up_proj") if part == "w13_weight" else ("down_proj",)
                if os.environ.get(SWAPPED):
                    parts = parts[::-1]
                wanted = torch.cat([file.get_tensor(f"{stem}.{expert}.{each}.weight") for each in parts])
                is_right = torch.equal(slots[slot].cpu(), wanted)
                right, wrong = right + is_right, wrong + (not is_right)
    _log.warning("rank %d: %d slots of parameters hold the checkpoint's bytes, %d do not", rank, right, wrong)

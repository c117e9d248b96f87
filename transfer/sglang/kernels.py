"""What an SGLang 0.5 expert module says of itself: the order of w13's halves, and whether its kernel has other memory.

Whether its weights lie as the checkpoint has them, nobody is asked: bytes are compared (`Restorer.bind`), whatever
quantisation or runner the module names. What the bytes of parameters cannot show is memory that a kernel made *from*
them and reads in their place. A restore would fill the parameters and leave that as it was: it is refused here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transfer.slots.layouts import SlotMismatch, fused_name

_OTHER_MEMORY: Mapping[str, str] = {
    "_mega_moe_weights_built": "weights of its own, made from the parameters",
    "_dwdp_bound": "the weights of all ranks, fetched as they are used",
}
_ROUTING = "correction_bias"  # one number an expert, and no weight of an expert


def sglang_layout(experts: Any) -> str:
    """The `layout` for `Slots.fused` of a `FusedMoE` module: "gate_first" or "up_first".

    Raises SlotMismatch for a module whose kernel reads other memory than the parameters that are restored.
    """
    for mark, what in _OTHER_MEMORY.items():
        if getattr(experts, mark, False):
            raise _refusal(f"{what} ({mark})")
    for name, tensor in _made_from_weights(experts).items():
        raise _refusal(f"{name} {list(tensor.shape)}, which has something for each slot and is no parameter to restore")
    method = getattr(experts, "quant_method", None)
    return "up_first" if getattr(method, "load_up_proj_weight_first", False) else "gate_first"


def _made_from_weights(experts: Any) -> Mapping[str, Any]:
    """The module's tensors with numbers for each slot that are neither restored nor another look at what is."""
    held = vars(experts)
    tensors = {**held, **held.get("_parameters", {}), **held.get("_buffers", {})}
    tensors = {name: value for name, value in tensors.items() if hasattr(value, "data_ptr")}
    restored = {tensor.data_ptr() for name, tensor in tensors.items() if _is_restored(name)}
    slots = experts.w13_weight.shape[0]
    return {
        name: tensor
        for name, tensor in tensors.items()
        if tensor.dim() and tensor.shape[0] == slots and tensor.is_floating_point()
        if not _is_restored(name) and not name.endswith(_ROUTING) and tensor.data_ptr() not in restored
    }


def _is_restored(name: str) -> bool:
    """Whether it is among the parameters that `Slots.fused` binds: then the manifest has it, or binding is refused."""
    return fused_name(f"layers.0.experts.{name}") is not None


def _refusal(what: str) -> SlotMismatch:
    return SlotMismatch(
        f"the kernel of SGLang's experts works with {what}: filling the parameters would not reach it. Reload from "
        "disk, or serve with another runner (--moe-runner-backend)"
    )

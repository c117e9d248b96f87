"""Whether an SGLang 0.5 expert module still holds its weights as it loaded them, told from the module itself.

Some kernels rewrite weights after loading with shape and dtype kept, where no look at a parameter can tell. So this is
a list of what is known to be plain; anything else is refused, and the engine reloads from disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transfer.slots.layouts import REWRITTEN, SlotMismatch

PLAIN_METHODS = frozenset({"UnquantizedFusedMoEMethod", "Fp8MoEMethod"})
PLAIN_RUNNERS = frozenset({"triton", "deep_gemm"})

_MODULE_MARKS: Mapping[str, str] = {
    "use_intel_amx_backend": REWRITTEN["amx"],
    "_xpu_weights_transposed": "its weights are held transposed",
    "_mega_moe_weights_built": "its kernel has weights of its own, made from the parameters",
    "hpc_ops_w13_weight_scale": "its kernel has scales of its own, made from the parameters",
    "_dwdp_bound": "its weights are those of all ranks, fetched as they are used",
}
_METHOD_MARKS: Mapping[str, str] = {
    "use_mxfp8": "MXFP8 scales are swizzled",
    "is_fp4_expert": "FP4 weights and scales are packed for their kernel",
    "use_flashinfer_trtllm_moe": REWRITTEN["flashinfer_trtllm"],
    "use_triton_kernels": REWRITTEN["triton_kernels"],
    "w13_swiglu_interleaved": "rows of gate and up were interleaved, in place, for a kernel that applies SwiGLU itself",
}


def sglang_layout(experts: Any, *, is_rocm: bool) -> str:
    """The `layout` for `Slots.fused` of a `FusedMoE` module: "gate_first" or "up_first".

    `is_rocm` is `torch.version.hip is not None`: there unquantised weights may be shuffled without a mark. Raises
    SlotMismatch, naming the kernel and what it does, for a module that is not known to be plain.
    """
    method = getattr(experts, "quant_method", None)
    method_name = type(method).__name__
    if method_name not in PLAIN_METHODS:
        raise _refusal(f"quantisation method {method_name}", "it is not known to keep weights as they were loaded")
    for holder, marks in ((experts, _MODULE_MARKS), (method, _METHOD_MARKS)):
        for mark, why in marks.items():
            if _is_set(getattr(holder, mark, None)):
                raise _refusal(mark, why)
    if getattr(method, "block_quant", None) is False:
        raise _refusal("one fp8 scale a tensor", "scales of gate and up become one, and weights are quantised again")
    runner = getattr(getattr(getattr(method, "runner", None), "runner_backend", None), "value", None)
    if runner not in PLAIN_RUNNERS:
        raise _refusal(f"runner {runner}", REWRITTEN.get(str(runner), "it is not known to use weights as loaded"))
    if is_rocm:
        raise _refusal("ROCm", REWRITTEN["aiter"])
    return "up_first" if getattr(method, "load_up_proj_weight_first", False) else "gate_first"


def _is_set(value: Any) -> bool:
    return bool(value) if isinstance(value, bool | None) else True  # a tensor has no single truth


def _refusal(what: str, why: str) -> SlotMismatch:
    return SlotMismatch(
        f"SGLang's experts with {what}: {why}. Reload from disk, or serve with one of the runners "
        f"{', '.join(sorted(PLAIN_RUNNERS))}, and weights in bf16 or block fp8"
    )

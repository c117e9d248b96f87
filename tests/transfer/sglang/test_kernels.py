"""Expert modules whose weights a kernel rewrote are refused, by the traits that SGLang's modules show."""

from types import SimpleNamespace
from typing import Any

import pytest

from transfer.sglang.kernels import sglang_layout
from transfer.slots.layouts import SlotMismatch


class UnquantizedFusedMoEMethod(SimpleNamespace):
    """Stands for SGLang's class of that name; it is known by its name."""


class Fp8MoEMethod(SimpleNamespace):
    """The same."""


class CompressedTensorsFusedMoEMethod(SimpleNamespace):
    """The same."""


def experts(method: Any = UnquantizedFusedMoEMethod, runner: str = "triton", **marks: Any) -> SimpleNamespace:
    on_method = {
        k: marks.pop(k)
        for k in list(marks)
        if k.startswith(("use_mxfp8", "is_fp4", "use_fl", "load_up", "use_tr", "w13_swiglu", "block_quant"))
    }
    backend = SimpleNamespace(runner_backend=SimpleNamespace(value=runner))
    return SimpleNamespace(quant_method=method(runner=backend, **on_method), **marks)


@pytest.mark.parametrize("method", [UnquantizedFusedMoEMethod, Fp8MoEMethod])
@pytest.mark.parametrize("runner", ["triton", "deep_gemm"])
def test_plain_modules_are_gate_first_unless_they_say_otherwise(method: Any, runner: str) -> None:
    assert sglang_layout(experts(method, runner), is_rocm=False) == "gate_first"
    assert sglang_layout(experts(method, runner, load_up_proj_weight_first=True), is_rocm=False) == "up_first"


def test_marks_that_are_off_do_no_harm() -> None:
    module = experts(use_mxfp8=False, use_intel_amx_backend=False, hpc_ops_w13_weight_scale=None)
    assert sglang_layout(module, is_rocm=False) == "gate_first"


@pytest.mark.parametrize(
    "mark",
    [
        "use_intel_amx_backend",
        "_mega_moe_weights_built",
        "_dwdp_bound",
        "use_mxfp8",
        "is_fp4_expert",
        "use_flashinfer_trtllm_moe",
        "w13_swiglu_interleaved",
    ],
)
def test_a_mark_of_rewriting_is_refused(mark: str) -> None:
    with pytest.raises(SlotMismatch, match=f"with {mark}: "):
        sglang_layout(experts(**{mark: True}), is_rocm=False)


def test_fp8_with_one_scale_a_tensor_is_refused_and_block_fp8_is_not() -> None:
    assert sglang_layout(experts(Fp8MoEMethod, block_quant=True), is_rocm=False) == "gate_first"
    with pytest.raises(SlotMismatch, match="scales of gate and up become one"):
        sglang_layout(experts(Fp8MoEMethod, block_quant=False), is_rocm=False)


def test_scales_copied_aside_by_a_kernel_are_refused() -> None:
    with pytest.raises(SlotMismatch, match="scales of its own"):
        sglang_layout(experts(hpc_ops_w13_weight_scale=object()), is_rocm=False)


@pytest.mark.parametrize("runner", ["marlin", "flashinfer_trtllm", "auto", "of next year"])
def test_an_unknown_runner_is_refused(runner: str) -> None:
    with pytest.raises(SlotMismatch, match=f"runner {runner}: "):
        sglang_layout(experts(runner=runner), is_rocm=False)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(SlotMismatch, match="method CompressedTensorsFusedMoEMethod"):
        sglang_layout(experts(CompressedTensorsFusedMoEMethod), is_rocm=False)
    with pytest.raises(SlotMismatch, match="method NoneType"):
        sglang_layout(SimpleNamespace(), is_rocm=False)


def test_rocm_is_refused() -> None:
    with pytest.raises(SlotMismatch, match="aiter"):
        sglang_layout(experts(), is_rocm=True)

"""A module's names decide nothing, and memory that its kernel has beside the parameters is found."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from transfer.sglang.kernels import sglang_layout
from transfer.slots.layouts import SlotMismatch

SLOTS = 3


def experts(method: Any = None, **more: Any) -> torch.nn.Module:
    module = torch.nn.Module()
    for name in ("w13_weight", "w2_weight", "w13_weight_scale_inv"):
        module.register_parameter(name, torch.nn.Parameter(torch.zeros(SLOTS, 8, 4), requires_grad=False))
    module.quant_method = method
    for name, value in more.items():
        setattr(module, name, value)
    return module


@pytest.mark.parametrize("method", [None, SimpleNamespace(), SimpleNamespace(runner="of next year")])
def test_a_module_is_gate_first_unless_it_says_otherwise_whatever_it_is_called(method: Any) -> None:
    assert sglang_layout(experts(method)) == "gate_first"
    assert sglang_layout(experts(SimpleNamespace(load_up_proj_weight_first=True))) == "up_first"


@pytest.mark.parametrize("mark", ["_mega_moe_weights_built", "_dwdp_bound"])
def test_a_kernel_with_weights_elsewhere_is_refused(mark: str) -> None:
    assert sglang_layout(experts(**{mark: False})) == "gate_first"
    with pytest.raises(SlotMismatch, match=f"{mark}.*would not reach it"):
        sglang_layout(experts(**{mark: True}))


@pytest.mark.parametrize("kind", ["attribute", "buffer", "parameter"])
def test_what_a_kernel_made_of_the_weights_for_each_slot_is_found(kind: str) -> None:
    module, alphas = experts(), torch.ones(SLOTS)
    if kind == "buffer":
        module.register_buffer("g1_alphas", alphas)
    elif kind == "parameter":
        module.register_parameter("g1_alphas", torch.nn.Parameter(alphas, requires_grad=False))
    else:
        vars(module)["g1_alphas"] = alphas
    with pytest.raises(SlotMismatch, match=r"g1_alphas \[3\], which has something for each slot"):
        sglang_layout(module)


def test_what_is_no_copy_of_weights_does_no_harm() -> None:
    module = experts(
        expert_map=torch.arange(SLOTS),
        buffer_of_another_length=torch.zeros(SLOTS + 1, 4),
        scaling=torch.tensor(2.5),
        e_score_correction_bias=torch.zeros(SLOTS),
    )
    vars(module)["weights_of_another_name"] = module.w13_weight.data.view(SLOTS, 4, 8)
    assert sglang_layout(module) == "gate_first"

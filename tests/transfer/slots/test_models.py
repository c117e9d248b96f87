"""Real models of the transformers library: their experts overwritten, then filled from the checkpoint's bytes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import PreTrainedModel

from shm.block import ExpertKey
from tests.transfer.checkpoint.layouts import LAYOUTS, E
from transfer.checkpoint import Checkpoint, read_checkpoint
from transfer.slots import Slots
from transfer.slots.copies import apply_copies, gather_copies
from transfer.slots.layouts import SlotMismatch
from transfer.slots.plan import SlotPlan

SMALL = {
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "num_experts_per_tok": 2,
}


def qwen3_moe() -> PreTrainedModel:
    config = transformers.Qwen3MoeConfig(**SMALL, moe_intermediate_size=13, head_dim=12, num_experts=3)
    return transformers.Qwen3MoeForCausalLM(config)


def mixtral() -> PreTrainedModel:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SMALL, num_local_experts=3))


def deepseek_v3() -> PreTrainedModel:
    attention = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
    config = transformers.DeepseekV3Config(
        **SMALL, **attention, moe_intermediate_size=13, n_routed_experts=4, n_group=2, topk_group=1,
        first_k_dense_replace=1,
    )  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(config)


def gpt_oss() -> PreTrainedModel:
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**SMALL, head_dim=12, num_local_experts=3))


def llama4() -> PreTrainedModel:
    config = transformers.Llama4TextConfig(
        **SMALL, head_dim=12, num_local_experts=3, intermediate_size_mlp=15, interleave_moe_layer_step=1
    )
    return transformers.Llama4ForCausalLM(config)


def granitemoe() -> PreTrainedModel:
    """Its files have other names than its parameters, and no `experts` in them."""
    return transformers.GraniteMoeForCausalLM(transformers.GraniteMoeConfig(**SMALL, num_local_experts=3))


def read_block(checkpoint: Checkpoint, key: ExpertKey) -> bytes:
    block = checkpoint.manifest.block(checkpoint.manifest.index(*key))
    out = bytearray(block.nbytes)
    for spec in block.tensors:
        with checkpoint.path(spec.file).open("rb") as file:
            file.seek(spec.file_offset)
            out[spec.offset : spec.offset + spec.nbytes] = file.read(spec.nbytes)
    return bytes(out)


def fill(plan: SlotPlan, checkpoint: Checkpoint) -> None:
    for key in plan.keys:
        for copies in plan.copies(key):
            apply_copies(read_block(checkpoint, key), copies)


@pytest.mark.parametrize("build", [qwen3_moe, mixtral, deepseek_v3, gpt_oss, llama4, granitemoe])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_come_back_to_the_bit(build: Callable[[], PreTrainedModel], dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(7)
    model = build().to(dtype).eval()
    model.set_experts_implementation("eager")  # the grouped kernels ask for sides that are multiples of 8
    model.save_pretrained(tmp_path)
    checkpoint = read_checkpoint(tmp_path, "tiny")
    words = torch.arange(1, 12)[None]
    with torch.no_grad():
        before = model(words).logits
        slots = Slots.stacked(dict(model.named_parameters()))
        assert slots.keys == checkpoint.manifest.keys
        for tensor in slots.tensors:
            tensor.tensor.normal_()
        assert not torch.equal(model(words).logits, before)
        plan = slots.plan(checkpoint.manifest)
        fill(plan, checkpoint)
        assert torch.equal(model(words).logits, before)
    for key in plan.keys:
        block = read_block(checkpoint, key)
        back = bytearray(len(block))
        gather_copies(back, plan.copies(key)[0])
        assert bytes(back) == block


def test_a_model_of_another_dtype_than_its_checkpoint_is_refused(tmp_path: Path) -> None:
    model = qwen3_moe().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    manifest = read_checkpoint(tmp_path, "tiny").manifest
    with pytest.raises(SlotMismatch, match="is BF16 in the checkpoint, F32 in the engine"):
        Slots.stacked(dict(model.to(torch.float32).named_parameters())).plan(manifest)


def test_untransposed_parameters_and_a_transposed_checkpoint_do_not_mix(tmp_path: Path) -> None:
    llama4().to(torch.bfloat16).save_pretrained(tmp_path)
    manifest = read_checkpoint(tmp_path, "tiny").manifest
    stem = "model.layers.0.feed_forward.experts."
    parameters = {
        stem + "w13_weight": torch.zeros(3, 40, 24, dtype=torch.bfloat16),
        stem + "w2_weight": torch.zeros(3, 24, 20, dtype=torch.bfloat16),
    }
    with pytest.raises(SlotMismatch, match=r"down_proj\[0\] is \[20, 24\] in the checkpoint, and \[24, 20\]"):
        Slots.fused(parameters).plan(manifest)


def test_an_experts_slot_gets_the_scale_that_the_layers_experts_have_in_common(tmp_path: Path) -> None:
    layout = LAYOUTS["llama-4-fp8"]
    checkpoint = read_checkpoint(layout.write(tmp_path), "tiny")
    right = load_file(tmp_path / layout.file)
    parameters = {
        name: torch.zeros(len(tensor) if tensor.ndim else E, *tensor.shape[1:], dtype=tensor.dtype)
        for name, tensor in right.items()
    }
    fill(Slots.stacked(parameters).plan(checkpoint.manifest), checkpoint)
    for name, tensor in right.items():
        whole = tensor.view(torch.uint8) if tensor.ndim else tensor.expand(E).contiguous().view(torch.uint8)
        assert torch.equal(parameters[name].view(torch.uint8), whole), name

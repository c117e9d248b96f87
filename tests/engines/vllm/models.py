"""Small models whose experts matter: weights are so large that with another expert the answer is another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

_SIZES: dict[str, Any] = {
    "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "num_experts_per_tok": 2, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
_OF: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {"num_experts": 8, "norm_topk_prob": True}),
    "deepseek_v3": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            "n_routed_experts": 8, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
            "num_key_value_heads": 4, "q_lora_rank": 96, "kv_lora_rank": 512, "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 64, "v_head_dim": 64, "head_dim": 64,
            "topk_method": "noaux_tc", "scoring_func": "sigmoid", "num_nextn_predict_layers": 0,  # as vLLM reads it
        },
    ),
}  # fmt: skip


def write_model(directory: Path, family: str) -> Path:
    """A checkpoint of 3 layers and 8 experts, bf16, with the published model's names."""
    import transformers

    config_class, model_class, more = _OF[family]
    torch.manual_seed(3333)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**{**_SIZES, **more}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.0 if "embed" in name else parameter.shape[-1] ** -0.5)
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory

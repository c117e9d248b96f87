"""Tiny models of three families, with random weights that give steady greedy answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

LAYERS, EXPERTS = 3, 8
HIDDEN, INTERMEDIATE, DENSE, VOCABULARY = 256, 128, 512, 1024
HEADS, KV_HEADS, HEAD = 4, 2, 64
LATENT = {"nope": 64, "rope": 32, "value": 64, "kv": 64, "q": 96}  # of DeepSeek's attention

COMMON: Mapping[str, Any] = {
    "torch_dtype": "bfloat16", "hidden_size": HIDDEN, "intermediate_size": DENSE,
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_experts_per_tok": 2, "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1, "attention_bias": False,
}  # fmt: skip
ROUTED: Mapping[str, Any] = {
    "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
    "routed_scaling_factor": 1.0, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0,
}  # fmt: skip
YARN = {
    "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "deepseek": {
        **ROUTED, "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "num_key_value_heads": HEADS,
        "topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1, "ep_size": 1,
        "kv_lora_rank": LATENT["kv"], "q_lora_rank": LATENT["q"], "qk_nope_head_dim": LATENT["nope"],
        "qk_rope_head_dim": LATENT["rope"], "v_head_dim": LATENT["value"], "rope_scaling": YARN,
    },
    "glm4": {
        **ROUTED, "architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD, "partial_rotary_factor": 0.5, "use_qk_norm": False,
    },
    "qwen3": {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
}  # fmt: skip


def write(directory: Path, kind: str, *, seed: int = 0, experts: int = EXPERTS, width: int = INTERMEDIATE) -> Path:
    """A checkpoint of that kind: "deepseek", "glm4" or "qwen3". Its size is that of its experts, [width, 256] each."""
    counted = "num_experts" if kind == "qwen3" else "n_routed_experts"
    config = {**COMMON, **CONFIGS[kind], counted: experts, "moe_intermediate_size": width}
    directory.mkdir(parents=True, exist_ok=True)
    tensors = _Tensors(seed)
    tensors.of_model(kind, experts, width)
    save_file(tensors.made, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "bos_token_id": 0}))
    return directory


class _Tensors:
    def __init__(self, seed: int) -> None:
        self.made: dict[str, torch.Tensor] = {}
        self._random = torch.Generator().manual_seed(seed)

    def of_model(self, kind: str, experts: int, width: int) -> None:
        self._random_of("model.embed_tokens", VOCABULARY, HIDDEN, scale=1.0)
        self._random_of("lm_head", VOCABULARY, HIDDEN)
        self._ones("model.norm", HIDDEN)
        for layer in range(LAYERS):
            stem = f"model.layers.{layer}"
            self._ones(f"{stem}.input_layernorm", HIDDEN)
            self._ones(f"{stem}.post_attention_layernorm", HIDDEN)
            (self._latent_attention if kind == "deepseek" else self._attention)(f"{stem}.self_attn")
            if kind == "qwen3":
                self._ones(f"{stem}.self_attn.q_norm", HEAD)
                self._ones(f"{stem}.self_attn.k_norm", HEAD)
            if kind != "qwen3" and layer == 0:
                self._projections(f"{stem}.mlp", DENSE)
            else:
                self._experts(f"{stem}.mlp", experts, width, is_routed=kind != "qwen3")

    def _experts(self, stem: str, experts: int, width: int, *, is_routed: bool) -> None:
        self._random_of(f"{stem}.gate", experts, HIDDEN)
        if is_routed:
            self.made[f"{stem}.gate.e_score_correction_bias"] = torch.zeros(experts)
            self._projections(f"{stem}.shared_experts", width)
        for expert in range(experts):
            self._projections(f"{stem}.experts.{expert}", width)

    def _projections(self, stem: str, width: int) -> None:
        self._random_of(f"{stem}.gate_proj", width, HIDDEN)
        self._random_of(f"{stem}.up_proj", width, HIDDEN)
        self._random_of(f"{stem}.down_proj", HIDDEN, width)

    def _attention(self, stem: str) -> None:
        self._random_of(f"{stem}.q_proj", HEADS * HEAD, HIDDEN)
        self._random_of(f"{stem}.k_proj", KV_HEADS * HEAD, HIDDEN)
        self._random_of(f"{stem}.v_proj", KV_HEADS * HEAD, HIDDEN)
        self._random_of(f"{stem}.o_proj", HIDDEN, HEADS * HEAD)

    def _latent_attention(self, stem: str) -> None:
        q, kv, nope, rope, value = (LATENT[name] for name in ("q", "kv", "nope", "rope", "value"))
        self._random_of(f"{stem}.q_a_proj", q, HIDDEN)
        self._ones(f"{stem}.q_a_layernorm", q)
        self._random_of(f"{stem}.q_b_proj", HEADS * (nope + rope), q)
        self._random_of(f"{stem}.kv_a_proj_with_mqa", kv + rope, HIDDEN)
        self._ones(f"{stem}.kv_a_layernorm", kv)
        self._random_of(f"{stem}.kv_b_proj", HEADS * (nope + value), kv)
        self._random_of(f"{stem}.o_proj", HIDDEN, HEADS * value)

    def _random_of(self, stem: str, rows: int, columns: int, scale: float | None = None) -> None:
        numbers = torch.randn(rows, columns, generator=self._random)
        self.made[f"{stem}.weight"] = (numbers * (scale or columns**-0.5)).bfloat16()

    def _ones(self, stem: str, count: int) -> None:
        self.made[f"{stem}.weight"] = torch.ones(count, dtype=torch.bfloat16)

"""How vendors lay their models' experts out: names, dtypes, shapes, configuration. Small, with odd sides.

Names are those of the published checkpoints, or what `save_pretrained` of transformers 5.23 writes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

E = 5  # experts
H, I = 7, 3  # noqa: E741 - hidden and intermediate size, as everybody calls them

Tensors = dict[str, tuple[str, tuple[int, ...]]]


def each(template: str, dtype: str, shape: tuple[int, ...]) -> Tensors:
    """`a.{0,1}.{gate,up}` → four tensors."""
    head, *parts = template.split("{")
    choices = [part.partition("}")[0].split(",") for part in parts]
    tails = [part.partition("}")[2] for part in parts]
    return {head + "".join(map("".join, zip(made, tails, strict=True))): (dtype, shape) for made in product(*choices)}


def own(prefix: str, *parts: tuple[str, str, tuple[int, ...]], experts: int = E) -> Tensors:
    """Tensors that every expert has of its own: `<prefix>.<expert>.<name>`."""
    numbers = ",".join(map(str, range(experts)))
    made: Tensors = {}
    for name, dtype, shape in parts:
        made |= each(f"{prefix}.{{{numbers}}}.{name}", dtype, shape)
    return made


def gated(suffix: str = ".weight", dtype: str = "BF16", shape: tuple[int, ...] = (I, H)) -> tuple[Any, ...]:
    return tuple((f"{name}_proj{suffix}", dtype, shape) for name in ("gate", "up", "down"))


def mixtral(suffix: str = ".weight", dtype: str = "BF16", shape: tuple[int, ...] = (I, H)) -> tuple[Any, ...]:
    return tuple((f"{name}{suffix}", dtype, shape) for name in ("w1", "w2", "w3"))


@dataclass(frozen=True)
class Layout:
    """What a checkpoint has, and what must become of it."""

    layers: dict[int, int]
    """Manifest layer → experts."""
    own: Tensors = field(default_factory=dict)
    """Of one expert each."""
    fused: Tensors = field(default_factory=dict)
    """The first axis is the expert."""
    common: Tensors = field(default_factory=dict)
    """Of all experts of a layer, the same for each."""
    dense: Tensors = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    file: str = "model.safetensors"
    config_file: str = "config.json"

    @property
    def tensors(self) -> Tensors:
        return self.own | self.fused | self.common | self.dense

    def write(self, directory: Path) -> Path:
        import torch
        from safetensors.torch import save_file

        torch.manual_seed(3333)
        directory.mkdir(parents=True, exist_ok=True)
        save_file({name: _random(*tensor) for name, tensor in self.tensors.items()}, directory / self.file)
        (directory / self.config_file).write_text(json.dumps(self.config))
        return directory


def _random(dtype: str, shape: tuple[int, ...]) -> Any:
    import torch

    types = {
        "BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16, "U8": torch.uint8, "I8": torch.int8,
        "I32": torch.int32, "F8": torch.float8_e4m3fn, "E8": torch.float8_e8m0fnu,
    }  # fmt: skip
    item = types[dtype].itemsize
    whole = torch.randint(256, (*shape[:-1], shape[-1] * item) if shape else (item,), dtype=torch.uint8)
    return whole.view(types[dtype]).reshape(shape)


DENSE = {"model.norm.weight": ("BF16", (H,)), "lm_head.weight": ("BF16", (11, H))}
BOTH = {0: E, 1: E}
L = "model.layers.{0,1}"
SHARED = {
    **each(f"{L}.mlp.shared_expert.up_proj.weight", "BF16", (I, H)),
    **each(f"{L}.mlp.gate.weight", "BF16", (E, H)),
    **DENSE,
}


def per_layer(template: str, parts: tuple[Any, ...], layers: tuple[int, ...] = (0, 1), experts: int = E) -> Tensors:
    made: Tensors = {}
    for layer in layers:
        made |= own(template.format(layer), *parts, experts=experts)
    return made


LAYOUTS: dict[str, Layout] = {
    # -- one by one ----------------------------------------------------------------------------------------------
    "qwen3": Layout(BOTH, per_layer("model.layers.{}.mlp.experts", gated()), dense=SHARED),
    "deepseek-fp8": Layout(
        BOTH, per_layer("model.layers.{}.mlp.experts", gated(dtype="F8") + gated(".weight_scale_inv", "F32", (1, 1))),
        dense={**SHARED, **each(f"{L}.mlp.gate.e_score_correction_bias", "F32", (E,))},
    ),
    "deepseek-nvfp4": Layout(
        BOTH, per_layer(
            "model.layers.{}.mlp.experts",
            gated(dtype="U8") + gated(".weight_scale", "F8") + gated(".weight_scale_2", "F32", ())
            + gated(".input_scale", "F32", ()),
        ),
    ),
    "deepseek-v4": Layout(
        BOTH, per_layer("layers.{}.ffn.experts", mixtral(dtype="I8") + mixtral(".scale", "E8", (I, 1))),
        dense=each("layers.{0,1}.ffn.{shared_experts.w1.weight,gate.bias}", "BF16", (H,)),
    ),
    "kimi-int4": Layout(
        BOTH, per_layer(
            "language_model.model.layers.{}.mlp.experts",
            gated(".weight_packed", "I32") + gated(".weight_scale") + gated(".weight_shape", "I32", (2,)),
        ),
    ),
    "gptq": Layout(
        BOTH, per_layer(
            "model.layers.{}.mlp.experts",
            gated(".qweight", "I32") + gated(".qzeros", "I32") + gated(".scales", "F16") + gated(".g_idx", "I32", (H,)),
        ),
    ),
    "minimax": Layout(
        BOTH, per_layer("model.layers.{}.block_sparse_moe.experts", mixtral()),
        dense=each(f"{L}.block_sparse_moe.{{gate.weight,e_score_correction_bias}}", "BF16", (E,)),
    ),
    "nemotron-h": Layout(
        BOTH, per_layer("backbone.layers.{}.mixer.experts", gated()[1:]),
        dense=each("backbone.layers.{0,1}.mixer.shared_experts.up_proj.weight", "BF16", (I, H)),
    ),
    "grok": Layout(
        BOTH, per_layer(
            "model.layers.{}.moe_block.experts",
            tuple((f"{name}.weight", "BF16", (I, H)) for name in ("linear", "linear_v", "linear_1")),
        ),
    ),
    "mistral-large": Layout(
        BOTH, per_layer(
            "layers.{}.experts",
            mixtral(dtype="F8") + mixtral(".qscale_weight", "F32", ()) + mixtral(".qscale_act", "F32", ()),
        ),
        dense=each("layers.{0,1}.{gate.weight,shared_experts.w1.weight}", "BF16", (H,)),
        config={"n_layers": 2, "dim": H, "moe": {"num_experts": E, "num_experts_per_tok": 2}},
        file="consolidated.safetensors", config_file="params.json",
    ),
    "qwen3-next-mtp": Layout(
        {**BOTH, 2: E}, per_layer("model.layers.{}.mlp.experts", gated()) | own("mtp.layers.0.mlp.experts", *gated()),
        dense={**SHARED, "mtp.norm.weight": ("BF16", (H,)), "mtp.layers.0.mlp.gate.weight": ("BF16", (E, H))},
    ),
    "glm-mtp-layer": Layout(
        {**BOTH, 2: E}, per_layer("model.layers.{}.mlp.experts", gated(), (0, 1, 2)), dense=SHARED,
        config={"num_hidden_layers": 2, "n_routed_experts": E, "num_nextn_predict_layers": 1},
    ),
    # -- experts that are not alike ------------------------------------------------------------------------------
    "one-expert-unquantised": Layout(
        BOTH, per_layer("model.layers.{}.mlp.experts", gated())
        | each("model.layers.1.mlp.experts.{0,1,3}.{gate,up,down}_proj.weight_scale", "F32", (I, 1)),
    ),
    "longcat": Layout(
        {0: E + 2, 1: E + 2},
        per_layer("model.layers.{}.mlp.experts", gated())
        | each(f"{L}.mlp.experts.{{5,6}}.{{gate,up}}_proj.weight", "BF16", (I, H)),
        dense=each(f"{L}.mlp.router.{{classifier.weight,e_score_correction_bias}}", "F32", (E + 2,)),
        config={"num_layers": 2, "n_routed_experts": E, "zero_expert_num": 2},
    ),
    "longcat-fused": Layout(
        {0: E + 2, 1: E + 2},
        fused=each(f"{L}.mlp.experts.gate_up_proj", "BF16", (E + 2, 2 * I, H))
        | each(f"{L}.mlp.experts.down_proj", "BF16", (E, H, I)),
        config={"num_layers": 2, "n_routed_experts": E, "zero_expert_num": 2},
    ),
    "ernie-vl": Layout(
        {0: 8, 1: 8, 2: 8},
        per_layer("model.layers.{}.mlp.experts", gated(), (0, 1, 2), 4)
        | each("model.layers.{0,1,2}.mlp.experts.{4,5,6,7}.{gate,up,down}_proj.weight", "BF16", (1, H)),
        dense=each("model.layers.{0,1,2}.mlp.{gate.weight,gate.weight_1}", "F32", (H, 4))
        | each("model.layers.{0,1,2}.mlp.moe_statics.e_score_correction_bias", "F32", (2, 4)),
        config={"text_config": {"num_hidden_layers": 3, "moe_num_experts": 4, "moe_intermediate_size": [I, 1]}},
    ),
    "ernie-vl-fused": Layout(
        {0: 4, 1: 4, 2: 4, 3: 4, 4: 4, 5: 4},
        fused=each("model.language_model.layers.{0,1,2}.mlp.text_moe.experts.{gate_up,down}_proj", "BF16", (4, I, H))
        | each("model.language_model.layers.{0,1,2}.mlp.vision_moe.experts.{gate_up,down}_proj", "BF16", (4, 1, H)),
        dense=each("model.language_model.layers.{0,1,2}.mlp.{text,vision}_moe.gate.weight", "BF16", (4, H)),
        config={"text_config": {"num_hidden_layers": 3, "moe_num_experts": 4, "moe_intermediate_size": [I, 1]}},
    ),
    "kinds-of-other-numbers": Layout(
        {0: 4, 1: 4, 2: 4, 3: 2, 4: 2, 5: 2},
        fused=each("model.layers.{0,1,2}.mlp.text_moe.experts.{gate_up,down}_proj", "BF16", (4, I, H))
        | each("model.layers.{0,1,2}.mlp.vision_moe.experts.{gate_up,down}_proj", "BF16", (2, 1, H)),
        config={"num_hidden_layers": 3, "moe_num_experts": [4, 2], "moe_intermediate_size": [I, 1]},
    ),
    "pruned-by-layer": Layout(
        {0: 3, 1: E},
        own("model.layers.0.mlp.experts", *gated(), experts=3) | own("model.layers.1.mlp.experts", *gated()),
        config={"num_hidden_layers": 2, "num_experts": [3, E]},
    ),
    "puzzle": Layout(
        {0: 3, 2: E},
        own("model.layers.0.mlp.experts", *gated(), experts=3) | own("model.layers.2.mlp.experts", *gated()),
        dense=each("model.layers.1.mlp.{up,down}_proj.weight", "BF16", (I, H)),
        config={
            "num_hidden_layers": 3,
            "block_configs": [
                {"ffn": {"moe": {"num_local_experts": 3}}}, {"ffn": {}}, {"ffn": {"moe": {"num_local_experts": E}}}
            ],
        },
    ),
    # -- fused ---------------------------------------------------------------------------------------------------
    "gpt-oss": Layout(
        BOTH,
        fused=each(f"{L}.mlp.experts.{{gate_up,down}}_proj_blocks", "U8", (E, 2 * I, 2, 16))
        | each(f"{L}.mlp.experts.{{gate_up,down}}_proj_scales", "U8", (E, 2 * I, 2))
        | each(f"{L}.mlp.experts.{{gate_up,down}}_proj_bias", "BF16", (E, 2 * I)),
        dense=each(f"{L}.mlp.router.{{weight,bias}}", "BF16", (E,)),
    ),
    "llama-4": Layout(
        BOTH,
        fused=each("language_model.model.layers.{0,1}.feed_forward.experts.{gate_up,down}_proj", "BF16", (E, H, 2 * I)),
        dense=each("language_model.model.layers.{0,1}.feed_forward.router.weight", "BF16", (E, H)),
    ),
    "llama-4-fp8": Layout(
        BOTH,
        fused=each(f"{L}.feed_forward.experts.{{gate_up,down}}_proj", "F8", (E, H, 2 * I)),
        common=each(f"{L}.feed_forward.experts.{{gate_up,down}}_proj_{{weight,input}}_scale", "F32", ()),
    ),
    "llama-4-nvfp4": Layout(
        BOTH,
        fused=each(f"{L}.feed_forward.experts.{{gate_up,down}}_proj", "U8", (E, H, I))
        | each(f"{L}.feed_forward.experts.{{gate_up,down}}_proj_weight_scale", "F8", (E, H, 1)),
        common=each(f"{L}.feed_forward.experts.{{gate_up,down}}_proj_{{weight_scale_2,input_scale}}", "F32", (1,)),
    ),
    "scale-of-a-row": Layout(
        BOTH,
        fused=each(f"{L}.mlp.experts.{{gate_up,down}}_proj", "F8", (E, 2 * I, H)),
        common=each(f"{L}.mlp.experts.{{gate_up,down}}_proj_scale", "F32", (1, 1, H)),
    ),
    "granite": Layout(
        BOTH,
        fused=each(f"{L}.block_sparse_moe.input_linear.weight", "BF16", (E, 2 * I, H))
        | each(f"{L}.block_sparse_moe.output_linear.weight", "BF16", (E, H, I)),
        dense=each(f"{L}.block_sparse_moe.router.layer.weight", "BF16", (E, H))
        | each(f"{L}.shared_mlp.{{input,output}}_linear.weight", "BF16", (I, H)),
    ),
    "step-3": Layout(
        {1: E},
        fused=each("model.layers.1.moe.{gate,up,down}_proj.weight", "F8", (E, I, H))
        | each("model.layers.1.moe.{gate,up,down}_proj.weight_scale_inv", "F32", (E, 1, 1)),
        dense=each("model.layers.1.moe.{gate.weight,router_bias}", "BF16", (E,))
        | each("model.layers.1.share_expert.up_proj.weight", "BF16", (I, H))
        | each("model.layers.0.mlp.up_proj.weight", "BF16", (I, H)),
    ),
    "aria": Layout(
        BOTH,
        fused=each("language_model.model.layers.{0,1}.mlp.experts.fc1.weight", "BF16", (E, H, 2 * I))
        | each("language_model.model.layers.{0,1}.mlp.experts.fc2.weight", "BF16", (E, I, H)),
        dense=each("language_model.model.layers.{0,1}.mlp.router.weight", "BF16", (E, H)),
    ),
    "inkling": Layout(
        BOTH,
        fused=each("model.llm.layers.{0,1}.mlp.experts.{w13,w2}_weight", "BF16", (E, 2 * I, H)),
        dense=each("model.llm.layers.{0,1}.mlp.shared_experts.shared_{w13,w2}_weight", "BF16", (1, 2 * I, H)),
    ),
    "nemo": Layout(BOTH, fused=each(f"{L}.mixer.experts.{{gate_and_up,down}}_projs", "BF16", (E, H, I))),
    "gemma-4": Layout(
        BOTH,
        fused=each(f"{L}.experts.{{gate_up,down}}_proj", "BF16", (E, 2 * I, H)),
        dense=each(f"{L}.router.{{per_expert_scale,proj.weight}}", "BF16", (E,)),
    ),
    # -- no experts' under `experts` -----------------------------------------------------------------------------
    "laguna": Layout(
        BOTH, per_layer("model.layers.{}.mlp.experts", gated()),
        dense=each(f"{L}.mlp.experts.e_score_correction_bias", "F32", (E,)),
    ),
    "beside-fused": Layout(
        BOTH,
        fused=each(f"{L}.mlp.experts.{{gate_up,down}}_proj", "BF16", (E, 2 * I, H)),
        dense=each(f"{L}.mlp.experts.{{router.weight,gate.weight}}", "BF16", (E, H))
        | each(f"{L}.mlp.experts.{{e_score_correction_bias,act_fn.alpha_p}}", "F32", (E,))
        | each(f"{L}.mlp.experts.post_expert_norm.weight", "BF16", (H,)),
    ),
    "dense-under-moe": Layout(
        {1: E}, own("model.layers.1.mlp.experts", *gated()),
        dense=each("model.layers.0.moe.{gate,up,down}_proj.weight", "BF16", (I, H)),
    ),
}  # fmt: skip

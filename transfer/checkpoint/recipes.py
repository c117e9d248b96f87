"""What real models' checkpoints consist of: tensor names, dtypes, shapes and config.json, at any size.

Attention, routers and norms are there as the models have them; vision towers only in part. Sizes are the models' own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

SIDE_STEP = 32  # scaled sides are multiples: the packed dtypes group 32 values
VOCAB_MIN = 256
FP8_BLOCK = 128  # rows and columns that share a scale
INT4_GROUP = 32  # columns that share a scale; 8 of them share an int32


class Tensor(NamedTuple):
    """A tensor to write; `content` is given where it may not be random."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    content: bytes | None = None


Tensors = Iterator[Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A model. `layers` counts all decoder layers, the `first_dense` ones without experts included.

    Of the others, every `moe_every`-th has `experts` experts with `intermediate` rows of `hidden` columns.
    """

    architecture: str
    model_type: str
    layers: int
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    dense_intermediate: int = 0
    first_dense: int = 0
    moe_every: int = 1
    q_lora: int = 0
    kv_lora: int = 0
    root: str = "model"
    lm_head: str = "lm_head.weight"
    moe: str = "mlp"
    experts_of: Callable[[Recipe, str], Tensors]
    attention: Callable[[Recipe, str, int], Tensors]
    dense_quant: str = "BF16"
    router: Mapping[str, str] = field(default_factory=lambda: {"gate.weight": "BF16"})  # name → dtype
    shared: str = ""
    extras: tuple[tuple[str, int], ...] = ()  # square dense matrices outside the decoder: name, side
    has_mtp: bool = False
    nested: str = ""
    keys: Mapping[str, str] = field(default_factory=dict)  # config.json key → field of this class
    literals: Mapping[str, Any] = field(default_factory=dict)

    def sized(self, layers: int | None, experts: int | None, scale: float) -> Recipe:
        """This model with other counts and shrunken sides; at least one layer keeps its experts if any can."""
        n_layers = self.layers if layers is None else layers
        n_experts = self.experts if experts is None else experts

        def side(n: int) -> int:
            return n if scale == 1 or n == 0 else max(SIDE_STEP, round(n * scale / SIDE_STEP) * SIDE_STEP)

        def heads(n: int) -> int:
            return max(1, round(n * scale))

        return replace(
            self,
            layers=n_layers,
            experts=n_experts,
            top_k=min(self.top_k, n_experts),
            first_dense=min(self.first_dense, n_layers - 1),
            hidden=side(self.hidden),
            intermediate=side(self.intermediate),
            dense_intermediate=side(self.dense_intermediate),
            q_lora=side(self.q_lora),
            kv_lora=side(self.kv_lora),
            vocab=max(VOCAB_MIN, side(self.vocab)),
            heads=heads(self.heads),
            kv_heads=heads(self.kv_heads),
            extras=tuple((name, side(n)) for name, n in self.extras),
        )

    def has_experts(self, layer: int) -> bool:
        return layer >= self.first_dense and (layer + 1) % self.moe_every == 0

    def tensors(self) -> Tensors:
        """Every tensor, in the order that a model has them."""
        yield Tensor(f"{self.root}.embed_tokens.weight", "BF16", (self.vocab, self.hidden))
        for layer in range(self.layers):
            yield from self._layer(f"{self.root}.layers.{layer}", layer)
        yield Tensor(f"{self.root}.norm.weight", "BF16", (self.hidden,))
        yield Tensor(self.lm_head, "BF16", (self.vocab, self.hidden))
        for name, n in self.extras:
            yield Tensor(name, "BF16", (n, n))
        if self.has_mtp:
            yield from self._mtp()

    def _layer(self, prefix: str, layer: int) -> Tensors:
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield Tensor(f"{prefix}.{norm}.weight", "BF16", (self.hidden,))
        yield from self.attention(self, prefix, layer)
        if not self.has_experts(layer):
            yield from self._gated(f"{prefix}.{self.moe}", self.dense_intermediate)
            return
        yield from self.experts_of(self, f"{prefix}.{self.moe}.experts")
        yield from self._beside_experts(f"{prefix}.{self.moe}")

    def _beside_experts(self, prefix: str) -> Tensors:
        for name, dtype in self.router.items():
            yield Tensor(f"{prefix}.{name}", dtype, (self.experts, *([self.hidden] if "weight" in name else [])))
        if self.shared:
            yield from self._gated(f"{prefix}.{self.shared}", self.intermediate)

    def _gated(self, prefix: str, rows: int) -> Tensors:
        for name in ("gate_proj", "up_proj"):
            yield from linear(f"{prefix}.{name}", rows, self.hidden, self.dense_quant)
        yield from linear(f"{prefix}.down_proj", self.hidden, rows, self.dense_quant)

    def _mtp(self) -> Tensors:
        """A layer that predicts one token more, in a stack of its own, its experts one by one."""
        yield Tensor("mtp.fc.weight", "BF16", (self.hidden, 2 * self.hidden))
        yield from grouped_query(self, "mtp.layers.0", 3)
        yield from gate_up_down("BF16")(self, "mtp.layers.0.mlp.experts")
        yield from self._beside_experts("mtp.layers.0.mlp")
        yield Tensor("mtp.norm.weight", "BF16", (self.hidden,))

    def config(self) -> dict[str, Any]:
        """config.json."""
        sizes: dict[str, Any] = {
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "num_experts_per_tok": self.top_k,
            **{key: getattr(self, name) for key, name in self.keys.items()},
            **self.literals,
        }
        top = {"architectures": [self.architecture], "model_type": self.model_type, "torch_dtype": "bfloat16"}
        if self.nested:
            return {**top, self.nested: {"model_type": f"{self.model_type}_text", **sizes}}
        return {**top, **sizes}


# -- linear layers ---------------------------------------------------------------------------------------------


def linear(name: str, rows: int, cols: int, quant: str) -> Tensors:
    """A matrix as it is stored: BF16, block fp8 with float32 scales, or int4 packed into int32."""
    if quant == "FP8":
        yield Tensor(f"{name}.weight", "F8_E4M3", (rows, cols))
        yield Tensor(f"{name}.weight_scale_inv", "F32", (-(-rows // FP8_BLOCK), -(-cols // FP8_BLOCK)))
    elif quant == "INT4":
        yield Tensor(f"{name}.weight_packed", "I32", (rows, cols // 8))
        yield Tensor(f"{name}.weight_scale", "BF16", (rows, cols // INT4_GROUP))
        yield Tensor(f"{name}.weight_shape", "I32", (2,), rows.to_bytes(4, "little") + cols.to_bytes(4, "little"))
    else:
        yield Tensor(f"{name}.weight", quant, (rows, cols))


# -- experts ---------------------------------------------------------------------------------------------------


def _one_by_one(gate: str, up: str, down: str, quant: str) -> Callable[[Recipe, str], Tensors]:
    def experts_of(recipe: Recipe, prefix: str) -> Tensors:
        for expert in range(recipe.experts):
            yield from linear(f"{prefix}.{expert}.{gate}", recipe.intermediate, recipe.hidden, quant)
            yield from linear(f"{prefix}.{expert}.{up}", recipe.intermediate, recipe.hidden, quant)
            yield from linear(f"{prefix}.{expert}.{down}", recipe.hidden, recipe.intermediate, quant)

    return experts_of


def gate_up_down(quant: str) -> Callable[[Recipe, str], Tensors]:
    return _one_by_one("gate_proj", "up_proj", "down_proj", quant)


def w1_w2_w3(quant: str) -> Callable[[Recipe, str], Tensors]:
    return _one_by_one("w1", "w3", "w2", quant)


def fused_rows(recipe: Recipe, prefix: str) -> Tensors:
    """Output rows first, as Qwen3.5 has them."""
    yield Tensor(f"{prefix}.gate_up_proj", "BF16", (recipe.experts, 2 * recipe.intermediate, recipe.hidden))
    yield Tensor(f"{prefix}.down_proj", "BF16", (recipe.experts, recipe.hidden, recipe.intermediate))


def fused_columns(recipe: Recipe, prefix: str) -> Tensors:
    """Input rows first, as Llama-4 has them."""
    yield Tensor(f"{prefix}.gate_up_proj", "BF16", (recipe.experts, recipe.hidden, 2 * recipe.intermediate))
    yield Tensor(f"{prefix}.down_proj", "BF16", (recipe.experts, recipe.intermediate, recipe.hidden))


def fused_mxfp4(recipe: Recipe, prefix: str) -> Tensors:
    """Blocks of 32 four-bit values, 16 bytes, with one scale byte each, as gpt-oss has them."""
    for name, rows, cols in (
        ("gate_up_proj", 2 * recipe.intermediate, recipe.hidden),
        ("down_proj", recipe.hidden, recipe.intermediate),
    ):
        yield Tensor(f"{prefix}.{name}_blocks", "U8", (recipe.experts, rows, cols // 32, 16))
        yield Tensor(f"{prefix}.{name}_scales", "U8", (recipe.experts, rows, cols // 32))
        yield Tensor(f"{prefix}.{name}_bias", "BF16", (recipe.experts, rows))


# -- attention -------------------------------------------------------------------------------------------------

NOPE_DIM, ROPE_DIM, V_DIM = 128, 64, 128  # of a head of latent attention


def latent(recipe: Recipe, prefix: str, layer: int) -> Tensors:
    """DeepSeek's multi-head latent attention."""
    at, quant = f"{prefix}.self_attn", recipe.dense_quant
    yield from linear(f"{at}.q_a_proj", recipe.q_lora, recipe.hidden, quant)
    yield Tensor(f"{at}.q_a_layernorm.weight", "BF16", (recipe.q_lora,))
    yield from linear(f"{at}.q_b_proj", recipe.heads * (NOPE_DIM + ROPE_DIM), recipe.q_lora, quant)
    yield from linear(f"{at}.kv_a_proj_with_mqa", recipe.kv_lora + ROPE_DIM, recipe.hidden, quant)
    yield Tensor(f"{at}.kv_a_layernorm.weight", "BF16", (recipe.kv_lora,))
    yield from linear(f"{at}.kv_b_proj", recipe.heads * (NOPE_DIM + V_DIM), recipe.kv_lora, quant)
    yield from linear(f"{at}.o_proj", recipe.hidden, recipe.heads * V_DIM, quant)


def grouped_query(recipe: Recipe, prefix: str, layer: int) -> Tensors:
    at, quant = f"{prefix}.self_attn", recipe.dense_quant
    for name, heads in (("q_proj", recipe.heads), ("k_proj", recipe.kv_heads), ("v_proj", recipe.kv_heads)):
        yield from linear(f"{at}.{name}", heads * recipe.head_dim, recipe.hidden, quant)
    yield from linear(f"{at}.o_proj", recipe.hidden, recipe.heads * recipe.head_dim, quant)


def normed_query(recipe: Recipe, prefix: str, layer: int) -> Tensors:
    yield from grouped_query(recipe, prefix, layer)
    for name in ("q_norm", "k_norm"):
        yield Tensor(f"{prefix}.self_attn.{name}.weight", "BF16", (recipe.head_dim,))


def sink_query(recipe: Recipe, prefix: str, layer: int) -> Tensors:
    """gpt-oss's: biases, and a sink for each head."""
    yield from grouped_query(recipe, prefix, layer)
    at = f"{prefix}.self_attn"
    for name, heads in (("q_proj", recipe.heads), ("k_proj", recipe.kv_heads), ("v_proj", recipe.kv_heads)):
        yield Tensor(f"{at}.{name}.bias", "BF16", (heads * recipe.head_dim,))
    yield Tensor(f"{at}.o_proj.bias", "BF16", (recipe.hidden,))
    yield Tensor(f"{at}.sinks", "BF16", (recipe.heads,))


def mostly_linear(recipe: Recipe, prefix: str, layer: int) -> Tensors:
    """Qwen3.5's: three layers with a gated delta net, then one with attention."""
    if layer % 4 == 3:
        yield from normed_query(recipe, prefix, layer)
        return
    at, inner = f"{prefix}.linear_attn", recipe.heads * recipe.head_dim
    yield Tensor(f"{at}.in_proj_qkv.weight", "BF16", (2 * inner, recipe.hidden))
    yield Tensor(f"{at}.in_proj_z.weight", "BF16", (inner, recipe.hidden))
    yield Tensor(f"{at}.conv1d.weight", "BF16", (2 * inner, 1, 4))
    yield Tensor(f"{at}.A_log", "F32", (recipe.heads,))
    yield Tensor(f"{at}.dt_bias", "BF16", (recipe.heads,))
    yield Tensor(f"{at}.out_proj.weight", "BF16", (recipe.hidden, inner))


# -- models ----------------------------------------------------------------------------------------------------

_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
_INT4 = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
_DEEPSEEK_KEYS = {
    "intermediate_size": "dense_intermediate",
    "moe_intermediate_size": "intermediate",
    "n_routed_experts": "experts",
    "first_k_dense_replace": "first_dense",
    "q_lora_rank": "q_lora",
    "kv_lora_rank": "kv_lora",
}
_DEEPSEEK_LITERALS = {
    "n_shared_experts": 1, "num_nextn_predict_layers": 0, "qk_nope_head_dim": NOPE_DIM, "qk_rope_head_dim": ROPE_DIM,
    "v_head_dim": V_DIM,
}  # fmt: skip
_QWEN_KEYS = {
    "num_experts": "experts",
    "moe_intermediate_size": "intermediate",
    "intermediate_size": "dense_intermediate",
}

_DEEPSEEK_V3 = Recipe(
    architecture="DeepseekV3ForCausalLM", model_type="deepseek_v3", layers=61, experts=256, top_k=8, hidden=7168,
    intermediate=2048, dense_intermediate=18432, first_dense=3, vocab=129280, heads=128, kv_heads=128, head_dim=192,
    q_lora=1536, kv_lora=512, experts_of=gate_up_down("FP8"), attention=latent, dense_quant="FP8",
    router={"gate.weight": "BF16", "gate.e_score_correction_bias": "F32"}, shared="shared_experts",
    keys=_DEEPSEEK_KEYS, literals={**_DEEPSEEK_LITERALS, "quantization_config": _FP8},
)  # fmt: skip
_KIMI_K2 = replace(_DEEPSEEK_V3, model_type="kimi_k2", experts=384, first_dense=1, vocab=163840, heads=64, kv_heads=64)
_QWEN3_30B = Recipe(
    architecture="Qwen3MoeForCausalLM", model_type="qwen3_moe", layers=48, experts=128, top_k=8, hidden=2048,
    intermediate=768, dense_intermediate=6144, vocab=151936, heads=32, kv_heads=4, head_dim=128,
    experts_of=gate_up_down("BF16"), attention=normed_query, keys=_QWEN_KEYS,
    literals={"decoder_sparse_step": 1, "mlp_only_layers": []},
)  # fmt: skip

FAMILIES: Mapping[str, Recipe] = {
    "deepseek-v3": _DEEPSEEK_V3,
    "kimi-k2": _KIMI_K2,
    "kimi-k2-thinking": replace(
        _KIMI_K2, experts_of=gate_up_down("INT4"), dense_quant="BF16",
        literals={**_DEEPSEEK_LITERALS, "quantization_config": _INT4},
    ),
    "qwen3-235b-a22b": replace(
        _QWEN3_30B, layers=94, hidden=4096, intermediate=1536, dense_intermediate=12288, heads=64
    ),
    "qwen3-30b-a3b": _QWEN3_30B,
    "qwen3.5": Recipe(
        architecture="Qwen3_5MoeForConditionalGeneration", model_type="qwen3_5_moe", layers=60, experts=512, top_k=10,
        hidden=4096, intermediate=1024, vocab=248320, heads=32, kv_heads=2, head_dim=256, root="model.language_model",
        experts_of=fused_rows, attention=mostly_linear, shared="shared_expert", has_mtp=True, nested="text_config",
        extras=(("model.visual.blocks.0.attn.proj.weight", 1152), ("model.visual.blocks.1.attn.proj.weight", 1152)),
        keys={"num_experts": "experts", "moe_intermediate_size": "intermediate"},
        literals={"full_attention_interval": 4, "mtp_num_hidden_layers": 1},
    ),
    "glm-4.5": Recipe(
        architecture="Glm4MoeForCausalLM", model_type="glm4_moe", layers=92, experts=160, top_k=8, hidden=5120,
        intermediate=1536, dense_intermediate=12288, first_dense=3, vocab=151552, heads=96, kv_heads=8, head_dim=128,
        experts_of=gate_up_down("BF16"), attention=normed_query, shared="shared_experts",
        router={"gate.weight": "BF16", "gate.e_score_correction_bias": "F32"},
        keys={key: _DEEPSEEK_KEYS[key] for key in list(_DEEPSEEK_KEYS)[:4]},
        literals={"n_shared_experts": 1, "num_nextn_predict_layers": 0},
    ),
    "mixtral-8x7b": Recipe(
        architecture="MixtralForCausalLM", model_type="mixtral", layers=32, experts=8, top_k=2, hidden=4096,
        intermediate=14336, vocab=32000, heads=32, kv_heads=8, head_dim=128, moe="block_sparse_moe",
        experts_of=w1_w2_w3("BF16"), attention=grouped_query,
        keys={"num_local_experts": "experts", "intermediate_size": "intermediate"},
    ),
    "minimax-m2": Recipe(
        architecture="MiniMaxM2ForCausalLM", model_type="minimax_m2", layers=62, experts=256, top_k=8, hidden=3072,
        intermediate=1536, vocab=200064, heads=48, kv_heads=8, head_dim=128, moe="block_sparse_moe",
        experts_of=w1_w2_w3("FP8"), attention=normed_query, dense_quant="FP8",
        router={"gate.weight": "BF16", "e_score_correction_bias": "F32"},
        keys={"num_local_experts": "experts", "intermediate_size": "intermediate"},
        literals={"quantization_config": _FP8},
    ),
    "gpt-oss-120b": Recipe(
        architecture="GptOssForCausalLM", model_type="gpt_oss", layers=36, experts=128, top_k=4, hidden=2880,
        intermediate=2880, vocab=201088, heads=64, kv_heads=8, head_dim=64, experts_of=fused_mxfp4,
        attention=sink_query, router={"router.weight": "BF16", "router.bias": "BF16"},
        keys={"num_local_experts": "experts", "intermediate_size": "intermediate"},
        literals={"quantization_config": {"quant_method": "mxfp4"}},
    ),
    "llama-4": Recipe(
        architecture="Llama4ForConditionalGeneration", model_type="llama4", layers=48, experts=128, top_k=1,
        hidden=5120, intermediate=8192, dense_intermediate=16384, moe_every=2, vocab=202048, heads=40, kv_heads=8,
        head_dim=128, root="language_model.model", lm_head="language_model.lm_head.weight", moe="feed_forward",
        experts_of=fused_columns, attention=grouped_query, router={"router.weight": "BF16"}, shared="shared_expert",
        nested="text_config",
        extras=(("vision_model.model.layers.0.self_attn.q_proj.weight", 1408),
                ("multi_modal_projector.linear_1.weight", 4096)),
        keys={"num_local_experts": "experts", "intermediate_size": "intermediate",
              "intermediate_size_mlp": "dense_intermediate"},
        literals={"interleave_moe_layer_step": 2},
    ),
}  # fmt: skip
"""Models to write after, by name. Qwen3.5 is the 397B-A17B, Llama-4 the Maverick."""

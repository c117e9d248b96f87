"""Small checkpoints as the transformers library writes them, made once a session; and real nodes that serve them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.processes import wait_until
from tests.transfer.kept import Kept

_COMMON = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 64, "num_experts_per_tok": 2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_ROUTED = {
    "moe_intermediate_size": 24, "n_routed_experts": 6, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}  # fmt: skip
_LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "num_experts": 5,
}  # fmt: skip
_LATENT = {
    "num_key_value_heads": 4, "head_dim": 8, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
_VISION = {
    "hidden_size": 32, "intermediate_size": 40, "depth": 2, "num_heads": 2, "out_hidden_size": 48,
    "num_position_embeddings": 16, "deepstack_visual_indexes": [],
}  # fmt: skip
_TOWERS = {
    "step3p7": {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4},
    "ernie4_5_vl_moe": {
        "hidden_size": 32, "intermediate_size": 40, "depth": 1, "num_heads": 2, "in_channels": 3, "patch_size": 4,
    },
}  # fmt: skip

# name → (config class, model class, arguments)
TINY: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {"moe_intermediate_size": 40, "num_experts": 5}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 5}),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", {**_ROUTED, **_LATENT}),
    "glm4_moe": ("Glm4MoeConfig", "Glm4MoeForCausalLM", _ROUTED),
    "minimax_m2": ("MiniMaxM2Config", "MiniMaxM2ForCausalLM", {"num_local_experts": 5}),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", {"num_local_experts": 5}),
    "llama4": (
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {"intermediate_size_mlp": 40, "num_local_experts": 5, "interleave_moe_layer_step": 2},
    ),
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextForCausalLM", _LINEAR),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", _LINEAR),
    "granitemoe": ("GraniteMoeConfig", "GraniteMoeForCausalLM", {"num_local_experts": 5}),
    "aria_text": ("AriaTextConfig", "AriaTextForCausalLM", {"moe_num_experts": 5}),
    "laguna": (
        "LagunaConfig",
        "LagunaForCausalLM",
        {"num_experts": 5, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    ),
    "longcat_flash": (
        "LongcatFlashConfig",
        "LongcatFlashForCausalLM",
        {
            **_LATENT,
            "num_layers": 2,
            "ffn_hidden_size": 56,
            "expert_ffn_hidden_size": 24,
            "n_routed_experts": 6,
            "zero_expert_num": 2,
        },
    ),
    "step3p7": (
        "Step3p7Config",
        "Step3p7ForConditionalGeneration",
        {**_ROUTED, "share_expert_dim": 40, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    ),
    "ernie4_5_vl_moe": (
        "Ernie4_5_VLMoeConfig",
        "Ernie4_5_VLMoeForConditionalGeneration",
        {
            "hidden_size": 256,
            "num_attention_heads": 2,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": [24, 12],
            "head_dim": 128,
        },
    ),
    "jetmoe": ("JetMoeConfig", "JetMoeForCausalLM", {"num_key_value_heads": 4, "num_local_experts": 5}),
    "nllb_moe": (
        "NllbMoeConfig",
        "NllbMoeForConditionalGeneration",
        {
            "d_model": 48,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "num_experts": 3,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 56,
            "decoder_ffn_dim": 56,
            "encoder_sparse_step": 2,
            "decoder_sparse_step": 2,
        },
    ),
    "switch_transformers": (
        "SwitchTransformersConfig",
        "SwitchTransformersForConditionalGeneration",
        {
            "d_model": 48,
            "d_kv": 12,
            "d_ff": 56,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_heads": 4,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "num_experts": 3,
        },
    ),
    "dbrx": (
        "DbrxConfig",
        "DbrxForCausalLM",
        {
            "d_model": 48,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 56, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 48},
        },
    ),
    "qwen3_5_moe_vision": ("Qwen3_5MoeConfig", "Qwen3_5MoeForConditionalGeneration", _LINEAR),
}

TinyCheckpoint = Callable[..., Path]


def _model(name: str) -> Any:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config_class, model_class, arguments = TINY[name]
    if not hasattr(transformers, model_class):
        pytest.skip(f"this transformers has no {model_class}")
    settings: dict[str, Any] = {**_COMMON, **arguments}
    if name == "dbrx":
        settings = {"vocab_size": 97, **arguments}
    if name in ("step3p7", "ernie4_5_vl_moe"):
        settings = {"text_config": settings, "vision_config": _TOWERS[name]}
    if name.endswith("_vision"):
        settings = {"text_config": settings, "vision_config": _VISION}
    torch.manual_seed(3333)
    return getattr(transformers, model_class)(getattr(transformers, config_class)(**settings)).to(torch.bfloat16)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    """`tiny_checkpoint(name, is_fused=…, is_sharded=…)` → directory.

    The library keeps experts fused in memory; `is_fused` saves them so, otherwise with the published model's names.
    """
    made: dict[tuple[str, bool, bool], Path] = {}

    def save(name: str, *, is_fused: bool = False, is_sharded: bool = False) -> Path:
        key = (name, is_fused, is_sharded)
        if key not in made:
            directory = tmp_path_factory.mktemp(name)
            size = {"max_shard_size": "30KB"} if is_sharded else {}
            _model(name).save_pretrained(directory, save_original_format=not is_fused, **size)
            made[key] = directory
        return made[key]

    return save


@pytest.fixture(scope="session")
def tiny_qwen3_moe(tiny_checkpoint: TinyCheckpoint) -> Path:
    """One file, per-expert gate/up/down: 3 layers of 5 experts."""
    return tiny_checkpoint("qwen3_moe")


@pytest.fixture(scope="session")
def tiny_mixtral(tiny_checkpoint: TinyCheckpoint) -> Path:
    """One file, per-expert w1/w2/w3: 3 layers of 5 experts."""
    return tiny_checkpoint("mixtral")


@pytest.fixture(scope="session")
def tiny_deepseek_v3(tiny_checkpoint: TinyCheckpoint) -> Path:
    """Several files with an index: a dense layer, then 2 of 6 experts and a shared one."""
    return tiny_checkpoint("deepseek_v3", is_sharded=True)


@pytest.fixture(scope="session")
def tiny_gpt_oss(tiny_checkpoint: TinyCheckpoint) -> Path:
    """One file, fused with biases: 3 layers of 5 experts."""
    return tiny_checkpoint("gpt_oss")


class Cluster:
    """Nodes of one model on this machine that know what each has. `start(number)` starts one, and returns at once."""

    def __init__(self, start: Callable[[int], Any], count: int, replicas: int, segment: Callable[[str], Path]) -> None:
        self._start, self._segment = start, segment
        self._nodes = [start(number) for number in range(count)]
        for node in self._nodes:
            node.wait_ready()
        for node in self._nodes:
            wait_until(lambda node=node: _is_covered(node, replicas), f"{node.node_id} knows what every node has")

    @property
    def urls(self) -> list[str]:
        return [node.url for node in self._nodes]

    def segment(self, number: int) -> Path:
        return self._segment(self._nodes[number].node_id)

    def kill(self, number: int) -> None:
        self._nodes[number].kill()

    def start_again(self, number: int) -> None:
        self._nodes[number] = self._start(number).wait_ready()

    def pause(self, number: int) -> None:
        self._nodes[number].pause()

    def resume(self, number: int) -> None:
        self._nodes[number].resume()

    def wait_ready(self, number: int) -> None:
        self._nodes[number].wait_ready()


def _is_covered(node: Any, replicas: int) -> bool:
    total = node.get("/v1/coverage")["total"]
    return bool(total["by_replicas"].get(str(replicas)) == total["blocks"])


@pytest.fixture
def cluster(
    serve: Callable[..., Any], free_port: Callable[[], int], namespace: str, segment_path: Callable[..., Path]
) -> Callable[..., Cluster]:
    """`cluster(model, checkpoint, count=3, replicas=2, option=…)` → ready nodes; killed and removed at the end."""

    def make(model: str, checkpoint: Path, count: int = 3, replicas: int = 2, **options: Any) -> Cluster:
        ports = {f"node-{number}": free_port() for number in range(count)}
        engines = {name: value for name, value in os.environ.items() if name.startswith("MC_")}

        def start(number: int) -> Any:
            options.update(checkpoint=checkpoint, model=model, fill="disk", replicas=replicas, env=engines)
            return serve(f"node-{number}", ports, **options)

        return Cluster(start, count, replicas, lambda node: segment_path(namespace, node, model))

    return make


@pytest.fixture
def keep() -> Iterator[Callable[..., Kept]]:
    """`keep(directory, include, rows=…)` → its segment, with the blocks of those manifest rows."""
    made: list[Kept] = []

    def make(directory: Path, include: str = "all", rows: Callable[[int], bool] = lambda row: True) -> Kept:
        made.append(Kept(directory, include, rows))
        return made[-1]

    yield make
    for kept in made:
        kept.segment.unlink()


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A checkpoint's directory, its weights taken away."""
    directory = tmp_path / "bare"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    return directory

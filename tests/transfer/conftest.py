"""Small checkpoints as the transformers library writes them, made once a session; and real nodes that serve them."""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shm.layout import SegmentName

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
    """`hotspare serve` processes of one model on this machine, in a namespace of their own."""

    def __init__(self, model: str, checkpoint: Path, directory: Path, count: int, replicas: int) -> None:
        self.model = model
        self.namespace = f"test-{secrets.token_hex(6)}"
        ports = _free_ports(count)
        self.urls = [f"http://127.0.0.1:{port}" for port in ports]
        self.names = [f"node-{number}" for number in range(count)]
        self._directory = directory
        self._arguments = [
            ["--model", model, "--checkpoint", str(checkpoint), "--namespace", self.namespace, "--fill", "disk",
             "--replicas", str(replicas), "--node-id", name, "--listen", url.removeprefix("http://"),
             *(f"--peer={n}={u}" for n, u in zip(self.names, self.urls, strict=True) if n != name)]
            for name, url in zip(self.names, self.urls, strict=True)
        ]  # fmt: skip
        self.processes = [self._spawn(number) for number in range(count)]
        try:
            for number in range(count):
                self.wait(number, "/readyz")
            for number in range(count):
                self.wait(
                    number,
                    "/v1/coverage",
                    lambda d: d["total"]["by_replicas"].get(str(replicas)) == d["total"]["blocks"],
                )
        except BaseException:
            self.close()
            raise

    def _spawn(self, number: int) -> subprocess.Popen[bytes]:
        with (self._directory / f"{self.names[number]}.log").open("ab") as log:
            command = [sys.executable, "-m", "app.cli", "serve", *self._arguments[number]]
            return subprocess.Popen(command, stdout=log, stderr=log)

    def wait(self, number: int, path: str, holds: Callable[[Any], bool] = lambda _: True) -> None:
        deadline = time.monotonic() + 40
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), urllib.request.urlopen(self.urls[number] + path, timeout=5) as answer:
                if holds(json.load(answer)):
                    return
            assert self.processes[number].poll() is None, self._log(number)
            time.sleep(0.02)
        raise AssertionError(f"{path} of {self.names[number]} did not come true: {self._log(number)}")

    def _log(self, number: int) -> str:
        return (self._directory / f"{self.names[number]}.log").read_text()[-2000:]

    def segment(self, number: int) -> str:
        """The path of a node's segment."""
        return f"/dev/shm/{SegmentName(self.namespace, self.model, self.names[number]).object_name}"

    def kill(self, number: int) -> None:
        self.processes[number].kill()
        self.processes[number].wait()

    def start_again(self, number: int) -> None:
        self.processes[number] = self._spawn(number)
        self.wait(number, "/readyz")

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        for number in range(len(self.names)):
            Path(self.segment(number)).unlink(missing_ok=True)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    """`cluster(model, checkpoint, count=3, replicas=2)` → nodes that are ready; killed and removed at the end."""
    started: list[Cluster] = []

    def start(model: str, checkpoint: Path, count: int = 3, replicas: int = 2) -> Cluster:
        started.append(Cluster(model, checkpoint, tmp_path, count, replicas))
        return started[-1]

    yield start
    for one in started:
        one.close()

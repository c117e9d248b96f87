"""Real checkpoints, written by the transformers library, come out whole."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash
from safetensors import safe_open

from shm.block import DENSE, ExpertKey
from shm.errors import InvalidInput
from shm.manifest import Manifest
from transfer.checkpoint import Checkpoint, changed_files, read_checkpoint
from transfer.checkpoint.recipes import FAMILIES
from transfer.checkpoint.synth import SynthPlan, plan_checkpoint

TinyCheckpoint = Callable[..., Path]

PER_EXPERT = {
    "qwen3_moe": "gate-up-down", "mixtral": "w1-w2-w3", "deepseek_v3": "gate-up-down", "glm4_moe": "gate-up-down",
    "minimax_m2": "w1-w2-w3", "qwen3_next": "gate-up-down", "qwen3_5_moe": "gate-up-down",
}  # fmt: skip
ALWAYS_FUSED = ("gpt_oss", "llama4")


def stored_bytes(directory: Path) -> dict[str, bytes]:
    """Every tensor's bytes, as the safetensors library loads them; fused ones by expert, as `<name>[e]`."""
    import torch

    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                tensor = file.get_tensor(name)
                if re.search(r"\.experts\.[a-z]", name):
                    parts = {f"{name}[{e}]": part for e, part in enumerate(tensor)}
                else:
                    parts = {name: tensor}
                for part_name, part in parts.items():
                    found[part_name] = part.contiguous().view(torch.uint8).numpy().tobytes()
    return found


def kept_bytes(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Every tensor of the manifest, read from the file ranges it gives."""
    found: dict[str, bytes] = {}
    for index in range(len(checkpoint.manifest)):
        for tensor in checkpoint.manifest.block(index).tensors:
            with checkpoint.path(tensor.file).open("rb") as stream:
                stream.seek(tensor.file_offset)
                assert tensor.name not in found
                found[tensor.name] = stream.read(tensor.nbytes)
    return found


def expert_keys(manifest: Manifest) -> list[ExpertKey]:
    return [key for key in manifest.keys if key.is_expert]


def write_sparse(directory: Path, plan: SynthPlan) -> Path:
    """The plan's headers, with holes for data: as large as the real model, and takes no space."""
    directory.mkdir()
    for file in plan.files:
        with (directory / file.name).open("wb") as stream:
            stream.write(file.header)
            stream.truncate(file.nbytes)
    if plan.index is not None:
        (directory / "model.safetensors.index.json").write_text(json.dumps(plan.index))
    (directory / "config.json").write_text(json.dumps(plan.config))
    return directory


# -- what the transformers library writes ----------------------------------------------------------------------


@pytest.mark.parametrize("is_sharded", [False, True], ids=["one-file", "sharded"])
@pytest.mark.parametrize(
    ("name", "is_fused", "family"),
    [
        *((name, False, family) for name, family in PER_EXPERT.items()),
        *((name, True, "fused") for name in (*PER_EXPERT, *ALWAYS_FUSED)),
        ("qwen3_5_moe_vision", True, "fused"),
    ],
)
def test_every_expert_tensor_has_its_bytes(
    tiny_checkpoint: TinyCheckpoint, name: str, is_fused: bool, is_sharded: bool, family: str
) -> None:
    directory = tiny_checkpoint(name, is_fused=is_fused, is_sharded=is_sharded)
    assert (len(list(directory.glob("*.safetensors"))) > 1) is is_sharded
    checkpoint = read_checkpoint(directory, name)
    expected = {k: v for k, v in stored_bytes(directory).items() if ".experts." in k}
    assert kept_bytes(checkpoint) == expected
    assert checkpoint.manifest.family == family
    assert expert_keys(checkpoint.manifest) == list(checkpoint.manifest.keys)


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "llama4", "qwen3_5_moe_vision"])
def test_include_all_keeps_every_tensor_once(tiny_checkpoint: TinyCheckpoint, name: str) -> None:
    directory = tiny_checkpoint(name, is_fused=True, is_sharded=True)
    assert kept_bytes(read_checkpoint(directory, name, "all")) == stored_bytes(directory)


def test_names_lead_back_to_blocks(tiny_checkpoint: TinyCheckpoint) -> None:
    for name in ("deepseek_v3", "gpt_oss"):
        manifest = read_checkpoint(tiny_checkpoint(name), name, "all").manifest
        for index in range(len(manifest)):
            assert [manifest.find(tensor)[0] for tensor in manifest.tensor_names(index)] == [index] * len(
                manifest.schema(index).tensors
            )


def test_layers_and_experts_are_the_models_own(tiny_deepseek_v3: Path, tiny_checkpoint: TinyCheckpoint) -> None:
    manifest = read_checkpoint(tiny_deepseek_v3, "m").manifest
    assert expert_keys(manifest) == [ExpertKey(layer, e) for layer in (1, 2) for e in range(6)]
    manifest = read_checkpoint(tiny_checkpoint("llama4"), "m").manifest
    assert expert_keys(manifest) == [ExpertKey(1, e) for e in range(5)]


def test_shared_experts_and_routers_are_dense(tiny_deepseek_v3: Path) -> None:
    manifest = read_checkpoint(tiny_deepseek_v3, "m", "all").manifest
    dense = set(manifest.tensor_names(manifest.index(2, DENSE)))
    assert {
        "model.layers.2.mlp.shared_experts.up_proj.weight",
        "model.layers.2.mlp.gate.weight",
        "model.layers.2.mlp.gate.e_score_correction_bias",
        "model.layers.2.self_attn.o_proj.weight",
    } <= dense
    assert not any(".experts." in name for name in dense)
    outside = set(manifest.tensor_names(manifest.index(DENSE, DENSE)))
    assert outside == {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"}


def test_a_vision_tower_belongs_to_no_layer(tiny_checkpoint: TinyCheckpoint) -> None:
    manifest = read_checkpoint(tiny_checkpoint("qwen3_5_moe_vision", is_fused=True), "m", "all").manifest
    outside = list(manifest.tensor_names(manifest.index(DENSE, DENSE)))
    assert any(".visual.blocks.1." in name for name in outside)
    assert not any(".visual." in name for name in manifest.tensor_names(manifest.index(1, DENSE)))


# -- what a manifest says of the files -------------------------------------------------------------------------


def test_files_are_sorted_and_carry_the_digest_of_length_and_header(tiny_deepseek_v3: Path) -> None:
    manifest = read_checkpoint(tiny_deepseek_v3, "m").manifest
    assert [file.name for file in manifest.files] == sorted(
        path.name for path in tiny_deepseek_v3.glob("*.safetensors")
    )
    for file in manifest.files:
        data = (tiny_deepseek_v3 / file.name).read_bytes()
        header = data[: 8 + int.from_bytes(data[:8], "little")]
        assert (file.nbytes, file.header_digest) == (len(data), xxhash.xxh3_128_hexdigest(header))


def test_the_same_checkpoint_elsewhere_has_the_same_digest(tiny_deepseek_v3: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_deepseek_v3, tmp_path / "copy")
    one, two = read_checkpoint(tiny_deepseek_v3, "m").manifest, read_checkpoint(str(copy), "m").manifest
    assert one.digest == two.digest
    assert one.digest != read_checkpoint(copy, "m", "all").manifest.digest


def test_a_snapshot_of_symbolic_links_is_followed(tiny_deepseek_v3: Path, tmp_path: Path) -> None:
    for path in tiny_deepseek_v3.iterdir():
        (tmp_path / path.name).symlink_to(path)
    assert read_checkpoint(tmp_path, "m").manifest == read_checkpoint(tiny_deepseek_v3, "m").manifest


def test_a_single_file_may_have_any_name_and_no_config(tiny_qwen3_moe: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_qwen3_moe / "model.safetensors", tmp_path / "weights-0.safetensors")
    manifest = read_checkpoint(tmp_path, "m").manifest
    assert ([file.name for file in manifest.files], len(manifest)) == (["weights-0.safetensors"], 15)


def test_files_that_the_index_does_not_name_are_left_alone(tiny_deepseek_v3: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_deepseek_v3, tmp_path / "copy")
    (copy / "consolidated.safetensors").write_bytes(b"not even a header")
    assert read_checkpoint(copy, "m").manifest == read_checkpoint(tiny_deepseek_v3, "m").manifest


def test_changed_files_are_told_by_header_and_by_size(tiny_deepseek_v3: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_deepseek_v3, tmp_path / "copy")
    manifest = read_checkpoint(copy, "m").manifest
    assert changed_files(copy, manifest) == ()
    first, second = (copy / file.name for file in manifest.files[:2])
    first.write_bytes(first.read_bytes() + b"x")
    data = bytearray(second.read_bytes())
    data[9] ^= 1
    second.write_bytes(data)
    assert changed_files(copy, manifest) == (first.name, second.name)


def test_a_model_name_may_have_slashes_but_not_300_characters(tiny_qwen3_moe: Path) -> None:
    assert read_checkpoint(tiny_qwen3_moe, "Qwen/Qwen3-30B-A3B").manifest.model == "Qwen/Qwen3-30B-A3B"
    with pytest.raises(InvalidInput, match="300 characters"):
        read_checkpoint(tiny_qwen3_moe, "m" * 300)


# -- size, speed, what is not done -----------------------------------------------------------------------------

NBYTES_OF_AN_EXPERT = {  # the published models'
    "deepseek-v3": 44_050_944, "kimi-k2": 44_050_944, "kimi-k2-thinking": 24_772_632, "qwen3-235b-a22b": 37_748_736,
    "qwen3-30b-a3b": 9_437_184, "qwen3.5": 25_165_824, "glm-4.5": 47_185_920, "mixtral-8x7b": 352_321_536,
    "minimax-m2": 14_159_232, "gpt-oss-120b": 13_236_480, "llama-4": 251_658_240,
}  # fmt: skip


@pytest.mark.parametrize("like", FAMILIES)
def test_an_expert_of_a_real_model_has_its_size(like: str, tmp_path: Path) -> None:
    layers = FAMILIES[like].first_dense + 2
    checkpoint = read_checkpoint(write_sparse(tmp_path / like, plan_checkpoint(like, layers=layers)), like)
    keys = [key for key in expert_keys(checkpoint.manifest) if key.layer < layers]
    assert {
        sum(t.nbytes for t in checkpoint.manifest.block(checkpoint.manifest.index(*key)).tensors) for key in keys
    } == {NBYTES_OF_AN_EXPERT[like]}
    assert len(keys) == FAMILIES[like].experts * sum(map(FAMILIES[like].has_experts, range(layers)))


def test_deepseek_v3_whole_has_14848_experts_and_no_weight_byte_is_read(tmp_path: Path) -> None:
    plan = plan_checkpoint("deepseek-v3", file_nbytes=4 << 30)
    directory = write_sparse(tmp_path / "whole", plan)
    headers = sum(len(file.header) for file in plan.files)
    documents = sum(path.stat().st_size for path in directory.glob("*.json"))
    before = _bytes_read()
    manifest = read_checkpoint(directory, "deepseek-v3").manifest
    assert _bytes_read() - before < headers + documents + (1 << 20)
    assert (len(manifest), len(manifest.schemas), len(plan.files)) == (58 * 256, 1, 158)


def _bytes_read() -> int:
    """By read calls of this process."""
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])  # type: ignore[index]


def test_reading_imports_no_torch(tiny_qwen3_moe: Path) -> None:
    code = (
        "import sys; from transfer.checkpoint import read_checkpoint; import transfer.checkpoint.synth; "
        "print(len(read_checkpoint(sys.argv[1], 'm').manifest), 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_qwen3_moe)],
        capture_output=True, text=True, cwd=Path(__file__).parents[3], timeout=60, env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    assert done.stdout.split() == ["15", "False"], done.stderr

"""Written checkpoints are what they claim to be: readable, finite, distinct, repeatable, whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from shm.block import DENSE
from shm.errors import InvalidInput
from tests.processes import DEADLINE_S, wait_until
from transfer.checkpoint import synth
from transfer.checkpoint.checkpoint import Checkpoint, read_checkpoint
from transfer.checkpoint.files import INDEX_NAME
from transfer.checkpoint.synth import FAMILIES, plan_checkpoint, write_checkpoint
from transfer.errors import CheckpointError

ROOT = Path(__file__).parents[3]
SMALL = {"layers": 5, "experts": 7, "scale": 0.02, "file_nbytes": 333_333}


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def block_bytes(checkpoint: Checkpoint, index: int) -> list[bytes]:
    parts = []
    for tensor in checkpoint.manifest.block(index).tensors:
        with checkpoint.path(tensor.file).open("rb") as stream:
            stream.seek(tensor.file_offset)
            parts.append(stream.read(tensor.nbytes))
    return parts


@pytest.fixture(params=FAMILIES)
def written(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    write_checkpoint(tmp_path / "c", request.param, seed=3, **SMALL)  # type: ignore[arg-type]
    return request.param, tmp_path / "c"


def test_the_library_loads_every_tensor_finite_and_not_zero(written: tuple[str, Path]) -> None:
    _, directory = written
    count = 0
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                tensor = file.get_tensor(name)
                assert bool((tensor.float() != 0).any()), name
                assert bool(tensor.float().isfinite().all()), name
                count += 1
    index = json.loads((directory / INDEX_NAME).read_text())
    assert len(index["weight_map"]) == count


def test_every_expert_differs_from_every_other(written: tuple[str, Path]) -> None:
    like, directory = written
    checkpoint = read_checkpoint(directory, like)
    blocks = [b"".join(block_bytes(checkpoint, index)) for index in range(len(checkpoint.manifest))]
    assert len(set(blocks)) == len(blocks)
    assert all(any(part) for part in blocks)
    moe_layers = sum(map(FAMILIES[like].has_experts, range(FAMILIES[like].first_dense, 5)))
    assert len(blocks) == 7 * (moe_layers + FAMILIES[like].has_mtp)


def test_files_have_sizes_and_names_as_planned(written: tuple[str, Path]) -> None:
    like, directory = written
    plan = plan_checkpoint(like, **SMALL)  # type: ignore[arg-type]
    n = len(plan.files)
    assert n > 1
    assert [file.name for file in plan.files] == [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    assert {path.name: path.stat().st_size for path in directory.glob("*.safetensors")} == {
        file.name: file.nbytes for file in plan.files
    }
    assert {path.name for path in directory.iterdir()} == {f.name for f in plan.files} | {"config.json", INDEX_NAME}
    for file in plan.files:
        data = file.nbytes - len(file.header)
        assert len(file.tensors) == 1 or data <= 333_333
        assert len(file.header) % 8 == 0


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        write_checkpoint(tmp_path / name, "qwen3-30b-a3b", layers=1, experts=3, scale=0.05, seed=seed)
    a, b, c = (digests(tmp_path / name) for name in "abc")
    assert a == b
    assert a["config.json"] == c["config.json"]
    assert a["model.safetensors"] != c["model.safetensors"]
    one, other = (read_checkpoint(tmp_path / name, "m", "all") for name in "ac")
    for index in range(len(one.manifest)):
        for mine, theirs in zip(block_bytes(one, index), block_bytes(other, index), strict=True):
            assert mine != theirs


def test_content_does_not_depend_on_the_file_size(tmp_path: Path) -> None:
    checkpoints = []
    for name, file_nbytes in (("a", 100_000), ("b", 1 << 30)):
        directory = tmp_path / name
        write_checkpoint(directory, "minimax-m2", layers=1, experts=3, scale=0.05, file_nbytes=file_nbytes)
        checkpoints.append(read_checkpoint(directory, "m", "all"))
    assert not (tmp_path / "b" / INDEX_NAME).exists()
    for index in range(len(checkpoints[0].manifest)):
        assert block_bytes(checkpoints[0], index) == block_bytes(checkpoints[1], index)


def test_dense_layers_count_and_give_way(tmp_path: Path) -> None:
    for layers, first in ((5, 3), (2, 1), (1, 0)):
        directory = tmp_path / str(layers)
        write_checkpoint(directory, "deepseek-v3", layers=layers, experts=3, scale=0.01)
        manifest = read_checkpoint(directory, "m").manifest
        assert sorted({key.layer for key in manifest.keys}) == list(range(first, layers))
        config = json.loads((directory / "config.json").read_text())
        assert (config["num_hidden_layers"], config["first_k_dense_replace"]) == (layers, first)
        assert (config["n_routed_experts"], config["num_experts_per_tok"]) == (3, 3)


def test_deepseek_v3_has_block_fp8_with_scales_and_shared_experts(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", "deepseek-v3", layers=4, experts=3, scale=0.05)
    manifest = read_checkpoint(tmp_path / "c", "m", "all").manifest
    tensors = {
        t.name.rpartition("experts.")[2]: (t.dtype, t.shape) for t in manifest.block(manifest.index(3, 1)).tensors
    }
    assert tensors == {
        "1.down_proj.weight": ("F8_E4M3", (352, 96)), "1.down_proj.weight_scale_inv": ("F32", (3, 1)),
        "1.gate_proj.weight": ("F8_E4M3", (96, 352)), "1.gate_proj.weight_scale_inv": ("F32", (1, 3)),
        "1.up_proj.weight": ("F8_E4M3", (96, 352)), "1.up_proj.weight_scale_inv": ("F32", (1, 3)),
    }  # fmt: skip
    dense = set(manifest.tensor_names(manifest.index(3, DENSE)))
    assert "model.layers.3.mlp.shared_experts.up_proj.weight_scale_inv" in dense


def test_packed_experts_carry_their_true_shape(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", "kimi-k2-thinking", layers=2, experts=2, scale=0.03)
    name = "model.layers.1.mlp.experts.1.down_proj.weight"
    with safe_open(tmp_path / "c" / "model.safetensors", "pt") as file:
        rows, cols = file.get_tensor(f"{name}_shape").tolist()
        assert file.get_tensor(f"{name}_packed").shape == (rows, cols // 8)
        assert file.get_tensor(f"{name}_packed").dtype == torch.int32


def test_tensors_lie_in_the_order_of_the_librarys_own_files(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    write_checkpoint(tmp_path / "c", "deepseek-v3", layers=4, experts=3, scale=0.02)
    ours = tmp_path / "c" / "model.safetensors"
    save_file(load_file(ours), tmp_path / "theirs.safetensors", {"format": "pt"})
    assert (tmp_path / "theirs.safetensors").read_bytes() == ours.read_bytes()


# -- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("like", "arguments", "says"),
    [
        ("gpt-2", {}, "choose one of deepseek-v3"),
        ("llama-4", {"layers": 1}, "every layer number 2 only"),
        ("qwen3.5", {"layers": 0}, "0 layers: give 1 to 65536"),
        ("qwen3.5", {"experts": 65537}, "65537 experts: give 1 to 65536"),
        ("qwen3.5", {"layers": 65536, "experts": 65536}, "at most 1048576 experts"),
        ("qwen3.5", {"scale": 0}, "more than 0"),
        ("qwen3.5", {"scale": float("nan")}, "more than 0"),
        ("qwen3.5", {"scale": 1.01}, "at most 1"),
        ("qwen3.5", {"seed": -1}, "seed -1"),
        ("qwen3.5", {"file_nbytes": 0}, "1 or more"),
    ],
)
def test_arguments_out_of_range(tmp_path: Path, like: str, arguments: dict[str, float], says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        write_checkpoint(tmp_path / "c", like, **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "c").exists()


def test_a_directory_that_is_not_empty_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    for path in (tmp_path, tmp_path / "mine", tmp_path / "mine" / "below" / "it"):
        with pytest.raises(InvalidInput, match=r"not an empty directory|cannot be made"):
            write_checkpoint(path, "mixtral-8x7b", scale=0.01)
    assert digests(tmp_path) == {"mine": hashlib.sha256(b"precious").hexdigest()}


def test_a_disk_without_the_space_is_refused_before_a_byte_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 3333

    monkeypatch.setattr(synth.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(CheckpointError, match="3,333 bytes free, the checkpoint takes"):
        write_checkpoint(tmp_path / "new" / "c", "mixtral-8x7b", scale=0.01)
    assert not (tmp_path / "new").exists()


WRITE = """
import resource, signal, sys
from transfer.errors import CheckpointError
from transfer.checkpoint.synth import write_checkpoint
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits that it is ignored
if limit := int(sys.argv[2]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
def peak_kib():  # not ru_maxrss: that one begins at the parent's
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak_kib()
try:
    write_checkpoint(sys.argv[1], sys.argv[4], layers=4, experts=int(sys.argv[3]), scale=0.2, file_nbytes=64 << 20)
except CheckpointError as error:
    print("refused", error)
else:
    print("grew", peak_kib() - before)
"""


def run_write(directory: Path, *, limit: int = 0, experts: int, like: str = "deepseek-v3") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITE, str(directory), str(limit), str(experts), like],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    out, _ = run_write(tmp_path / "c", limit=3_333_333, experts=9).communicate(timeout=DEADLINE_S)
    assert out.startswith("refused")
    assert "cannot be written" in out
    assert list(tmp_path.iterdir()) == []


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    out, _ = run_write(tmp_path / "c", experts=13, like="llama-4").communicate(timeout=DEADLINE_S)
    assert max(path.stat().st_size for path in (tmp_path / "c").iterdir()) > 80 << 20  # one fused tensor
    word, kib = out.split()
    assert word == "grew"
    assert int(kib) < 32 << 10


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_write_leaves_no_checkpoint(tmp_path: Path, how: signal.Signals) -> None:
    process = run_write(tmp_path / "c", experts=999)
    wait_until(lambda: list(tmp_path.glob("c/.model-00002*.part")), "writing")
    assert process.poll() is None
    process.send_signal(how)
    process.communicate(timeout=DEADLINE_S)
    assert process.returncode != 0
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "c", "m")
    if how is signal.SIGINT:
        assert list(tmp_path.iterdir()) == []

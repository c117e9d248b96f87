"""`hotspare inspect`."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.transfer.checkpoint.layouts import LAYOUTS

Hotspare = Callable[..., subprocess.CompletedProcess[str]]


def test_it_says_what_was_recognised_and_what_was_left_out(hotspare: Hotspare, tmp_path: Path) -> None:
    layout = LAYOUTS["llama-4-nvfp4"]
    layout.write(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Llama4ForCausalLM"]}))
    (tmp_path / "adapter_model.safetensors").touch()
    done = hotspare("inspect", str(tmp_path), "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["architecture"], document["family"]) == ("Llama4ForCausalLM", "fused")
    assert [(layer["layer"], layer["experts"], layer["tensors"]) for layer in document["layers"]] == [
        (0, 5, 8), (1, 5, 8)
    ]  # fmt: skip
    assert document["experts"] == 10
    assert document["tensors"] == len(layout.fused) + len(layout.common)
    assert document["dense"] == {"tensors": 0, "nbytes": 0}
    assert document["nbytes"] == sum(layer["nbytes"] for layer in document["layers"])
    assert document["files"] == [
        {"name": "model.safetensors", "nbytes": (tmp_path / "model.safetensors").stat().st_size}
    ]
    assert [left["file"] for left in document["left_out"]] == ["adapter_model.safetensors"]


@pytest.mark.parametrize("name", ["deepseek-nvfp4", "llama-4-nvfp4", "puzzle", "beside-fused"])
def test_people_read_it_in_eighty_columns(hotspare: Hotspare, tmp_path: Path, name: str) -> None:
    LAYOUTS[name].write(tmp_path)
    done = hotspare("inspect", str(tmp_path), COLUMNS="80")
    assert done.returncode == 0, done.stderr
    assert "experts in 2 layers" in done.stdout
    assert "LAYERS" in done.stdout
    sentences = ("note: ", str(tmp_path))  # which terminals wrap
    assert [line for line in done.stdout.splitlines() if len(line) > 80 and not line.startswith(sentences)] == []
    if name == "beside-fused":
        assert "note: model.layers.N.mlp.experts.router.weight lies among experts and is none's" in done.stdout


def test_what_is_refused_is_refused_with_the_reason(hotspare: Hotspare, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    done = hotspare("inspect", str(tmp_path))
    assert done.returncode == 1
    assert "pickles" in done.stderr
    assert "Traceback" not in done.stderr

"""A model is loaded from memory as from its files: every name, every byte, from the nearest place that has it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.transfer.kept import NOBODY, Kept
from transfer import Loader
from transfer.client.loader import LoadReport
from transfer.errors import RestoreError

FAMILIES = ("qwen3_moe", "deepseek_v3", "mixtral", "gpt_oss", "llama4", "qwen3_5_moe")
DEVICES = [
    "cpu",
    pytest.param("cuda:0", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
]


def content_of(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor as the safetensors library loads it."""
    found: dict[str, torch.Tensor] = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    return found


def differing(loaded: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> list[str]:
    """Names that are missing, too many, or of another dtype, shape or byte."""

    def is_same(name: str) -> bool:
        one, other = loaded[name].cpu(), right[name]
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(_bytes(one), _bytes(other))

    both = loaded.keys() & right.keys()
    return sorted((loaded.keys() ^ right.keys()) | {name for name in both if not is_same(name)})


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_model_comes_from_memory_when_its_files_are_gone(
    family: str, device: str, tiny_checkpoint: Callable[..., Path], keep: Callable[..., Kept], bare: Path
) -> None:
    directory = tiny_checkpoint(family, is_fused=family in ("gpt_oss", "llama4", "qwen3_5_moe"))
    right, kept = content_of(directory), keep(directory)
    with kept.loader(bare) as loader:
        loaded = loader.load(device=device)
    assert loader.content_digest == kept.content_digest.hex()
    assert differing(loaded, right) == []
    assert {tensor.device.type for tensor in loaded.values()} == {torch.device(device).type}
    assert loader.report.bytes_by_source["local"] > 0
    assert (loader.report.bytes_by_source["peer"], loader.report.bytes_by_source["disk"]) == (0, 0)
    assert loader.report.tensors == len(right)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_nodes_do_not_keep_comes_from_the_files(
    family: str, device: str, tiny_checkpoint: Callable[..., Path], keep: Callable[..., Kept]
) -> None:
    """Dense tensors, and every third block."""
    directory = tiny_checkpoint(family, is_sharded=True)
    kept = keep(directory, "experts", lambda row: row % 3 != 0)
    with kept.loader(directory) as loader:
        loaded = loader.load(device=device)
    assert differing(loaded, content_of(directory)) == []
    here = int(kept.manifest.nbytes[[row for row in range(len(kept.manifest)) if row % 3]].sum())
    assert loader.report.bytes_by_source["local"] == here
    assert loader.report.bytes_by_source["disk"] > 0


def test_tensors_lie_on_the_segments_own_pages_and_outlive_the_loader(
    tiny_checkpoint: Callable[..., Path], keep: Callable[..., Kept], bare: Path
) -> None:
    directory = tiny_checkpoint("qwen3_moe")
    with keep(directory).loader(bare) as loader:
        loaded = loader.load()
        attachment = loader._around.segment.attachment
        assert attachment is not None
        begin, end = attachment._address, attachment._address + attachment.nbytes
    assert all(begin <= tensor.data_ptr() < end for tensor in loaded.values())
    assert differing(loaded, content_of(directory)) == []


def test_only_what_is_wanted_moves(tiny_checkpoint: Callable[..., Path], keep: Callable[..., Kept]) -> None:
    directory = tiny_checkpoint("gpt_oss", is_fused=True)
    kept = keep(directory, "experts")

    def wanted(name: str) -> bool:
        return ".layers.1." in name and ("down_proj" in name or "norm" in name)

    with kept.loader(directory) as loader:
        loaded = loader.load(wanted)
    assert differing(loaded, {name: t for name, t in content_of(directory).items() if wanted(name)}) == []
    assert loader.report.bytes_by_source["local"] == int(kept.manifest.nbytes[5:10].sum())


def test_progress_is_told_as_tensors_are_handed_out_and_a_callback_that_fails_stops_no_start(
    tiny_checkpoint: Callable[..., Path], keep: Callable[..., Kept], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transfer.client.loader.PROGRESS_INTERVAL_S", 0.0)
    directory = tiny_checkpoint("qwen3_moe")
    kept = keep(directory, "experts")  # the others come of the files
    told: list[LoadReport] = []

    def fail(report: LoadReport) -> None:
        told.append(report)
        if len(told) == 3:
            raise RuntimeError("the console is gone")

    with kept.loader(directory) as loader:
        loader.load(progress=told.append)
        numbers = [report.tensors for report in told]
        assert numbers == sorted(numbers)
        assert len(set(numbers)) > 10
        assert told[-1] == loader.report
        told.clear()
        assert differing(loader.load(progress=fail), content_of(directory)) == []
    assert len(told) == 3


def test_a_block_that_is_wrong_in_the_segment_comes_from_elsewhere(
    tiny_checkpoint: Callable[..., Path], keep: Callable[..., Kept], bare: Path
) -> None:
    directory = tiny_checkpoint("qwen3_moe")
    kept = keep(directory)
    kept.segment.block(7)[99] ^= 8
    with kept.loader(directory) as loader:
        assert differing(loader.load(), content_of(directory)) == []
    assert loader.report.bytes_by_source["disk"] == kept.manifest.nbytes[7]
    assert "1 blocks were wrong in the memory of this host" in loader.report.notes
    with kept.loader(bare) as loader, pytest.raises(RestoreError, match="1 blocks are in no memory and in no file"):
        loader.load()


def test_what_is_hidden_or_published_in_the_middle_of_a_load_is_handed_out_once(
    tiny_checkpoint: Callable[..., Path], keep: Callable[..., Kept]
) -> None:
    directory = tiny_checkpoint("qwen3_moe")
    kept = keep(directory)
    recorded = kept.segment.checksum(7)
    kept.segment.quarantine(7)
    loaded: dict[str, torch.Tensor] = {}
    with kept.loader(directory) as loader:
        for name, tensor in loader.tensors():
            if not loaded:  # of the first block, which is hidden after that
                kept.segment.quarantine(0)
                kept.segment.publish(7, recorded)
            assert name not in loaded
            loaded[name] = tensor
    assert differing(loaded, content_of(directory)) == []


def test_files_of_other_weights_than_the_nodes_keep_are_loaded_alone(
    tiny_checkpoint: Callable[..., Path], keep: Callable[..., Kept], tmp_path: Path
) -> None:
    """A fine-tune: names, shapes and headers are the same."""
    directory = tiny_checkpoint("qwen3_moe")
    kept = keep(directory)
    other = tmp_path / "fine-tune"
    shutil.copytree(directory, other)
    file = other / "model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    with kept.loader(other) as loader:
        assert differing(loader.load(), content_of(other)) == []
        assert loader.content_digest is None, "that of the node is another's"
    assert loader.report.bytes_by_source["local"] == 0
    assert any("nothing is taken of it" in note or "not the checkpoint" in note for note in loader.report.notes)


def test_without_a_node_and_a_segment_the_files_are_all(tiny_checkpoint: Callable[..., Path], bare: Path) -> None:
    directory = tiny_checkpoint("deepseek_v3", is_sharded=True)
    with Loader(NOBODY, checkpoint=directory) as loader:
        assert differing(loader.load(), content_of(directory)) == []
    assert loader.report.bytes_by_source["local"] == 0
    for nothing in (bare, None):
        with Loader(NOBODY, checkpoint=nothing) as loader, pytest.raises(RestoreError, match=r"nothing can be loaded"):
            loader.load()


def test_a_part_of_a_model_is_never_taken_for_the_whole(
    tiny_checkpoint: Callable[..., Path], keep: Callable[..., Kept], bare: Path
) -> None:
    """Dense tensors that nobody keeps, and files that are there when a load begins and not when it needs them."""
    directory = tiny_checkpoint("qwen3_moe")
    kept = keep(directory, "experts")
    with kept.loader(bare) as loader:
        with pytest.raises(RestoreError, match="the nodes keep experts alone"):
            loader.load()
        assert len(loader.load(lambda name: ".experts." in name)) == 45
    shutil.copy(directory / "model.safetensors", bare)
    with kept.loader(bare) as loader, pytest.raises(RestoreError, match="went away in the middle of the load"):
        loader.load(lambda name: (bare / "model.safetensors").unlink(missing_ok=True) or True)


def test_what_is_in_memory_is_found_before_anything_is_loaded(
    tiny_checkpoint: Callable[..., Path], keep: Callable[..., Kept], bare: Path
) -> None:
    directory = tiny_checkpoint("qwen3_moe")
    kept = keep(directory)
    with kept.loader(bare) as loader:
        assert loader.find() == kept.manifest
    with kept.loader(tiny_checkpoint("mixtral")) as loader:
        assert loader.find() is None
        assert any("is not the checkpoint that the nodes keep" in note for note in loader.report.notes)
    with Loader(NOBODY, checkpoint=directory) as loader:
        assert loader.find() is None, "files are no memory"


@pytest.mark.usefixtures("kept_engines")
def test_what_other_nodes_keep_comes_from_them_and_then_from_the_files(
    tiny_qwen3_moe: Path, cluster: Callable[..., Any], bare: Path
) -> None:
    right = content_of(tiny_qwen3_moe)
    nodes = cluster("qwen", tiny_qwen3_moe, count=2, replicas=2, include="all")
    told: list[LoadReport] = []
    with Loader(nodes.urls[0], checkpoint=bare) as loader:
        loaded = loader.load()
        assert loader.report.bytes_by_source["peer"] == 0
        assert loader._is_proved(loader._around.segment.attachment), "the node filled it, and so has verified it"
        nodes.kill(0)
        os.unlink(nodes.segment(0))
        again = dict(loader.tensors(progress=told.append, window_nbytes=30_000))  # of five blocks
    assert differing(loaded, right) == differing(again, right) == []
    assert (loader.report.bytes_by_source["local"], loader.report.bytes_by_source["disk"]) == (0, 0)
    assert len(told) > 3
    assert told[0].bytes_total < told[-1].bytes_total == loader.report.bytes_total
    nodes.kill(1)
    with Loader(nodes.urls[0], checkpoint=tiny_qwen3_moe, model="qwen") as loader:
        assert differing(loader.load(), right) == []
    assert loader.report.bytes_by_source["peer"] == 0

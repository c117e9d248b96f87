"""Every way a checkpoint can be wrong has its own message, and no damage gets past as another kind of error."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.transfer.checkpoint.damage import (
    EXPERT,
    FUZZ,
    INDEX,
    JSON,
    change_index,
    entries,
    header_of,
    refused,
    write,
    write_raw,
)
from transfer.checkpoint import read_checkpoint
from transfer.errors import CheckpointError


def test_the_undamaged_ones_are_read(damaged: Callable[..., Path], sharded: Path) -> None:
    assert len(read_checkpoint(sharded, "m").manifest) == 6
    directory = damaged(lambda h: None)
    (directory / INDEX).unlink()
    assert len(read_checkpoint(directory, "m").manifest) == 3


# -- directory -------------------------------------------------------------------------------------------------


def test_missing_directory(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere does not exist")


def test_file_instead_of_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "is no directory")


def test_directory_name_with_nul() -> None:
    with pytest.raises(CheckpointError, match="is no name of a directory"):
        read_checkpoint("a\0b", "m")


def test_directory_without_safetensors_files(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    refused(tmp_path, "no *.safetensors file")


# -- index -----------------------------------------------------------------------------------------------------


def test_index_naming_a_missing_file(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    refused(sharded, "lacks model-00002-of-00002.safetensors", "model.layers.1.mlp.experts.0.", "finish the download")


def test_index_naming_a_broken_link(sharded: Path) -> None:
    file = sharded / "model-00002-of-00002.safetensors"
    file.unlink()
    file.symlink_to(sharded / "gone")
    refused(sharded, "model-00002-of-00002.safetensors is missing")


def test_index_naming_a_tensor_that_its_file_lacks(sharded: Path) -> None:
    lost = "model.layers.0.mlp.experts.3.up_proj.weight"
    change_index(sharded, lambda m: m.update({lost: "model-00001-of-00002.safetensors"}))
    refused(sharded, f"model-00001-of-00002.safetensors has no tensor {lost!r}", "not of one download")


def test_a_stale_index_entry_that_is_no_experts_is_told_and_no_obstacle(sharded: Path) -> None:
    """Engines take of an index no more than the files' names."""
    stale = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_index(sharded, lambda m: m.update({stale: "model-00001-of-00002.safetensors"}))
    checkpoint = read_checkpoint(sharded, "m")
    assert len(checkpoint.manifest) == 6
    assert checkpoint.notes == (f"{INDEX} names 1 tensors that are not there: {stale}",)


def test_index_naming_the_wrong_file_for_a_tensor(sharded: Path) -> None:
    change_index(sharded, lambda m: m.update({EXPERT: "model-00002-of-00002.safetensors"}))
    refused(sharded, EXPERT, "is in model-00001-of-00002.safetensors", "puts it in model-00002")


def test_index_that_does_not_name_a_file_of_its_series(sharded: Path) -> None:
    change_index(sharded, lambda m: [m.pop(name) for name in list(m) if ".layers.1." in name])
    refused(sharded, "model-00002-of-00002.safetensors", "the index does not name it")


def test_tensor_that_the_index_forgot_is_read(sharded: Path) -> None:
    change_index(sharded, lambda m: m.pop(EXPERT))
    assert len(read_checkpoint(sharded, "m").manifest) == 6


def test_tensor_in_two_files(sharded: Path) -> None:
    write(sharded / "model-00002-of-00002.safetensors", header_of(entries(2)))
    refused(sharded, "is in two files, model-00001-of-00002.safetensors and model-00002-of-00002.safetensors")


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "a\\b.safetensors", "passwd", "", 7]
)
def test_index_naming_a_file_outside_the_directory(sharded: Path, name: Any) -> None:
    change_index(sharded, lambda m: m.update({EXPERT: name}))
    refused(sharded, EXPERT, repr(name), "same directory")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', "\x80", "[" * 99999])
def test_index_that_is_no_index(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text, encoding="latin-1")
    refused(sharded, INDEX)


# -- config ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x80"])
def test_unreadable_config(sharded: Path, text: str) -> None:
    (sharded / "config.json").write_text(text, encoding="latin-1")
    refused(sharded, "config.json")


@pytest.mark.parametrize("key", ["num_experts", "n_routed_experts", "num_local_experts"])
def test_config_with_another_number_of_experts(sharded: Path, key: str) -> None:
    (sharded / "config.json").write_text(json.dumps({"num_hidden_layers": 2, key: 4}))
    refused(sharded, f"4 experts ({key})", "layer 0 has 3")


@pytest.mark.parametrize("nest", ["text_config", "llm_config", "thinker_config"])
def test_nested_config_with_more_layers(sharded: Path, nest: str) -> None:
    config = {"vision_config": {"num_hidden_layers": 99}, nest: {"num_hidden_layers": 5, "num_experts": 3}}
    (sharded / "config.json").write_text(json.dumps(config))
    refused(sharded, "5 layers (num_hidden_layers)", "end with layer 1", "finish the download")


def test_config_of_several_stacks_is_that_of_the_one_with_most_layers(sharded: Path) -> None:
    small, large = {"num_hidden_layers": 1, "num_experts": 9}, {"num_hidden_layers": 2, "num_experts": 3}
    for config in ({"talker": small, "thinker": large}, {"thinker": large, "talker": small}):
        (sharded / "config.json").write_text(json.dumps(config))
        assert len(read_checkpoint(sharded, "m").manifest) == 6


def test_config_with_fewer_layers_leaves_room_for_those_that_predict_ahead(sharded: Path) -> None:
    (sharded / "config.json").write_text(json.dumps({"num_hidden_layers": 1, "n_routed_experts": 3}))
    assert len(read_checkpoint(sharded, "m").manifest) == 6


def test_config_that_tells_no_numbers_is_no_obstacle(sharded: Path) -> None:
    (sharded / "config.json").write_text(json.dumps({"num_experts": [3, 3], "num_hidden_layers": "2", "x": {"y": 1}}))
    assert len(read_checkpoint(sharded, "m").manifest) == 6


# -- experts ---------------------------------------------------------------------------------------------------


def test_no_expert_found_lists_what_was_seen(tmp_path: Path) -> None:
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.shared_expert.up_proj.weight"]
    write(tmp_path / "model.safetensors", header_of(dict.fromkeys(names, ("BF16", [3, 5]))))
    refused(tmp_path, "no expert found", *(name.replace("layers.0", "layers.N") for name in names), "[3, 5]")


def test_checkpoint_without_any_tensor(tmp_path: Path) -> None:
    write_raw(tmp_path / "model.safetensors", b"{}", b"")
    refused(tmp_path, "no expert found", "no tensor at all")


def test_expert_that_lost_a_tensor_is_named_with_its_file(sharded: Path) -> None:
    lost = "model.layers.1.mlp.experts.2.up_proj.weight"
    file = "model-00002-of-00002.safetensors"
    write(sharded / file, header_of({k: v for k, v in entries(2).items() if ".layers.1." in k and k != lost}))
    change_index(sharded, lambda m: m.pop(lost))
    refused(sharded, file, "model.layers.1.mlp.experts.2.", "expert 2 lacks up_proj.weight")


# -- any damage ------------------------------------------------------------------------------------------------


@FUZZ
@given(data=st.data())
def test_index_and_config_may_be_anything(sharded: Path, tmp_path: Path, data: st.DataObject) -> None:
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(sharded, copy, ignore=shutil.ignore_patterns("copy"))
    change_index(copy, lambda m: m.update({EXPERT: data.draw(JSON)} if data.draw(st.booleans()) else {}))
    (copy / "config.json").write_text(json.dumps(data.draw(JSON | st.dictionaries(st.just("num_experts"), JSON))))
    with contextlib.suppress(CheckpointError):
        read_checkpoint(copy, "m")

"""Which files of a directory are read, and that of every other one it is said why not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.transfer.checkpoint.damage import INDEX, Entries, change_index, entries, header_of, refused, write, write_raw
from transfer.checkpoint import read_checkpoint

CONSOLIDATED_INDEX = "consolidated.safetensors.index.json"
EMPTY = b"{}"


def files(directory: Path) -> list[str]:
    return [file.name for file in read_checkpoint(directory, "m").manifest.files]


def left_out(directory: Path) -> dict[str, str]:
    return dict(read_checkpoint(directory, "m").left_out)


def layer(number: int) -> Entries:
    return {name: entry for name, entry in entries(number + 1).items() if f".layers.{number}." in name}


def mistral(numbers: list[int]) -> Entries:
    return {
        f"layers.{number}.experts.{expert}.{part}.weight": ("BF16", [3, 5])
        for number in numbers for expert in range(3) for part in ("w1", "w2", "w3")
    }  # fmt: skip


def write_index(directory: Path, name: str, parts: dict[str, Entries]) -> None:
    for file, tensors in parts.items():
        write(directory / file, header_of(tensors))
    weight_map = {tensor: file for file, tensors in parts.items() for tensor in tensors}
    (directory / name).write_text(json.dumps({"weight_map": weight_map}))


# -- with an index ---------------------------------------------------------------------------------------------


def test_files_beside_an_index_are_left_out_and_told_of(sharded: Path) -> None:
    write(sharded / "model_extra_tensors.safetensors", header_of(layer(2)))
    (sharded / "mtp.safetensors").write_bytes(b"not even a header")
    assert len(files(sharded)) == 2
    assert left_out(sharded) == dict.fromkeys(
        ("model_extra_tensors.safetensors", "mtp.safetensors"), f"{INDEX} does not name it"
    )


@pytest.mark.parametrize(
    ("architecture", "predicting", "is_read"),
    [("Glm4MoeForCausalLM", 1, True), ("Glm4MoeForCausalLM", 0, False), ("Qwen3MoeForCausalLM", 1, False)],
)
def test_mtp_is_read_where_sglang_reads_it(sharded: Path, architecture: str, predicting: int, is_read: bool) -> None:
    config = {
        "architectures": [architecture], "num_nextn_predict_layers": predicting, "num_hidden_layers": 2,
        "n_routed_experts": 3,
    }  # fmt: skip
    (sharded / "config.json").write_text(json.dumps(config))
    write(sharded / "mtp.safetensors", header_of(layer(2)))
    assert ("mtp.safetensors" in files(sharded)) is is_read
    assert ("mtp.safetensors" in left_out(sharded)) is not is_read
    assert len(read_checkpoint(sharded, "m").manifest) == (9 if is_read else 6)


def test_an_empty_file_of_the_series_need_not_be_named(sharded: Path) -> None:
    write_raw(sharded / "model-00003-of-00002.safetensors", EMPTY, b"")
    assert len(files(sharded)) == 2
    assert "model-00003-of-00002.safetensors" in left_out(sharded)


def test_consolidated_files_have_an_index_and_a_configuration_of_their_own(tmp_path: Path) -> None:
    parts = {f"consolidated-0000{n}-of-00002.safetensors": mistral([n - 1]) for n in (1, 2)}
    write_index(tmp_path, CONSOLIDATED_INDEX, parts)
    (tmp_path / "params.json").write_text(json.dumps({"n_layers": 2, "moe": {"num_experts": 3}}))
    assert files(tmp_path) == sorted(parts)
    (tmp_path / "params.json").write_text(json.dumps({"n_layers": 4, "moe": {"num_experts": 3}}))
    refused(tmp_path, "params.json says 4 layers (n_layers)", "finish the download")


def test_of_two_layouts_side_by_side_one_is_read(sharded: Path) -> None:
    write_index(sharded, CONSOLIDATED_INDEX, {"consolidated-00001-of-00001.safetensors": mistral([0, 1])})
    assert all(name.startswith("model-") for name in files(sharded))
    assert list(left_out(sharded)) == ["consolidated-00001-of-00001.safetensors"]
    (sharded / INDEX).unlink()
    assert all(name.startswith("model-") for name in files(sharded))
    assert "Mistral" in left_out(sharded)["consolidated-00001-of-00001.safetensors"]


def test_an_index_of_any_name_counts_if_it_is_the_only_one(sharded: Path) -> None:
    (sharded / INDEX).rename(sharded / "weights.safetensors.index.json")
    assert len(files(sharded)) == 2
    (sharded / "other.safetensors.index.json").write_text("{}")
    refused(sharded, "2 indexes", f"none called {INDEX}")


# -- without one -----------------------------------------------------------------------------------------------


def test_a_whole_series_needs_no_index(sharded: Path) -> None:
    with_index = read_checkpoint(sharded, "m").manifest
    (sharded / INDEX).unlink()
    assert read_checkpoint(sharded, "m").manifest == with_index


@pytest.mark.parametrize("lost", ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"])
def test_half_a_series_without_index_says_which_file_is_missing(sharded: Path, lost: str) -> None:
    (sharded / INDEX).unlink()
    (sharded / lost).unlink()
    refused(sharded, f"lacks {lost}", "finish the download")


def test_several_series_without_index_are_read_as_one_model(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    for number in (1, 2):
        write(sharded / f"mtp-{number}-of-2.safetensors", header_of(layer(number + 1)))
    assert len(files(sharded)) == 4
    assert len(read_checkpoint(sharded, "m").manifest) == 12


def test_series_of_no_known_name_are_read_together(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    for name in files(sharded):
        (sharded / name).rename(sharded / f"rank{name[10]}.safetensors")
    assert files(sharded) == ["rank1.safetensors", "rank2.safetensors"]
    write(sharded / "rank3.safetensors", header_of(layer(0)))
    refused(sharded, "is in two files, rank1.safetensors and rank3.safetensors", "cut for several ranks")


def test_what_has_the_models_tensors_again_is_left_out(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    write(sharded / "copy.safetensors", header_of(layer(1)))
    (sharded / "rest.safetensors").write_bytes(b"x")
    write(sharded / "adapter_model.safetensors", header_of({"lora_A.weight": ("BF16", [3, 5])}))
    assert len(files(sharded)) == 2
    reasons = left_out(sharded)
    assert "is in the model's own files too" in reasons["copy.safetensors"]
    assert "it is not whole" in reasons["rest.safetensors"]
    assert "adapter" in reasons["adapter_model.safetensors"]


def test_an_empty_shard_is_no_obstacle(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    for number, name in ((1, "model-00001-of-00003"), (2, "model-00002-of-00003")):
        (sharded / f"model-0000{number}-of-00002.safetensors").rename(sharded / f"{name}.safetensors")
    write_raw(sharded / "model-00003-of-00003.safetensors", EMPTY, b"")
    assert len(files(sharded)) == 3
    assert len(read_checkpoint(sharded, "m").manifest) == 6


@pytest.mark.parametrize(
    ("name", "says"),
    [("pytorch_model.bin", "pickles"), ("consolidated.00.pth", "pickles"), ("model-q4.gguf", "another format")],
)
def test_other_formats_are_called_by_their_names(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / name).touch()
    refused(tmp_path, name, says, "convert")


def test_an_index_without_its_files_is_a_download_to_be_finished(sharded: Path) -> None:
    change_index(sharded, lambda m: m.update({"model.norm.weight": "model-00009-of-00002.safetensors"}))
    refused(sharded, "lacks model-00009-of-00002.safetensors", "finish the download")

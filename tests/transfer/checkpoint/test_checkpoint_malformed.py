"""Every way a checkpoint can be wrong has its own message, and no damage gets past as another kind of error."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from transfer.checkpoint import read_checkpoint
from transfer.checkpoint.safetensors_header import HEADER_NBYTES_MAX
from transfer.checkpoint.synth import write_checkpoint
from transfer.errors import CheckpointError

Header = dict[str, Any]
Entries = dict[str, tuple[str, list[int]]]

INDEX = "model.safetensors.index.json"
EXPERT = "model.layers.0.mlp.experts.1.up_proj.weight"


def entries(layers: int = 1, experts: int = 3) -> Entries:
    """A small model's tensors, of 3 by 5 BF16."""
    return {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight": ("BF16", [3, 5])
        for layer in range(layers)
        for expert in range(experts)
        for part in ("gate", "up", "down")
    }


def header_of(tensors: Entries) -> Header:
    header: Header = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + {"BF16": 2, "U8": 1, "F32": 4}[dtype] * shape[0] * shape[1]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    return header


def write_raw(path: Path, text: bytes, data: bytes, length: int | None = None) -> None:
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def write(path: Path, header: Header) -> None:
    ends = [e["data_offsets"][1] for e in header.values() if isinstance(e, dict) and "data_offsets" in e]
    write_raw(path, json.dumps(header).encode(), bytes(max(ends)))


def refused(directory: Path, *says: str, include: str = "experts") -> None:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(directory, "m", include)  # type: ignore[arg-type]
    assert str(directory) in str(caught.value)
    for words in says:
        assert words in str(caught.value)


@pytest.fixture
def damaged(tmp_path: Path) -> Callable[[Callable[[Header], object]], Path]:
    """A valid one-file checkpoint whose header a function has changed; the data stays."""

    def make(change: Callable[[Header], object]) -> Path:
        header = header_of(entries())
        nbytes = max(e["data_offsets"][1] for e in header.values())
        change(header)
        write_raw(tmp_path / "model.safetensors", json.dumps(header).encode(), bytes(nbytes))
        return tmp_path

    return make


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two files and an index, valid."""
    parts = {"model-00001-of-00002.safetensors": entries(1), "model-00002-of-00002.safetensors": {}}
    parts["model-00002-of-00002.safetensors"] = {k: v for k, v in entries(2).items() if k not in entries(1)}
    for file, tensors in parts.items():
        write(tmp_path / file, header_of(tensors))
    weight_map = {name: file for file, tensors in parts.items() for name in tensors}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tmp_path


def change_index(directory: Path, change: Callable[[dict[str, str]], object]) -> Path:
    document = json.loads((directory / INDEX).read_text())
    change(document["weight_map"])
    (directory / INDEX).write_text(json.dumps(document))
    return directory


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


def test_several_files_without_index(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    refused(sharded, "2 .safetensors files", "no model.safetensors.index.json")


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
    change_index(sharded, lambda m: m.update({"model.norm.weight": "model-00001-of-00002.safetensors"}))
    refused(sharded, "model-00001-of-00002.safetensors has no tensor 'model.norm.weight'")


def test_index_naming_the_wrong_file_for_a_tensor(sharded: Path) -> None:
    change_index(sharded, lambda m: m.update({EXPERT: "model-00002-of-00002.safetensors"}))
    refused(sharded, EXPERT, "is in model-00001-of-00002.safetensors", "the index puts it in model-00002")


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


# -- header ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"\0" * 7])
def test_file_too_short_for_a_length(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    refused(tmp_path, f"has {len(data)} bytes, too few")


def test_header_longer_than_the_file(tmp_path: Path) -> None:
    write_raw(tmp_path / "model.safetensors", b"{}", b"", length=3333)
    refused(tmp_path, "header of 3,333 bytes is longer than the file (10)")


def test_header_longer_than_the_limit(tmp_path: Path) -> None:
    write_raw(tmp_path / "model.safetensors", b"<!DOCTYPE html>", b"", length=HEADER_NBYTES_MAX + 1)
    refused(tmp_path, "100,000,001 bytes", "the limit is 100,000,000")


@pytest.mark.parametrize("text", [b"{", b"", b"\xff\xfe{}", b"[" * 99_999, b'{"a": ' + b"9" * 5000 + b"}"])
def test_header_that_is_not_json(tmp_path: Path, text: bytes) -> None:
    write_raw(tmp_path / "model.safetensors", text, b"")
    refused(tmp_path, "model.safetensors", "is not valid JSON")


@pytest.mark.parametrize("text", [b"[]", b"7", b"null"])
def test_header_that_is_not_an_object(tmp_path: Path, text: bytes) -> None:
    write_raw(tmp_path / "model.safetensors", text, b"")
    refused(tmp_path, "is not a JSON object")


def test_tensor_twice_in_a_header(tmp_path: Path) -> None:
    one = json.dumps(header_of(entries()))
    text = one[:-1] + f', "{EXPERT}": ' + json.dumps(header_of(entries())[EXPERT]) + "}"
    write_raw(tmp_path / "model.safetensors", text.encode(), bytes(9 * 30))
    refused(tmp_path, f"{EXPERT!r} twice")


def test_dtype_that_is_not_known(damaged: Callable[..., Path]) -> None:
    refused(damaged(lambda h: h[EXPERT].update(dtype="BF17")), EXPERT, "'BF17' is not one of")


def test_dtype_and_shape_that_disagree_with_the_range(damaged: Callable[..., Path]) -> None:
    refused(damaged(lambda h: h[EXPERT].update(dtype="F32")), EXPERT, "F32 [3, 5] takes 60 bytes, its range has 30")
    refused(damaged(lambda h: h[EXPERT].update(shape=[3, 4])), EXPERT, "BF16 [3, 4] takes 24 bytes, its range has 30")


@pytest.mark.parametrize("shape", [[-3, -5], [3.0, 5], ["3", 5], [True, 15], "35", None, [1] * 99, [2**63, 2**63, 0]])
def test_shape_that_is_no_list_of_sizes(damaged: Callable[..., Path], shape: Any) -> None:
    refused(damaged(lambda h: h[EXPERT].update(shape=shape)), EXPERT, "whole numbers")


@pytest.mark.parametrize("offsets", [[0], [0, 1, 2], [-1, 29], {"0": 1}, None])
def test_offsets_that_are_no_pair_of_sizes(damaged: Callable[..., Path], offsets: Any) -> None:
    refused(damaged(lambda h: h[EXPERT].update(data_offsets=offsets)), EXPERT, "whole numbers")


def test_offsets_in_the_wrong_order(damaged: Callable[..., Path]) -> None:
    refused(damaged(lambda h: h[EXPERT]["data_offsets"].reverse()), EXPERT, "before it begins")


@pytest.mark.parametrize("entry", [None, 7, [], "x", {}, {"dtype": "BF16", "shape": [3, 5]}])
def test_entry_that_lacks_something(damaged: Callable[..., Path], entry: Any) -> None:
    refused(damaged(lambda h: h.update({EXPERT: entry})), EXPERT, "lacks dtype, shape or data_offsets")


def test_overlapping_offsets(damaged: Callable[..., Path]) -> None:
    first = "model.layers.0.mlp.experts.1.gate_proj.weight"
    refused(damaged(lambda h: h[EXPERT].update(data_offsets=[118, 148])), first, EXPERT, "overlap")


def test_a_hole_between_tensors(damaged: Callable[..., Path]) -> None:
    after = "model.layers.0.mlp.experts.1.down_proj.weight"
    refused(damaged(lambda h: h.pop(EXPERT)), after, "leave a hole")


def test_bytes_after_the_last_tensor(tmp_path: Path) -> None:
    write_raw(tmp_path / "model.safetensors", json.dumps(header_of(entries())).encode(), bytes(9 * 30 + 7))
    refused(tmp_path, "7 bytes after tensor 'model.layers.0.mlp.experts.2.down_proj.weight' belong to no tensor")


def test_file_cut_short(tmp_path: Path) -> None:
    write_raw(tmp_path / "model.safetensors", json.dumps(header_of(entries())).encode(), bytes(9 * 30 - 7))
    refused(tmp_path, "ends at 270, the file's data has 263 bytes")


@pytest.mark.parametrize("name", ["", "x" * 1025, "tab\t", "model.{layer}.x", "a[3]", "\ud800", "a..b", ".a", "a."])
def test_tensor_name_that_cannot_be(damaged: Callable[..., Path], name: str) -> None:
    refused(damaged(lambda h: h.update({name: h.pop(EXPERT)})), "printable characters")


def test_metadata_that_is_not_text_is_refused_by_the_library(damaged: Callable[..., Path]) -> None:
    refused(damaged(lambda h: h.update(__metadata__={"format": 7})), "refused by the safetensors library")


def test_pipe_instead_of_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    refused(tmp_path, "is not a regular file")
    (tmp_path / "model.safetensors").unlink()
    write(tmp_path / "model.safetensors", header_of(entries()))
    os.mkfifo(tmp_path / "config.json")
    refused(tmp_path, "config.json is not a regular file")


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
    refused(tmp_path, "no expert found", *names)


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

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=9)
    | st.sampled_from(["BF16", "F4", "F6_E2M3", "U8", "model.layers.0.mlp.experts.1.up_proj.weight"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    directory = tmp_path_factory.mktemp("valid") / "c"
    plan = write_checkpoint(directory, "gpt-oss-120b", layers=2, experts=3, scale=0.01)
    return (directory / plan.files[0].name).read_bytes()


def read_or_refuse(directory: Path, data: bytes) -> None:
    (directory / "model.safetensors").write_bytes(data)
    for include in ("experts", "all"):
        with contextlib.suppress(CheckpointError):
            manifest = read_checkpoint(directory, "m", include).manifest  # type: ignore[arg-type]
            assert len(manifest.digest) == 64
            names = {name.partition("[")[0] for i in range(len(manifest)) for name in manifest.tensor_names(i)}
            header, _ = split(data)
            assert names <= set(header)
            assert include == "experts" or names == set(header) - {"__metadata__"}


def split(data: bytes) -> tuple[Header, bytes]:
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


@FUZZ
@given(at=st.integers(0, 3333), byte=st.integers(0, 255), cut=st.none() | st.integers(0, 9999))
def test_any_byte_may_change(valid: bytes, tmp_path: Path, at: int, byte: int, cut: int | None) -> None:
    data = bytearray(valid)
    data[at] = byte
    read_or_refuse(tmp_path, bytes(data[:cut]))


@FUZZ
@given(data=st.data())
def test_any_value_of_the_header_may_be_anything(valid: bytes, tmp_path: Path, data: st.DataObject) -> None:
    header, rest = split(valid)
    name = data.draw(st.sampled_from(sorted(header)))
    field = data.draw(st.sampled_from(["", "dtype", "shape", "data_offsets"]))
    value = data.draw(JSON)
    if field and name != "__metadata__":
        header[name][field] = value
    else:
        header[name] = value
    write_raw(tmp_path / "model.safetensors", json.dumps(header).encode(), rest)
    read_or_refuse(tmp_path, (tmp_path / "model.safetensors").read_bytes())


@FUZZ
@given(data=st.data())
def test_any_tensor_may_have_any_name_and_split_of_its_sides(valid: bytes, tmp_path: Path, data: st.DataObject) -> None:
    header, rest = split(valid)
    part = st.sampled_from(
        ["model", "layers", "experts", "0", "1", "99999999", "1" * 30, "gate_up_proj", "w1", "", "x"]
    )
    for name in data.draw(st.lists(st.sampled_from(sorted(set(header) - {"__metadata__"})), max_size=5, unique=True)):
        entry = header.pop(name)
        begin, end = entry["data_offsets"]
        sides = data.draw(st.sampled_from([[end - begin], [1, end - begin], [end - begin, 1], [1, 1, end - begin]]))
        header[data.draw(st.lists(part, min_size=1, max_size=7).map(".".join))] = {
            **entry,
            "dtype": "U8",
            "shape": sides,
        }
    write_raw(tmp_path / "model.safetensors", json.dumps(header).encode(), rest)
    read_or_refuse(tmp_path, (tmp_path / "model.safetensors").read_bytes())


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

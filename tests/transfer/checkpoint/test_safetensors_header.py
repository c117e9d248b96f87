"""Every way a file's header can be wrong has its own message, and no damage gets past as another kind of error."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.transfer.checkpoint.damage import EXPERT, FUZZ, JSON, Header, entries, header_of, refused, write, write_raw
from transfer.checkpoint import read_checkpoint
from transfer.checkpoint.safetensors_header import HEADER_NBYTES_MAX
from transfer.checkpoint.synth import write_checkpoint
from transfer.errors import CheckpointError


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


# -- any damage ------------------------------------------------------------------------------------------------


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

"""Small checkpoints, header by header, for tests that damage them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from transfer.checkpoint import read_checkpoint
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


def change_index(directory: Path, change: Callable[[dict[str, str]], object]) -> Path:
    document = json.loads((directory / INDEX).read_text())
    change(document["weight_map"])
    (directory / INDEX).write_text(json.dumps(document))
    return directory


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=9)
    | st.sampled_from(["BF16", "F4", "F6_E2M3", "U8", "model.layers.0.mlp.experts.1.up_proj.weight"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

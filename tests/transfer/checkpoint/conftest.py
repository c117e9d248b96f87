"""Checkpoints to be damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.transfer.checkpoint.damage import INDEX, Header, entries, header_of, write, write_raw


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

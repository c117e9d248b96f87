"""Where downloaded models lie. The library is a double: it is an engine's, and not ours."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from transfer.checkpoint.hub import hub_directory


def test_the_cache_is_asked_and_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []

    def snapshot_download(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(tmp_path)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    assert hub_directory("qwen/qwen3", "main") == tmp_path
    assert asked == [("qwen/qwen3", {"revision": "main", "local_files_only": True})]


@pytest.mark.parametrize("error", [OSError("not there"), ValueError("no name"), RuntimeError("of its own")])
def test_a_model_that_is_not_there_has_no_directory(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def snapshot_download(name: str, **options: Any) -> str:
        raise error

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    assert hub_directory("qwen/qwen3", None) is None


def test_without_the_library_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert hub_directory("qwen/qwen3", None) is None

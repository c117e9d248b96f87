"""A start of vLLM gets every tensor once, from memory first, and never fails for a node's sake."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shm.errors import InvalidInput
from tests.transfer.kept import NOBODY, Kept
from transfer.client.loader import Named
from transfer.vllm import weights as module
from transfer.vllm.weights import DEFAULT_URL, Pass, Settings


def settings_of(kept: Kept | None, **more: Any) -> Settings:
    extra = {} if kept is None else {"model": "tiny", "namespace": kept.name.namespace}
    return replace(Settings.take({"url": NOBODY, **extra})[0], **more)


class Reading:
    """vLLM's own reading of a directory, and whether it was begun."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.tensors: dict[str, torch.Tensor] = {}
        for file in directory.glob("*.safetensors"):
            self.tensors |= load_file(file)
        self.is_begun = False

    def __call__(self) -> Iterator[Named]:
        self.is_begun = True
        if not self.tensors:
            raise RuntimeError(f"Cannot find any model weights with {self._directory}")
        yield from self.tensors.items()


def weights(settings: Settings, directory: Path, passes: list[Pass], reading: Reading) -> Iterator[Named]:
    return module.weights(settings, directory, passes, reading, lambda digest: None)


def assert_same(given: list[Named], right: dict[str, torch.Tensor]) -> None:
    assert sorted(name for name, _ in given) == sorted(right), "each once"
    assert all(torch.equal(tensor, right[name]) for name, tensor in given)


def test_all_comes_from_memory_and_vllm_reads_nothing(
    tiny_qwen3_moe: Path, keep: Callable[..., Kept], bare: Path
) -> None:
    reading = Reading(bare)
    given = list(weights(settings_of(keep(tiny_qwen3_moe)), bare, [Pass("cpu")], reading))
    assert_same(given, Reading(tiny_qwen3_moe).tensors)
    assert not reading.is_begun


def test_in_several_passes_each_brings_its_own(tiny_qwen3_moe: Path, keep: Callable[..., Kept], bare: Path) -> None:
    passes = [Pass("cpu", lambda name: "down" in name), Pass("cpu", lambda name: "up" in name)]
    given = list(weights(settings_of(keep(tiny_qwen3_moe)), bare, passes, Reading(bare)))
    right = {n: t for n, t in Reading(tiny_qwen3_moe).tensors.items() if "down" in n or "up" in n}
    assert_same(given, right)


def test_what_a_device_cannot_take_is_handed_out_in_host_memory(
    tiny_qwen3_moe: Path, keep: Callable[..., Kept], bare: Path
) -> None:
    reading = Reading(bare)
    passes = [Pass("cpu", lambda name: "down" in name), Pass("cuda:99", lambda name: "down" not in name)]
    given = list(weights(settings_of(keep(tiny_qwen3_moe)), bare, passes, reading))
    assert_same(given, Reading(tiny_qwen3_moe).tensors)
    assert not reading.is_begun


def test_a_model_without_experts_is_read_by_vllm(
    tmp_path: Path, tiny_qwen3_moe: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from safetensors.torch import save_file

    save_file({"model.norm.weight": torch.arange(7.0)}, tmp_path / "model.safetensors")
    reading = Reading(tmp_path)
    with caplog.at_level(logging.WARNING, "hotspare.vllm"):
        assert_same(list(weights(settings_of(None), tmp_path, [Pass("cpu")], reading)), reading.tensors)
    assert reading.is_begun
    assert "Hotspare gave 0 tensors" in caplog.text


def test_what_breaks_in_the_middle_is_gone_on_with_by_vllm_and_no_tensor_comes_twice(
    tiny_qwen3_moe: Path, keep: Callable[..., Kept], bare: Path
) -> None:
    """The last block is wrong in memory, and its file is gone: vLLM may know of another place."""
    kept, reading = keep(tiny_qwen3_moe), Reading(tiny_qwen3_moe)
    kept.segment.block(14)[99] ^= 8
    given = list(weights(settings_of(kept), bare, [Pass("cpu")], reading))
    assert_same(given, reading.tensors)
    assert reading.is_begun


@pytest.mark.parametrize("wanted", [None, lambda name: True], ids=["all", "filtered"])
def test_experts_alone_are_not_taken_for_a_model(
    tiny_qwen3_moe: Path, keep: Callable[..., Kept], bare: Path, wanted: Any
) -> None:
    """Dense parameters of a quantised model would stay as they were allocated: vLLM looks at none of them."""
    kept = keep(tiny_qwen3_moe, "experts")
    with pytest.raises(RuntimeError, match="Cannot find any model weights") as raised:
        list(weights(settings_of(kept), bare, [Pass("cpu", wanted)], Reading(bare)))
    assert "the nodes keep experts alone" in raised.value.__notes__[0]


def test_options_are_taken_and_the_others_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOTSPARE_URL", raising=False)
    assert Settings.take({})[0].url == DEFAULT_URL
    monkeypatch.setenv("HOTSPARE_URL", "http://here:1")
    monkeypatch.setenv("HOTSPARE_TRANSPORT", "rdma")
    ours, rest = Settings.take({"model": "m", "num_threads": 3})
    assert (ours.url, ours.model, ours.namespace, ours.transport) == ("http://here:1", "m", "default", "rdma")
    assert rest == {"num_threads": 3}
    assert Settings.take({"url": "http://there:2"})[0].url == "http://there:2"
    with pytest.raises(InvalidInput, match="url is 7: give text"):
        Settings.take({"url": 7})

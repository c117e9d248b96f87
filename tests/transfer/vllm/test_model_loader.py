"""What our loader asks for, and where: on a stand-in for vLLM's loader; with vLLM itself in tests/engines/vllm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.transfer.kept import NOBODY, Kept
from tests.transfer.vllm.rank import Model
from transfer.checkpoint import read_checkpoint
from transfer.checkpoint.content import pin
from transfer.vllm import model_loader as module
from transfer.vllm.model_loader import directory_of, model_loader, passes_for


class Theirs:
    """vLLM's default loader, as far as ours calls it."""

    def __init__(self, load_config: Any) -> None:
        assert load_config.load_format == "auto"
        assert set(load_config.model_loader_extra_config) <= {"num_threads"}, "vLLM refuses what it does not know"

    def get_all_weights(self, model_config: Any, model: Any) -> Iterator[Any]:
        for source in (source_of(model_config.model), *getattr(model, "secondary_weights", ())):
            yield from self._get_weights_iterator(source)

    def _get_weights_iterator(self, source: Any) -> Iterator[Any]:
        for file in sorted(Path(source.model_or_path).glob("*.safetensors")):
            yield from ((source.prefix + name, tensor) for name, tensor in load_file(file).items())


def source_of(directory: str, **more: Any) -> Any:
    plain = {"prefix": "", "subfolder": None, "allow_patterns_overrides": None, "is_unused_weight": None}
    return SimpleNamespace(model_or_path=directory, revision=None, **{**plain, **more})


@pytest.fixture
def load(
    tiny_qwen3_moe: Path, keep: Callable[..., Kept], bare: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Any], dict[str, torch.Tensor]]:
    """`load(model)` → what a loader hands that model of a directory without weights."""
    monkeypatch.setattr(module, "device_for", lambda has_slices: "cpu")
    kept = keep(tiny_qwen3_moe)
    ours = {"url": NOBODY, "model": "tiny", "namespace": kept.name.namespace}
    config = SimpleNamespace(load_format="hotspare", model_loader_extra_config={**ours, "num_threads": 3})

    def run(model: Any) -> dict[str, torch.Tensor]:
        given = list(model_loader(Theirs)(config).get_all_weights(SimpleNamespace(model=str(bare)), model))
        assert len(dict(given)) == len(given)
        assert config.load_format == "hotspare", "it is vLLM's own, and others look at it"
        return dict(given)

    return run


def experts_in(names: Any) -> set[int]:
    return {int(name.split(".experts.")[1].split(".")[0]) for name in names if ".experts." in name}


def test_the_content_of_what_was_loaded_is_kept_with_the_model(load: Callable[..., Any], tiny_qwen3_moe: Path) -> None:
    model = Model()
    load(model)
    assert getattr(model, module.CONTENT) == pin(read_checkpoint(tiny_qwen3_moe, "tiny", "all")).digest.hex()


def test_a_rank_is_handed_its_own_experts_and_every_dense_tensor(
    load: Callable[..., Any], tiny_qwen3_moe: Path
) -> None:
    right = load_file(tiny_qwen3_moe / "model.safetensors")
    dense = {name for name in right if ".experts." not in name}
    for rank, experts in ((0, {0, 2, 4}), (1, {1, 3})):
        given = load(Model(rank=rank, ranks=2))
        assert experts_in(given) == experts
        assert given.keys() >= dense
        assert all(torch.equal(tensor, right[name]) for name, tensor in given.items())


@pytest.mark.parametrize("model", [Model(), torch.nn.Linear(1, 1), Model(rank=0, ranks=2, is_balanced=True)])
def test_a_rank_that_may_take_any_expert_is_handed_all(
    load: Callable[..., Any], tiny_qwen3_moe: Path, model: Any
) -> None:
    assert load(model).keys() == load_file(tiny_qwen3_moe / "model.safetensors").keys()


def test_other_checkpoints_that_the_model_names_are_vllms_to_read(
    load: Callable[..., Any], tiny_mixtral: Path, tiny_qwen3_moe: Path
) -> None:
    model = Model()
    model.secondary_weights = [source_of(str(tiny_mixtral), prefix="draft.")]
    theirs = {f"draft.{name}" for name in load_file(tiny_mixtral / "model.safetensors")}
    assert load(model).keys() == load_file(tiny_qwen3_moe / "model.safetensors").keys() | theirs


def test_of_other_ranks_experts_only_what_this_one_can_use_is_looked_up_in_host_memory() -> None:
    mine = frozenset({1, 2})
    stem = "model.layers.3.mlp.experts"
    names = [
        f"{stem}.{expert}.up_proj.{kind}" for expert in (1, 5) for kind in ("weight", "weight_scale", "input_scale")
    ]
    names += ["model.norm.weight", f"{stem}.gate_up_proj", "mtp.fc.weight"]
    passes = passes_for(mine, lambda name: name.startswith("mtp."), "cuda:1")
    brought = {device: [name for name in names if wanted is None or wanted(name)] for device, wanted in passes}
    assert brought == {"cuda:1": [*names[:3], *names[6:8]], "cpu": [names[5]]}
    [(device, wanted)] = passes_for(mine, None, "cpu")
    assert device == "cpu"
    assert wanted is not None
    assert [name for name in names if not wanted(name)] == names[3:5]
    assert passes_for(None, None, "cuda:1") == [("cuda:1", None)]


def test_a_directory_is_that_and_a_name_is_what_was_downloaded_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert directory_of(str(tmp_path), None) == tmp_path
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert directory_of("nobody/has-this", None) is None

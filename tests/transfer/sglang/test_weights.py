"""SGLang's loads come from memory where it has what SGLang was told to load, and are SGLang's own where it has not."""

from __future__ import annotations

import shutil
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from transfer.errors import RestoreError
from transfer.sglang import weights
from transfer.sglang.weights import load_from_memory, reload_from_memory, remember_model

pytestmark = pytest.mark.usefixtures("kept_engines")
NOBODY = "http://127.0.0.1:9"  # the discard port: nothing listens
FILE = "model.safetensors"
Tensors = dict[str, torch.Tensor]


class OwnLoader:
    """SGLang's loader of a release, as far as it is asked; `_get_weights_iterator` of its own reads the files."""

    def __init__(self, **options: Any) -> None:
        self.load_config = types.SimpleNamespace(load_format="auto", draft_model_idx=None, **options)
        self.own_loads = 0

    def iterator(self, source: Any, **_: Any) -> Iterator[tuple[str, torch.Tensor]]:
        self.own_loads += 1
        file = Path(source.model_or_path) / FILE
        if not file.exists():
            raise RuntimeError(f"Cannot find any model weights with `{source.model_or_path}`")
        return iter([(source.prefix + name, tensor) for name, tensor in load_file(file).items()])

    def load(self, source: Any) -> Tensors:
        return dict(load_from_memory(lambda loader, *a, **k: loader.iterator(*a, **k), self, source))

    @staticmethod
    def _filter_mtp_weights(tensors: Iterator[tuple[str, Any]], prefix: str, index: int) -> Iterator[tuple[str, Any]]:
        return ((f"{prefix}draft{index}.{name}", tensor) for name, tensor in tensors)


def source_of(directory: Path | str, **options: Any) -> types.SimpleNamespace:
    config = types.SimpleNamespace(hf_config=types.SimpleNamespace(num_experts=5))
    given = {"revision": None, "prefix": "", "model_config": config, "allow_patterns_overrides": None}
    return types.SimpleNamespace(model_or_path=str(directory), **{**given, **options})


def differing(loaded: Tensors, right: Tensors) -> list[str]:
    same = {name for name in loaded.keys() & right.keys() if torch.equal(loaded[name], right[name])}
    return sorted((loaded.keys() | right.keys()) - same)


@pytest.fixture
def right(tiny_qwen3_moe: Path) -> Tensors:
    return load_file(tiny_qwen3_moe / FILE)


@pytest.fixture
def nodes(tiny_qwen3_moe: Path, cluster: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`nodes(include=…)` → one node that keeps the model, which HOTSPARE_URL names."""

    def start(include: str = "all") -> Any:
        started = cluster("qwen", tiny_qwen3_moe, count=1, replicas=1, include=include)
        monkeypatch.setenv("HOTSPARE_URL", started.urls[0])
        return started

    return start


@pytest.fixture
def model(tiny_qwen3_moe: Path, tmp_path: Path) -> Path:
    """A copy, whose files can be taken away."""
    return Path(shutil.copytree(tiny_qwen3_moe, tmp_path / "model"))


@pytest.mark.parametrize("files", ["there", "away"])
def test_everything_comes_from_memory(nodes: Callable[..., Any], model: Path, right: Tensors, files: str) -> None:
    nodes()
    if files == "away":
        (model / FILE).unlink()
    loader = OwnLoader()
    loaded = loader.load(source_of(model))
    for tensor in loaded.values():
        tensor.add_(0)  # some of SGLang's models change what they are given in place: the segment is not what they get
    assert differing(loaded, right) == []
    assert loader.own_loads == 0


def test_what_the_nodes_do_not_keep_comes_from_the_files_and_without_them_all_is_left_to_sglang(
    nodes: Callable[..., Any], model: Path, right: Tensors, caplog: pytest.LogCaptureFixture
) -> None:
    nodes(include="experts")
    loader = OwnLoader()
    assert differing(loader.load(source_of(model)), right) == []
    assert loader.own_loads == 0
    (model / FILE).unlink()
    with pytest.raises(RuntimeError, match="Cannot find any model weights"):
        loader.load(source_of(model))
    assert "start them with --include all" in caplog.text


def test_a_fine_tune_is_loaded_by_sglang(
    nodes: Callable[..., Any], model: Path, right: Tensors, caplog: pytest.LogCaptureFixture
) -> None:
    """Names, shapes and headers are the same."""
    nodes()
    tuned = {name: tensor * 2 for name, tensor in right.items()}
    save_file(tuned, model / FILE, metadata={"format": "pt"})
    loader = OwnLoader()
    assert differing(loader.load(source_of(model)), tuned) == []
    assert loader.own_loads == 1
    assert "loaded from disk: " in caplog.text


@pytest.mark.parametrize("node", ["none", "killed"])
def test_without_a_node_a_start_is_sglangs(
    nodes: Callable[..., Any], model: Path, right: Tensors, monkeypatch: pytest.MonkeyPatch, node: str
) -> None:
    if node == "killed":
        nodes().kill(0)
    else:
        monkeypatch.setenv("HOTSPARE_URL", NOBODY)
    loader = OwnLoader()
    assert differing(loader.load(source_of(model)), right) == []
    assert loader.own_loads == 1


@pytest.mark.parametrize(
    "aside",
    [
        "an adapter",
        "files of its own choice",
        "another format",
        "a name of the hub",
        "other weights beside no safetensors",
        "files that are to be proved",
        "the weight cache",
        "a model of other experts",
    ],
)
def test_it_stands_aside_for(
    nodes: Callable[..., Any], model: Path, right: Tensors, monkeypatch: pytest.MonkeyPatch, aside: str
) -> None:
    nodes()
    loader, source = OwnLoader(), source_of(model)
    own: Tensors = right
    if aside == "an adapter":
        source.model_config = None
    elif aside == "files of its own choice":
        source.allow_patterns_overrides = ["transformer/*.safetensors"]
    elif aside == "another format":
        loader.load_config.load_format = "pt"
    elif aside == "files that are to be proved":
        monkeypatch.setattr(weights, "model_settings", lambda: types.SimpleNamespace(model_checksum="sha256:…"))
    elif aside == "the weight cache":
        monkeypatch.setattr(weights, "model_settings", lambda: types.SimpleNamespace(weight_cache_mode="client"))
    else:  # whatever SGLang makes of it
        (model / FILE).unlink()
        own = {}
        if aside == "other weights beside no safetensors":
            (model / "pytorch_model.bin").write_bytes(b"another model")
        elif aside == "a model of other experts":
            source.model_config.hf_config.num_experts = 6
        else:
            source = source_of("somebody/a-model")
    if own:
        assert differing(loader.load(source), own) == []
    else:
        with pytest.raises(RuntimeError, match="Cannot find any model weights"):
            loader.load(source)
    assert loader.own_loads == 1


def test_what_cannot_be_had_in_the_middle_of_a_load_comes_from_sglangs_own_iterator_each_once(
    nodes: Callable[..., Any], model: Path, right: Tensors
) -> None:
    """A file system that is away for a moment: dense tensors are in no memory here."""
    nodes(include="experts")
    file, loader = model / FILE, OwnLoader()

    def own(loader: OwnLoader, source: Any) -> Iterator[tuple[str, torch.Tensor]]:
        file.with_suffix(".away").rename(file)
        return loader.iterator(source)

    tensors = load_from_memory(own, loader, source_of(model))
    loaded = dict([next(tensors)])
    file.rename(file.with_suffix(".away"))
    for name, tensor in tensors:
        assert name not in loaded
        loaded[name] = tensor
    assert differing(loaded, right) == []
    assert loader.own_loads == 1


def test_a_prefix_and_a_draft_models_names_are_sglangs(nodes: Callable[..., Any], model: Path, right: Tensors) -> None:
    nodes()
    assert OwnLoader().load(source_of(model, prefix="own.")).keys() == {f"own.{name}" for name in right}
    draft = OwnLoader()
    draft.load_config.draft_model_idx = 2
    assert draft.load(source_of(model, prefix="own.")).keys() == {f"own.draft2.{name}" for name in right}


def test_the_model_that_is_loaded_into_says_what_is_not_wanted(
    nodes: Callable[..., Any], model: Path, right: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes()
    into = torch.nn.Module()
    monkeypatch.setattr(weights, "of_rank", lambda root: lambda name: root is not into or ".experts.3." not in name)
    loader = OwnLoader()
    remember_model(lambda *_: iter(()), loader, None, into)
    loaded = loader.load(source_of(model))
    assert differing(loaded, {name: tensor for name, tensor in right.items() if ".experts.3." not in name}) == []


class OnGPU(torch.nn.Module):
    """A model whose parameters are said to lie on a GPU."""

    def parameters(self, recurse: bool = True) -> Iterator[Any]:
        yield types.SimpleNamespace(device=torch.device("cuda:77"))


def test_where_the_gpu_takes_nothing_tensors_come_through_the_processors_memory(
    nodes: Callable[..., Any], model: Path, right: Tensors, caplog: pytest.LogCaptureFixture
) -> None:
    nodes()
    loader, into = OwnLoader(), OnGPU()  # which no machine has
    remember_model(lambda *_: iter(()), loader, None, into)
    assert differing(loader.load(source_of(model)), right) == []
    assert loader.own_loads == 0
    assert "after 0 tensors loading from memory failed" in caplog.text


class Updater:
    """SGLang's weight updater: it filters what the iterator gives, and says whether it went well."""

    def __init__(self, directory: Path) -> None:
        self.loader = OwnLoader()
        self.directory = directory
        self.loaded: Tensors = {}

    def get_model(self) -> torch.nn.Module:
        return torch.nn.Module()

    def update(self, path: str, load_format: str, weight_name_filter: Any = None) -> tuple[bool, str]:
        self.loaded = self.loader.load(source_of(self.directory))
        return True, "Succeeded"


@pytest.mark.parametrize("files", ["there", "away"])
@pytest.mark.parametrize("include", ["all", "experts"])
def test_of_experts_that_were_lost_only_they_are_read(
    nodes: Callable[..., Any], model: Path, right: Tensors, include: str, files: str
) -> None:
    nodes(include)
    if files == "away":
        (model / FILE).unlink()
    updater = Updater(model)

    def lost(name: str) -> bool:
        return ".layers.1.mlp.experts.2." in name

    answer = reload_from_memory(Updater.update, updater, str(model), "auto", weight_name_filter=lost)
    assert answer == (True, "Succeeded")
    assert differing(updater.loaded, {name: tensor for name, tensor in right.items() if lost(name)}) == []
    assert updater.loader.own_loads == 0


def test_a_reload_of_lost_experts_ends_by_a_deadline_and_other_loads_take_their_time(
    nodes: Callable[..., Any], model: Path, right: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes()
    monkeypatch.setattr(weights, "RELOAD_DEADLINE_S", -1.0)
    updater = Updater(model)
    with pytest.raises(RestoreError, match="this rank gives up"):
        reload_from_memory(Updater.update, updater, str(model), "auto", lambda name: ".experts." in name)
    reload_from_memory(Updater.update, updater, str(model), "auto")
    assert differing(updater.loaded, right) == []
    monkeypatch.setenv("HOTSPARE_URL", NOBODY)
    with pytest.raises(RestoreError, match="this rank gives up"):  # SGLang's own iterator is held to it as well
        reload_from_memory(Updater.update, updater, str(model), "auto", lambda name: ".experts." in name)

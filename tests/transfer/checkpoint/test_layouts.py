"""Every vendor's layout: each tensor comes out of memory by its name, byte for byte, each expert's with its expert."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from shm import attach
from tests.transfer.checkpoint.layouts import LAYOUTS, Layout
from tests.transfer.client.test_loader import Kept, content_of, differing
from transfer.checkpoint import read_checkpoint
from transfer.errors import CheckpointError

TinyCheckpoint = Callable[..., Path]
OURS = ("granitemoe", "aria_text", "laguna", "longcat_flash", "step3p7", "ernie4_5_vl_moe")
REFUSED = {"jetmoe": "JetMoE", "nllb_moe": "NLLB", "switch_transformers": "Switch", "dbrx": "DBRX"}


@pytest.fixture
def keep() -> Iterator[Callable[[Path], Kept]]:
    """`keep(directory)` → a sealed segment of all of it."""
    made: list[Kept] = []

    def make(directory: Path) -> Kept:
        made.append(Kept(directory, "all", lambda row: True))
        return made[-1]

    yield make
    for kept in made:
        kept.segment.unlink()


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A directory without weights."""
    (tmp_path / "bare").mkdir()
    return tmp_path / "bare"


def experts_of(kept: Kept) -> dict[str, dict[int, torch.Tensor]]:
    """Checkpoint name → what each expert has under it, by its number, through `attach`."""
    found: dict[str, dict[int, torch.Tensor]] = defaultdict(dict)
    with attach("tiny", namespace=kept.name.namespace) as attached:
        for layer, expert in attached.experts():
            for name, tensor in attached.expert(layer, expert).items():
                found[name][expert] = tensor
    return found


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_tensor_comes_out_by_name_and_each_experts_with_its_expert(
    layout: Layout, tmp_path: Path, keep: Callable[[Path], Kept], bare: Path
) -> None:
    directory = layout.write(tmp_path / "model")
    right = content_of(directory)
    kept = keep(directory)
    layers: dict[int, int] = defaultdict(int)
    for key in kept.manifest.keys:
        layers[key.layer] += key.is_expert
    assert {layer: count for layer, count in layers.items() if count} == layout.layers
    with kept.loader(bare) as loader:
        assert differing(loader.load(), right) == []
        assert loader.report.tensors == len(right), "each once"
    found = experts_of(kept)
    assert found.keys() == layout.own.keys() | layout.fused.keys() | layout.common.keys()
    for name, by_expert in found.items():
        tensors = [by_expert[expert] for expert in sorted(by_expert)]
        if name in layout.fused:
            assert sorted(by_expert) == list(range(len(right[name])))
            assert differing({name: torch.stack([bits(t) for t in tensors])}, {name: bits(right[name])}) == []
        else:
            assert len(tensors) == (1 if name in layout.own else max(layout.layers.values()))
            assert [differing({name: tensor}, {name: right[name]}) for tensor in tensors] == [[]] * len(tensors)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes: torch stacks no floats of eight bits."""
    return tensor.contiguous().view(torch.uint8)


def test_what_experts_have_in_common_is_found_by_each_ones_name_too(
    tmp_path: Path, keep: Callable[[Path], Kept]
) -> None:
    layout = LAYOUTS["llama-4-nvfp4"]
    right = content_of(layout.write(tmp_path))
    with attach("tiny", namespace=keep(tmp_path).name.namespace) as attached:
        for name in layout.common:
            assert torch.equal(attached[f"{name}[*3]"], right[name])
            if ".layers.1." in name:
                assert torch.equal(attached.expert(1, 3)[f"{name}[*3]"], right[name])
        assert len(list(attached)) == len(set(attached)) == len(attached)


def test_by_default_an_experts_block_has_what_the_layers_experts_have_in_common(tmp_path: Path) -> None:
    layout = LAYOUTS["llama-4-nvfp4"]
    manifest = read_checkpoint(layout.write(tmp_path), "m").manifest
    assert all(key.is_expert for key in manifest.keys)
    assert f"{min(layout.common)}[*3]" in set(manifest.tensor_names(manifest.index(0, 3)))


@pytest.mark.parametrize("is_fused", [False, True], ids=["published", "fused"])
@pytest.mark.parametrize("name", OURS)
def test_what_transformers_writes_comes_out_whole(
    name: str, is_fused: bool, tiny_checkpoint: TinyCheckpoint, keep: Callable[[Path], Kept], bare: Path
) -> None:
    directory = tiny_checkpoint(name, is_fused=is_fused)
    right = content_of(directory)
    kept = keep(directory)
    with kept.loader(bare) as loader:
        assert differing(loader.load(), right) == []
    found = experts_of(kept)
    assert all(right[expert].ndim > 1 for expert in found)
    assert not {n for n, tensor in right.items() if tensor.ndim == 3 and "conv" not in n} - found.keys()


@pytest.mark.parametrize(("name", "says"), REFUSED.items(), ids=REFUSED)
def test_what_is_not_read_is_refused_by_its_pattern(name: str, says: str, tiny_checkpoint: TinyCheckpoint) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tiny_checkpoint(name), "m")
    assert says in str(caught.value)
    assert ".N." in str(caught.value)
    assert "download" not in str(caught.value)

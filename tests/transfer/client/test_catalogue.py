"""A checkpoint's own names over blocks, fused tensors put together from their shares, windows of blocks."""

from __future__ import annotations

import pytest
import torch

from shm.block import DENSE, ExpertKey, TensorEntry
from shm.manifest import FileSpec, Manifest
from transfer.client.catalogue import Assembler, Catalogue, windows

FUSED = "model.layers.{layer}.mlp.experts.down_proj"
EXPERTS = 3


def mixed() -> Manifest:
    """A layer of three experts with a fused tensor and one of their own, and the layer's norm."""
    entries = [
        TensorEntry(f"{FUSED}[{{expert}}]", "F4", (2, 4), 0, 0),
        TensorEntry("model.layers.{layer}.mlp.experts.{expert}.bias", "BF16", (), 0, 0),
    ]
    blocks = {ExpertKey(1, expert): entries for expert in range(EXPERTS)}
    blocks[ExpertKey(1, DENSE)] = [TensorEntry("model.layers.{layer}.norm", "F32", (3,), 0, 0)]
    return Manifest.build("tiny", "test", "all", [FileSpec("f", 1 << 20, "0" * 32)], blocks)


def everything(_: str) -> bool:
    return True


def test_names_are_the_checkpoints_own() -> None:
    catalogue = Catalogue(mixed(), lambda name: "experts" in name)
    fused = FUSED.replace("{layer}", "1")
    names = {part.name for parts in catalogue.parts.values() for part in parts}
    assert names == {fused, *(f"model.layers.1.mlp.experts.{expert}.bias" for expert in range(EXPERTS))}
    assert catalogue.all_names - names == {"model.layers.1.norm"}
    assert catalogue.shares == {fused: EXPERTS}
    assert len(catalogue.parts) == EXPERTS, "the norm's block is not needed"


def test_nothing_is_wanted_of_a_block_that_is_left_out() -> None:
    assert Catalogue(mixed(), lambda _: False).parts == {}


def test_a_fused_tensor_is_handed_out_with_its_last_share_in_any_order() -> None:
    manifest = mixed()
    catalogue = Catalogue(manifest, everything)
    assembler = Assembler(catalogue, "cpu")
    rows = [manifest.index(1, expert) for expert in (2, 0, 1)]
    blocks = {row: torch.randint(0, 256, (int(manifest.nbytes[row]),), dtype=torch.uint8) for row in rows}
    found = [dict(assembler.add(row, blocks[row])) for row in rows]
    assert [len(each) for each in found] == [1, 1, 2]
    whole = found[-1][FUSED.replace("{layer}", "1")]
    assert (whole.shape, whole.dtype) == ((EXPERTS, 2, 2), torch.float4_e2m1fn_x2)
    for expert, row in zip((2, 0, 1), rows, strict=True):
        share = next(part for part in catalogue.parts[row] if part.expert is not None).template
        assert torch.equal(whole[expert].view(torch.uint8).reshape(-1), blocks[row][share.offset :][: share.nbytes])
        assert found[rows.index(row)][f"model.layers.1.mlp.experts.{expert}.bias"].shape == ()


@pytest.mark.parametrize(
    ("nbytes", "sizes"), [(1, [1, 1, 1, 1]), (10**9, [4])], ids=["a block that is larger is alone", "all"]
)
def test_windows_take_what_fits(nbytes: int, sizes: list[int]) -> None:
    manifest = mixed()
    found = list(windows(manifest, range(len(manifest)), nbytes))
    assert [len(window) for window in found] == sizes
    assert [row for window in found for row in window] == list(range(len(manifest)))

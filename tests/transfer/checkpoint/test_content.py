"""The content digest: the same whoever takes it, and another one for other bytes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shm import ExpertKey
from shm.manifest import Manifest
from transfer.checkpoint import Checkpoint, read_checkpoint
from transfer.checkpoint import content as content_module
from transfer.checkpoint.content import (
    DIGEST_NBYTES,
    WINDOW_NBYTES,
    Content,
    identities,
    pin,
    read_content,
    sample_of,
    windows,
)
from transfer.errors import CheckpointError


@pytest.fixture
def copy(moe_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint of the test's own, to be changed."""
    return Path(shutil.copytree(moe_checkpoint, tmp_path / "copy"))


@pytest.fixture
def content(moe_checkpoint: Path) -> Content:
    return read_content(read_checkpoint(moe_checkpoint, "moe"))


def overwrite(checkpoint: Checkpoint, row: int, number: int, seed: int = 3) -> None:
    """Other bytes for one tensor of one block, as training would leave it."""
    tensor = checkpoint.manifest.block(row).tensors[number]
    with checkpoint.path(tensor.file).open("r+b") as file:
        file.seek(tensor.file_offset)
        file.write(np.random.Generator(np.random.SFC64([seed, row, number])).bytes(tensor.nbytes))


def test_files_and_memory_give_the_same_samples(
    content: Content, moe_checkpoint: Path, expected_blocks: Callable[..., Mapping[ExpertKey, bytes]]
) -> None:
    blocks = expected_blocks(moe_checkpoint)
    manifest = content.manifest
    taken = b"".join(sample_of(manifest, row, memoryview(blocks[key])) for row, key in enumerate(manifest.keys))
    assert taken == content.samples
    assert Content(manifest, taken).digest == content.digest
    assert len(content.digest) == DIGEST_NBYTES


def test_a_copy_elsewhere_is_the_same_content(content: Content, copy: Path) -> None:
    for path in copy.iterdir():
        os.utime(path, (1, 1))
    assert read_content(read_checkpoint(copy, "moe")).digest == content.digest


def test_any_one_tensor_of_any_block_makes_another_content(content: Content, copy: Path) -> None:
    """A page of the first tensor of each block was all that was looked at: a change in up_proj alone went unseen."""
    checkpoint = read_checkpoint(copy, "moe")
    tensors = len(checkpoint.manifest.schema(0).tensors)
    seen = {content.digest}
    for row in (0, 17, len(checkpoint.manifest) - 1):
        for number in range(tensors):
            overwrite(checkpoint, row, number)
            assert read_checkpoint(copy, "moe").manifest == checkpoint.manifest
            changed = read_content(checkpoint)
            first = row * DIGEST_NBYTES
            assert changed.samples[first : first + DIGEST_NBYTES] != content.samples[first : first + DIGEST_NBYTES]
            seen.add(changed.digest)
    assert len(seen) == 3 * tensors + 1


def test_a_block_with_one_tensor_of_another_content_is_not_of_this_one(
    content: Content, moe_checkpoint: Path, expected_blocks: Callable[..., Mapping[ExpertKey, bytes]]
) -> None:
    key = content.manifest.keys[17]
    block = bytearray(expected_blocks(moe_checkpoint)[key])
    assert content.has(17, memoryview(block))
    assert not content.has(16, memoryview(block))
    tensor = content.manifest.schema(17).tensors[3]
    block[tensor.offset : tensor.offset + tensor.nbytes] = bytes(tensor.nbytes)
    assert not content.has(17, memoryview(block))


def test_small_tensors_are_taken_whole_and_large_ones_by_a_window(
    make_manifest: Callable[..., Manifest],
) -> None:
    small, large = make_manifest(rows=11, cols=13), make_manifest(rows=333, cols=77)
    assert [(at, nbytes) for _, at, nbytes in windows(small.schema(0), 0)] == [(0, 2 * 11 * 13)] * 3
    nbytes = 2 * 333 * 77
    places = set()
    for row in range(len(large)):
        for _, at, size in windows(large.schema(row), row):
            assert size == WINDOW_NBYTES
            assert 0 <= at <= nbytes - size
            places.add(at)
    assert len(places) > len(large), "each block is looked at elsewhere"


def test_a_file_that_was_cut_short_is_named(copy: Path) -> None:
    checkpoint = read_checkpoint(copy, "moe")
    last = max(
        (t for row in range(len(checkpoint.manifest)) for t in checkpoint.manifest.block(row).tensors),
        key=lambda t: (t.file, t.file_offset),
    )
    os.truncate(checkpoint.path(last.file), last.file_offset)
    with pytest.raises(CheckpointError, match=f"{checkpoint.path(last.file)} ends before byte"):
        read_content(checkpoint)


def touched(path: Path) -> None:
    os.utime(path, (1, 1))


def replaced(path: Path) -> None:
    stat, data = path.stat(), path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def grown(path: Path) -> None:
    stat = path.stat()
    os.truncate(path, stat.st_size + 3)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("change", [touched, replaced, grown])
def test_a_files_identity_changes_with_what_is_done_to_it(copy: Path, change: Callable[[Path], Any]) -> None:
    checkpoint = read_checkpoint(copy, "moe")
    before = identities(checkpoint)
    assert identities(checkpoint) == before
    change(checkpoint.path(1))
    after = identities(checkpoint)
    assert [number for number in before if before[number] != after[number]] == [1]


def test_files_that_are_gone_have_no_identity(copy: Path) -> None:
    checkpoint = read_checkpoint(copy, "moe")
    checkpoint.path(1).unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        identities(checkpoint)


def test_a_checkpoint_that_changes_while_it_is_read_is_refused(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = read_checkpoint(copy, "moe")

    def read_slowly(checkpoint: Checkpoint) -> Content:
        read = read_content(checkpoint)
        touched(checkpoint.path(1))
        return read

    with monkeypatch.context() as patch:
        patch.setattr(content_module, "read_content", read_slowly)
        with pytest.raises(CheckpointError, match="changed while it was read"):
            pin(checkpoint)
    pinned = pin(checkpoint)
    assert pinned.is_unchanged()
    touched(checkpoint.path(0))
    assert not pinned.is_unchanged()

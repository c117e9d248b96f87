"""Whether a segment's content came from the checkpoint that is on disk now."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shm.layout import SegmentName
from shm.segment import Segment
from transfer.checkpoint import Checkpoint, origin, read_checkpoint
from transfer.checkpoint.origin import first_difference, identity
from transfer.errors import CheckpointError
from transfer.sources import DiskSource

ROWS = range(3, 36)  # of 39


@pytest.fixture
def checkpoint(moe_checkpoint: Path, tmp_path: Path) -> Checkpoint:
    """Of the test's own."""
    return read_checkpoint(shutil.copytree(moe_checkpoint, tmp_path / "c"), "moe")


@pytest.fixture
def segment(checkpoint: Checkpoint, namespace: str) -> Iterator[Segment]:
    """Has some of its blocks."""
    made = Segment.claim(SegmentName(namespace, "moe", "n0"))
    made.allocate(checkpoint.manifest, ROWS)
    disk = DiskSource(checkpoint)
    for row in ROWS:
        made.publish(row, disk.read_block(row, made.block(row)))
    disk.close()
    yield made
    made.close()


def first_file(checkpoint: Checkpoint) -> Path:
    return checkpoint.path(0)


def replace_by_a_copy(path: Path) -> None:
    stat = path.stat()
    shutil.copy2(path, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)


def grow(path: Path) -> None:
    stat = path.stat()
    with path.open("ab") as file:
        file.write(b"x")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize(
    "change",
    [lambda path: os.utime(path, (1, 1)), replace_by_a_copy, grow],
    ids=["touched", "replaced", "larger"],
)
def test_files_that_were_changed_replaced_or_touched_have_another_identity(
    checkpoint: Checkpoint, change: Callable[[Path], object]
) -> None:
    before = identity(checkpoint)
    assert identity(checkpoint) == before
    assert len(before) == 16
    change(first_file(checkpoint))
    assert identity(checkpoint) != before


def test_the_same_bytes_show_no_difference(checkpoint: Checkpoint, segment: Segment) -> None:
    assert first_difference(checkpoint, segment) is None


def test_a_block_of_other_bytes_is_named(checkpoint: Checkpoint, segment: Segment) -> None:
    for tensor in checkpoint.manifest.block(17).tensors:
        with checkpoint.path(tensor.file).open("r+b") as file:
            file.seek(tensor.file_offset)
            file.write(bytes(tensor.nbytes))
    assert first_difference(checkpoint, segment) == checkpoint.manifest.keys[17]


def test_blocks_that_are_not_published_are_not_compared(checkpoint: Checkpoint, segment: Segment) -> None:
    segment.block(17)[:] = bytes(len(segment.block(17)))
    segment.quarantine(17)
    assert first_difference(checkpoint, segment) is None


def test_of_many_blocks_a_sample_over_all_of_them_is_compared(
    checkpoint: Checkpoint, segment: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(origin, "SAMPLED_BLOCKS_MAX", 11)
    for row in ROWS[1:3]:
        segment.block(row)[:] = bytes(len(segment.block(row)))
    assert first_difference(checkpoint, segment) is None, "33 blocks, every third"
    segment.block(ROWS[30])[:] = bytes(len(segment.block(ROWS[30])))
    assert first_difference(checkpoint, segment) == checkpoint.manifest.keys[ROWS[30]]


def test_a_file_that_is_gone_is_an_error_that_names_it(checkpoint: Checkpoint, segment: Segment) -> None:
    lost = checkpoint.path(checkpoint.manifest.block(ROWS[0]).tensors[0].file)
    lost.unlink()
    with pytest.raises(CheckpointError, match=str(lost)):
        identity(checkpoint)
    with pytest.raises(CheckpointError, match=str(lost)):
        first_difference(checkpoint, segment)

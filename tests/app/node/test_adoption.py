"""Which content a node's checkpoint directory has now, whatever it had before."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.node.adoption import OwnCheckpoint
from shm.layout import SegmentName
from shm.segment import Segment
from transfer.checkpoint import content, read_checkpoint
from transfer.checkpoint.content import PinnedCheckpoint, pin
from transfer.errors import CheckpointError


@pytest.fixture
def directory(moe_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint of the test's own."""
    return Path(shutil.copytree(moe_checkpoint, tmp_path / "c"))


@pytest.fixture
def segment(namespace: str) -> Iterator[Segment]:
    """Empty, and owned by this process."""
    claimed = Segment.claim(SegmentName(namespace, "moe", "n0"))
    yield claimed
    claimed.close()


@pytest.fixture
def pinned(directory: Path, segment: Segment) -> Callable[[], PinnedCheckpoint | None]:
    """`pinned()` → what one node says of the directory, again and again."""
    own = OwnCheckpoint(directory, "moe", "experts")
    return lambda: own.pinned(segment)


def overwrite(directory: Path) -> None:
    """Other weights under the same headers."""
    checkpoint = read_checkpoint(directory, "moe")
    tensor = checkpoint.manifest.block(7).tensors[0]
    with checkpoint.path(tensor.file).open("r+b") as file:
        file.seek(tensor.file_offset)
        file.write(os.urandom(tensor.nbytes))


def remember(directory: Path, segment: Segment) -> None:
    """Have the segment be of the directory's content, filled from its very files."""
    told = pin(read_checkpoint(directory, "moe"))
    segment.allocate(told.checkpoint.manifest, range(3))
    segment.record_content(told.digest)
    segment.record_origin(told.origin)


def test_the_same_files_are_told_once(pinned: Callable[[], PinnedCheckpoint]) -> None:
    assert pinned() is pinned()


def test_files_that_were_exchanged_meanwhile_are_told_anew(
    directory: Path, pinned: Callable[[], PinnedCheckpoint]
) -> None:
    before = pinned()
    overwrite(directory)
    after = pinned()
    assert after.digest != before.digest
    assert after.content is not None
    assert after.is_unchanged()


def test_a_directory_that_cannot_be_read_is_an_error_each_time_until_it_can(
    directory: Path, tmp_path: Path, pinned: Callable[[], PinnedCheckpoint]
) -> None:
    before = pinned()
    directory.rename(tmp_path / "away")
    for _ in range(2):
        with pytest.raises(CheckpointError):
            pinned()
    (tmp_path / "away").rename(directory)
    assert pinned().digest == before.digest


def test_a_node_without_a_directory_has_no_checkpoint(segment: Segment) -> None:
    assert OwnCheckpoint(None, "moe", "experts").pinned(segment) is None


def test_the_very_files_that_a_segment_was_filled_from_are_not_read_again(
    directory: Path, segment: Segment, pinned: Callable[[], PinnedCheckpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    remember(directory, segment)
    monkeypatch.setattr(content, "read_content", lambda _: pytest.fail("it took samples"))
    told = pinned()
    assert (told.digest, told.content) == (segment.header.content_digest, None)


@pytest.mark.parametrize("change", [overwrite, lambda directory: os.utime(next(directory.glob("*.safetensors")))])
def test_files_that_a_segment_does_not_remember_are_read(
    directory: Path, segment: Segment, pinned: Callable[[], PinnedCheckpoint], change: Callable[[Path], object]
) -> None:
    remember(directory, segment)
    change(directory)
    told = pinned()
    assert told.content is not None
    assert (told.digest == segment.header.content_digest) == (change is not overwrite)


def test_what_is_kept_must_be_the_same_too(directory: Path, segment: Segment) -> None:
    remember(directory, segment)
    told = OwnCheckpoint(directory, "moe", "all").pinned(segment)
    assert told is not None
    assert told.content is not None


def test_what_is_left_out_is_in_the_log(
    directory: Path, pinned: Callable[[], PinnedCheckpoint], caplog: pytest.LogCaptureFixture
) -> None:
    (directory / "adapter_model.safetensors").touch()
    pinned()
    assert "adapter_model.safetensors is left out: " in caplog.text

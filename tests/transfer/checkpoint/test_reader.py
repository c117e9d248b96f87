"""Blocks read from real checkpoint files."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from safetensors.numpy import save_file

from shm.block import ExpertKey
from transfer.checkpoint import Checkpoint, read_checkpoint
from transfer.checkpoint.content import identities
from transfer.checkpoint.reader import FILES_OPEN_MAX, BlockReader, position_on_disk, runs_of
from transfer.errors import CheckpointError

ROOT = Path(__file__).parents[3]
HIDDEN, INNER = 33, 7  # 462 bytes a matrix: 50 bytes of alignment between the tensors of a block
EXPERTS = 5
ExpectedBlocks = Callable[[Path, str], dict[ExpertKey, bytes]]


@pytest.fixture
def spread(tmp_path: Path) -> Path:
    """Each expert's three matrices in three files, in reverse order in one of them."""
    random = np.random.default_rng(3)
    shapes = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    weight_map = {}
    for number, (name, shape) in enumerate(shapes.items(), 1):
        file = f"model-0000{number}-of-00003.safetensors"
        tensors = {
            f"model.layers.0.mlp.experts.{e}.{name}.weight": random.standard_normal(shape).astype(np.float16)
            for e in range(EXPERTS)
        }
        save_file(tensors, tmp_path / file)
        weight_map |= dict.fromkeys(tensors, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def read(checkpoint: Checkpoint, rows: list[int]) -> tuple[list[bytes], dict[int, bytes]]:
    """Read the rows into memory full of 0xFF; the bytes, and the checksums taken."""
    reader = BlockReader(checkpoint)
    sizes = [int(checkpoint.manifest.nbytes[row]) for row in rows]
    arena = np.full(sum(sizes) + 3333 * len(rows), 0xFF, np.uint8)
    starts, at = {}, 3
    for row, nbytes in zip(rows, sizes, strict=True):
        starts[row] = at
        at += nbytes + 77
    runs = {row: memoryview(arena)[starts[row] : starts[row] + n] for row, n in zip(rows, sizes, strict=True)}
    try:
        checksums = {row: reader.read_block(row, run) for row, run in runs.items()}
    finally:
        reader.close()
    found = [bytes(runs[row]) for row in rows]
    assert (arena == 0xFF).sum() >= arena.size - sum(sizes), "bytes beyond the blocks were written"
    return found, checksums


def test_blocks_spread_over_several_files_come_whole_with_zeros_between(
    spread: Path, expected_blocks: ExpectedBlocks
) -> None:
    checkpoint = read_checkpoint(spread, "moe")
    expected = expected_blocks(spread, "moe")
    rows = list(range(EXPERTS))
    found, checksums = read(checkpoint, rows)
    assert found == [expected[checkpoint.manifest.keys[row]] for row in rows]
    assert any(b[462:512] == bytes(50) for b in found), "this test needs gaps"
    assert checksums == {row: xxhash.xxh3_128_digest(found[row]) for row in rows}


def test_a_deepseek_checkpoint_comes_byte_for_byte(moe_checkpoint: Path, expected_blocks: ExpectedBlocks) -> None:
    checkpoint = read_checkpoint(moe_checkpoint, "moe")
    expected = expected_blocks(moe_checkpoint, "moe")
    rows = list(range(len(checkpoint.manifest)))
    found, checksums = read(checkpoint, rows)
    assert found == [expected[key] for key in checkpoint.manifest.keys]
    assert checksums == {row: xxhash.xxh3_128_digest(found[row]) for row in rows}


def test_tensors_that_follow_each_other_in_file_and_block_are_one_read(tmp_path: Path) -> None:
    shape = (16, 32)  # 1,024 bytes: no gap in the block, none in the file
    names = [f"model.layers.0.mlp.experts.0.{name}.weight" for name in ("down_proj", "gate_proj", "up_proj")]
    shapes = dict(zip(names, [(32, 16), shape, shape], strict=True))
    save_file({name: np.ones(s, np.float16) for name, s in shapes.items()}, tmp_path / "model.safetensors")
    checkpoint = read_checkpoint(tmp_path, "moe")
    (run,) = runs_of(checkpoint.manifest.block(0).tensors)
    assert (run.offset, run.nbytes) == (0, 3 * 1024)


def test_positions_put_blocks_in_the_order_of_the_disk(moe_checkpoint: Path) -> None:
    checkpoint = read_checkpoint(moe_checkpoint, "moe")
    rows = range(len(checkpoint.manifest))
    by_position = sorted(rows, key=partial(position_on_disk, checkpoint.manifest))
    first = {row: checkpoint.manifest.block(row).tensors[0] for row in rows}
    assert by_position == sorted(rows, key=lambda row: (first[row].file, first[row].file_offset))


def test_a_file_cut_short_after_its_header_was_read_is_named(spread: Path) -> None:
    checkpoint = read_checkpoint(spread, "moe")
    cut = checkpoint.path(1)
    os.truncate(cut, cut.stat().st_size - 33)
    with pytest.raises(CheckpointError, match=f"{cut.name} ends before byte") as error:
        read(checkpoint, list(range(EXPERTS)))
    assert "download it again" in str(error.value).lower()


def test_a_file_that_is_gone_is_named(spread: Path) -> None:
    checkpoint = read_checkpoint(spread, "moe")
    checkpoint.path(2).unlink()
    with pytest.raises(CheckpointError, match=f"{checkpoint.path(2).name} cannot be opened"):
        read(checkpoint, [0])


def test_a_file_that_cannot_be_read_is_named(spread: Path) -> None:
    checkpoint = read_checkpoint(spread, "moe")
    checkpoint.path(0).unlink()
    checkpoint.path(0).mkdir()  # opens, and refuses to be read
    with pytest.raises(CheckpointError, match=f"{checkpoint.path(0).name} cannot be read"):
        read(checkpoint, [0])


def descriptors(directory: Path) -> int:
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return sum(os.path.realpath(link).startswith(f"{directory}/") for link in links)


def test_closing_gives_every_file_up(spread: Path) -> None:
    checkpoint = read_checkpoint(spread, "moe")
    reader = BlockReader(checkpoint)
    into = bytearray(int(checkpoint.manifest.nbytes[0]))
    assert reader.read_block(0, memoryview(into)) == xxhash.xxh3_128_digest(into)
    assert descriptors(spread) == 3
    reader.close()
    assert descriptors(spread) == 0


# -- files that change, and many of them -----------------------------------------------------------------------


def overwritten(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-33, os.SEEK_END)
        file.write(bytes(33))


def exchanged(path: Path) -> None:
    """Another whole file takes the name; what was opened before goes on being read."""
    other = path.with_suffix(".new")
    other.write_bytes(path.read_bytes())
    other.rename(path)


def mapped(path: Path) -> None:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as pages:
        pages[-3:] = b"new"


CHANGES = [overwritten, exchanged, mapped, Path.touch, lambda path: os.truncate(path, path.stat().st_size + 3)]


@pytest.mark.parametrize("change", CHANGES, ids=["overwritten", "exchanged", "mapped", "touched", "grown"])
@pytest.mark.parametrize("is_open", [False, True], ids=["before_it_is_opened", "while_it_is_open"])
def test_a_block_of_a_file_that_changed_since_its_content_was_told_is_refused(
    spread: Path, change: Callable[[Path], object], is_open: bool
) -> None:
    checkpoint = read_checkpoint(spread, "moe")
    into = memoryview(bytearray(int(checkpoint.manifest.nbytes[0])))
    with closing(BlockReader(checkpoint, identities(checkpoint))) as reader:
        if is_open:
            reader.read_block(0, into)
        change(checkpoint.path(1))
        with pytest.raises(CheckpointError, match=f"{checkpoint.path(1).name} was replaced or written to"):
            reader.read_block(1, into)


def test_a_file_that_changes_after_its_last_byte_was_read_is_refused(
    spread: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write comes between reading and looking: whoever looks before reading does not see it."""
    checkpoint = read_checkpoint(spread, "moe")
    real, into = os.preadv, memoryview(bytearray(int(checkpoint.manifest.nbytes[0])))

    def read_then_changed(*arguments: Any) -> int:
        got = real(*arguments)
        overwritten(checkpoint.path(2))
        return got

    with closing(BlockReader(checkpoint, identities(checkpoint))) as reader:
        monkeypatch.setattr(os, "preadv", read_then_changed)
        with pytest.raises(CheckpointError, match="was replaced or written to"):
            reader.read_block(0, into)


def test_a_checkpoint_of_more_files_than_descriptors_is_read(tmp_path: Path) -> None:
    """160 files, and a process that may open 3 more at a time: content and blocks come."""
    names = [f"model.layers.0.mlp.experts.{e}.{n}_proj.weight" for e in range(54) for n in ("gate", "up", "down")]
    for number, name in enumerate(names):
        save_file(
            {name: np.full((7, 3) if "down" in name else (3, 7), number, np.float16)},
            tmp_path / f"{number}.safetensors",
        )
    weight_map = {name: f"{number}.safetensors" for number, name in enumerate(names)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    done = subprocess.run(
        [sys.executable, "-c", FEW_DESCRIPTORS, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "54 blocks\n", done.stderr


FEW_DESCRIPTORS = f"""
import os, resource, sys
from transfer.checkpoint import read_checkpoint
from transfer.checkpoint import content
from transfer.checkpoint.reader import BlockReader
content.READ_THREADS = 3
checkpoint = read_checkpoint(sys.argv[1], "moe")
spare = os.open("/dev/null", os.O_RDONLY)
resource.setrlimit(resource.RLIMIT_NOFILE, (spare + {FILES_OPEN_MAX}, spare + {FILES_OPEN_MAX}))
os.close(spare)
pinned = content.pin(checkpoint)
reader = BlockReader(checkpoint, pinned.files)
sizes = checkpoint.manifest.nbytes.tolist()
read = [reader.read_block(row, memoryview(bytearray(size))) for row, size in enumerate(sizes)]
print(len(set(read)), "blocks")
"""

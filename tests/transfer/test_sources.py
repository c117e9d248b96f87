"""Sources against real memory and real checkpoint files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash
from safetensors.numpy import save_file

from shm.block import ExpertKey
from transfer.checkpoint import Checkpoint, read_checkpoint
from transfer.engine import Copy
from transfer.errors import CheckpointError
from transfer.plan import Batch, Limits, Piece, Queue, Want
from transfer.sources import DiskSource, InPlace, LocalSource, runs_of

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


def fetch(checkpoint: Checkpoint, rows: list[int], split_at: int | None = None) -> tuple[list[bytes], dict[int, bytes]]:
    """Read the rows through a planned batch into memory full of 0xFF; the bytes, and the checksums taken."""
    source = DiskSource(checkpoint)
    sizes = [int(checkpoint.manifest.nbytes[row]) for row in rows]
    arena = np.full(sum(sizes) + 3333 * len(rows), 0xFF, np.uint8)
    wants, at = [], 3
    for row, nbytes in zip(rows, sizes, strict=True):
        base = arena.ctypes.data + at
        pieces = (Piece(base, 0, nbytes),)
        if split_at is not None:  # the second part lies before the first
            pieces = (Piece(base + nbytes - split_at, 0, split_at), Piece(base, split_at, nbytes - split_at))
        wants.append(Want(row, nbytes, pieces, None))
        at += nbytes + 77
    queue = Queue()
    for want in wants:
        queue.put(want, source.position(want.row))
    checksums: dict[int, bytes] = {}
    try:
        while queue:
            checksums |= source.fetch(queue.cut(source, Limits()))
    finally:
        source.close()
    found = []
    for want in wants:
        block = bytearray(want.nbytes)
        for piece in want.pieces:
            start = piece.destination - arena.ctypes.data
            block[piece.offset : piece.offset + piece.nbytes] = arena[start : start + piece.nbytes].tobytes()
        found.append(bytes(block))
    used = sum(sizes)
    assert (arena == 0xFF).sum() >= arena.size - used, "bytes beyond the blocks were written"
    return found, checksums


@pytest.mark.parametrize("split_at", [None, 101], ids=["in one run", "in pieces"])
def test_blocks_spread_over_several_files_come_whole_with_zeros_between(
    spread: Path, expected_blocks: ExpectedBlocks, split_at: int | None
) -> None:
    checkpoint = read_checkpoint(spread, "moe")
    expected = expected_blocks(spread, "moe")
    rows = list(range(EXPERTS))
    found, checksums = fetch(checkpoint, rows, split_at)
    assert found == [expected[checkpoint.manifest.keys[row]] for row in rows]
    assert any(b[462:512] == bytes(50) for b in found), "this test needs gaps"
    assert checksums == {row: xxhash.xxh3_128_digest(found[row]) for row in rows}


def test_a_deepseek_checkpoint_comes_byte_for_byte(moe_checkpoint: Path, expected_blocks: ExpectedBlocks) -> None:
    checkpoint = read_checkpoint(moe_checkpoint, "moe")
    expected = expected_blocks(moe_checkpoint, "moe")
    rows = list(range(len(checkpoint.manifest)))
    found, checksums = fetch(checkpoint, rows)
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
    source = DiskSource(checkpoint)
    rows = range(len(checkpoint.manifest))
    by_position = sorted(rows, key=source.position)
    first = {row: checkpoint.manifest.block(row).tensors[0] for row in rows}
    assert by_position == sorted(rows, key=lambda row: (first[row].file, first[row].file_offset))


def test_a_file_cut_short_after_its_header_was_read_is_named(spread: Path) -> None:
    checkpoint = read_checkpoint(spread, "moe")
    cut = checkpoint.path(1)
    os.truncate(cut, cut.stat().st_size - 33)
    with pytest.raises(CheckpointError, match=f"{cut.name} ends before byte") as error:
        fetch(checkpoint, list(range(EXPERTS)))
    assert "download it again" in str(error.value).lower()


def test_a_file_that_is_gone_is_named(spread: Path) -> None:
    checkpoint = read_checkpoint(spread, "moe")
    checkpoint.path(2).unlink()
    with pytest.raises(CheckpointError, match=f"{checkpoint.path(2).name} cannot be opened"):
        fetch(checkpoint, [0])


def test_a_file_that_cannot_be_read_is_named(spread: Path) -> None:
    checkpoint = read_checkpoint(spread, "moe")
    checkpoint.path(0).unlink()
    checkpoint.path(0).mkdir()  # opens, and refuses to be read
    with pytest.raises(CheckpointError, match=f"{checkpoint.path(0).name} cannot be read"):
        fetch(checkpoint, [0])


def descriptors(directory: Path) -> int:
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return sum(os.path.realpath(link).startswith(f"{directory}/") for link in links)


def test_closing_gives_every_file_up(spread: Path) -> None:
    checkpoint = read_checkpoint(spread, "moe")
    source = DiskSource(checkpoint)
    into = bytearray(int(checkpoint.manifest.nbytes[0]))
    assert source.read_block(0, memoryview(into)) == xxhash.xxh3_128_digest(into)
    assert descriptors(spread) == 3
    source.close()
    assert descriptors(spread) == 0


def test_local_memory_is_copied() -> None:
    theirs, ours = np.arange(250, dtype=np.uint8), np.zeros(250, np.uint8)
    copies = (Copy(ours.ctypes.data + 3, theirs.ctypes.data + 33, 77),)
    assert LocalSource().fetch(Batch("local", (), copies, 77)) == {}
    assert ours[3:80].tolist() == list(range(33, 110))
    assert not ours[:3].any()
    assert not ours[80:].any()


def test_what_is_in_place_is_not_touched() -> None:
    ours = np.arange(33, dtype=np.uint8)
    copies = (Copy(ours.ctypes.data, 0, 33),)
    assert InPlace().fetch(Batch("in place", (), copies, 33)) == {}
    assert ours.tolist() == list(range(33))

"""The three kinds of source, against real memory, real checkpoint files, and the transfer engine's double."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from shm.block import HeldBlock
from transfer.checkpoint import Checkpoint, read_checkpoint
from transfer.checkpoint.content import PinnedCheckpoint, pin
from transfer.destination import Landing, Resident
from transfer.engine.double import Network
from transfer.errors import CheckpointError, SomeLost, TransferFailed
from transfer.plan import Batch, Piece, Want
from transfer.sources import RECALLED, Disk, HostMemory, PeerMemory, local_limits, on_disk, reading

NBYTES = 3333


class Places:
    """A destination that keeps each block where a test can look, in two landings if it has several."""

    def __init__(self, rows: Iterable[int], nbytes: int = NBYTES) -> None:
        self.blocks = {row: np.zeros(nbytes, np.uint8) for row in rows}
        self.taken: list[Resident] = []
        self.one_run: set[bool] = set()
        self.open_landings = 0

    def take(self, blocks: Sequence[Resident]) -> Mapping[int, bytes]:
        self.taken.extend(blocks)
        return {block.want.row: block.checksum for block in blocks}

    def landings(self, wants: Sequence[Want], *, in_one_run: bool) -> Iterator[AbstractContextManager[Landing]]:
        self.one_run.add(in_one_run)
        for part in (wants[:1], wants[1:]):
            if part:
                yield self._landing(part)

    @contextmanager
    def _landing(self, wants: Sequence[Want]) -> Iterator[Landing]:
        self.open_landings += 1
        pieces = {w.row: (Piece(int(self.blocks[w.row].ctypes.data), 0, w.nbytes),) for w in wants}
        try:
            yield Landing(
                pieces, lambda taken, lost: {row: taken.get(row, b"settled") for row in pieces if row not in lost}
            )
        finally:
            self.open_landings -= 1


def destination_of(places: Places) -> Any:
    return places


def batch_of(source: Any, rows: Iterable[int], addresses: Iterable[int] = (), nbytes: int = NBYTES) -> Batch:
    wants = tuple(Want(row, nbytes, None) for row in rows)
    return Batch(source, wants, tuple(addresses), nbytes * len(wants))


# -- this host's memory ----------------------------------------------------------------------------------------


class Memory:
    """Rows that are published, in this process."""

    def __init__(self, *rows: int) -> None:
        self.published = set(rows)

    def held(self, rows: Iterable[int]) -> Mapping[int, HeldBlock]:
        return {row: HeldBlock(1000 + row, bytes([row])) for row in rows if row in self.published}


def test_blocks_of_this_host_are_taken_where_they_lie_with_the_checksum_on_record() -> None:
    memory, places, kept = Memory(3, 4, 5), Places(()), (memoryview(b"x"),)
    source = HostMemory("here", memory, kept_by=kept)
    assert source.fetch(batch_of(source, [3, 4]), destination_of(places)) == {3: b"\x03", 4: b"\x04"}
    assert [(r.want.row, r.address, r.kept_by) for r in places.taken] == [(3, 1003, kept), (4, 1004, kept)]


def test_a_block_that_was_withdrawn_before_is_not_taken_and_one_withdrawn_meanwhile_not_vouched_for() -> None:
    memory = Memory(3, 4)

    class Withdrawing(Places):
        def take(self, blocks: Sequence[Resident]) -> Mapping[int, bytes]:
            memory.published.discard(4)
            return super().take(blocks)

    places = Withdrawing(())
    source = HostMemory("here", memory)
    assert source.fetch(batch_of(source, [3, 4, 5]), destination_of(places)) == {3: b"\x03"}
    assert [block.want.row for block in places.taken] == [3, 4]


def test_what_is_recalled_of_this_hosts_memory_ends_between_two_pieces() -> None:
    """Sent over a slow link, 64 MiB are a minute."""

    class Recalling(Places):
        def take(self, blocks: Sequence[Resident]) -> Mapping[int, bytes]:
            batch.watch.is_recalled = len(self.taken) + len(blocks) > 3
            return super().take(blocks)

    source, places = HostMemory("here", Memory(*range(9)), piece_nbytes=2 * NBYTES), Recalling(())
    batch = batch_of(source, range(9))
    with pytest.raises(SomeLost) as some:
        source.fetch(batch, destination_of(places))
    assert [block.want.row for block in places.taken] == [0, 1, 2, 3]
    assert some.value.came == {row: bytes([row]) for row in range(4)}
    assert some.value.lost == dict.fromkeys(range(4, 9), RECALLED)
    assert batch.watch.arrived_nbytes == 4 * NBYTES


def test_batches_from_this_host_are_several_for_each_lane_and_neither_tiny_nor_huge() -> None:
    assert local_limits(3_333, 4).nbytes == 8 << 20
    assert local_limits(16 * (100 << 20), 4).nbytes == 100 << 20
    assert local_limits(1 << 40, 4).nbytes == 256 << 20
    assert local_limits(1 << 40, 4).last_nbytes == 8 << 20


def test_lanes_that_share_a_bus_keep_their_batches_large_to_the_end() -> None:
    of = local_limits(1 << 40, 3, share_a_bus=True)
    assert (of.nbytes, of.last_nbytes) == (256 << 20, 256 << 20)


# -- a peer's memory -------------------------------------------------------------------------------------------


def test_blocks_of_a_peer_are_read_into_every_landing_and_settled() -> None:
    network = Network()
    ours, theirs = network.engine(), network.engine()
    memory = np.random.default_rng(3).integers(0, 256, 5 * NBYTES, np.uint8)
    theirs.register([(memory.ctypes.data, memory.nbytes)])
    places = Places(range(3))
    peer = PeerMemory("peer", reading(ours, theirs.session_id))
    addresses = [int(memory.ctypes.data) + 7 + NBYTES * row for row in range(3)]
    brought = peer.fetch(batch_of(peer, range(3), addresses), destination_of(places))
    assert brought == dict.fromkeys(range(3), b"settled")
    for row in range(3):
        assert places.blocks[row].tobytes() == memory[7 + NBYTES * row :][:NBYTES].tobytes()
    assert (places.one_run, places.open_landings) == ({False}, 0)


def test_a_peer_that_fails_leaves_no_landing_open() -> None:
    network = Network()
    ours, theirs = network.engine(), network.engine()
    network.stop(theirs.session_id)
    places = Places(range(3))
    peer = PeerMemory("peer", reading(ours, theirs.session_id))
    with pytest.raises(TransferFailed) as failed:
        peer.fetch(batch_of(peer, range(3), [1, 2, 3]), destination_of(places))
    assert failed.value.timed_out
    assert places.open_landings == 0


def test_a_peer_may_be_reached_in_another_way() -> None:
    asked: list[Batch] = []

    def ask(batch: Batch, destination: Any) -> Mapping[int, bytes]:
        asked.append(batch)
        return {7: b"said"}

    peer = PeerMemory("peer", ask)
    batch = batch_of(peer, [7])
    assert peer.fetch(batch, destination_of(Places(()))) == {7: b"said"}
    assert asked == [batch]


# -- the disk --------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(moe_checkpoint: Path) -> Checkpoint:
    return read_checkpoint(moe_checkpoint, "moe")


def test_blocks_of_the_disk_come_with_the_checksum_taken_on_the_way(checkpoint: Checkpoint) -> None:
    nbytes = int(checkpoint.manifest.nbytes[0])
    places = Places(range(5), nbytes)
    disk = Disk("disk", partial(pin, checkpoint))
    taken = disk.fetch(batch_of(disk, range(5), nbytes=nbytes), destination_of(places))
    assert taken == {row: xxhash.xxh3_128_digest(places.blocks[row]) for row in range(5)}
    assert (places.one_run, places.open_landings) == ({True}, 0)
    assert descriptors(checkpoint) == 0, "none is kept open between two batches: a checkpoint may have hundreds"
    disk.close()


def descriptors(checkpoint: Checkpoint) -> int:
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return sum(os.path.realpath(link).startswith(f"{checkpoint.directory}/") for link in links)


def test_a_disk_that_is_never_asked_is_never_opened_and_one_that_is_not_there_says_so() -> None:
    def missing() -> PinnedCheckpoint:
        raise CheckpointError("no such directory")

    disk = Disk("disk", missing)
    disk.close()
    with pytest.raises(CheckpointError, match="no such directory"):
        disk.fetch(batch_of(disk, [0]), destination_of(Places([0])))


def test_a_block_that_the_disk_cannot_give_costs_no_other(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad sector, which no file system here can be made to have."""
    manifest = checkpoint.manifest
    bad, real = manifest.block(2).tensors[1], os.preadv

    def failing(descriptor: int, buffers: Any, offset: int) -> int:
        is_file = os.fstat(descriptor).st_ino == checkpoint.path(bad.file).stat().st_ino
        if is_file and offset <= bad.file_offset < offset + buffers[0].nbytes:
            raise OSError(errno.EIO, "Input/output error")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    nbytes = int(manifest.nbytes[0])
    places, disk = Places(range(5), nbytes), Disk("disk", partial(pin, checkpoint))
    with pytest.raises(SomeLost) as lost:
        disk.fetch(batch_of(disk, range(5), nbytes=nbytes), destination_of(places))
    assert list(lost.value.lost) == [2]
    assert "Input/output error" in lost.value.lost[2]
    assert lost.value.came == {row: xxhash.xxh3_128_digest(places.blocks[row]) for row in (0, 1, 3, 4)}
    assert places.open_landings == 0


def test_a_block_whose_file_changed_since_its_content_was_told_costs_no_other(
    moe_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint = read_checkpoint(shutil.copytree(moe_checkpoint, tmp_path / "copy"), "moe")
    pinned = pin(checkpoint)
    rows = range(len(checkpoint.manifest))
    file_of = {row: {tensor.file for tensor in checkpoint.manifest.block(row).tensors} for row in rows}
    changed = max(file for files in file_of.values() for file in files)
    os.utime(checkpoint.path(changed), (3, 3))
    nbytes = int(checkpoint.manifest.nbytes[0])
    disk = Disk("disk", lambda: pinned)
    with pytest.raises(SomeLost) as lost:
        disk.fetch(batch_of(disk, rows, nbytes=nbytes), destination_of(Places(rows, nbytes)))
    assert set(lost.value.lost) == {row for row in rows if changed in file_of[row]} < set(rows)


def test_what_the_disk_has_is_told_in_the_order_of_its_files_and_without_a_checksum(checkpoint: Checkpoint) -> None:
    manifest = checkpoint.manifest
    has = on_disk(manifest, range(len(manifest)))
    first = {row: manifest.block(row).tensors[0] for row in has}
    assert sorted(has, key=lambda row: has[row][0]) == sorted(has, key=lambda r: (first[r].file, first[r].file_offset))
    assert {checksum for _, checksum in has.values()} == {None}

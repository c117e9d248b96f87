"""A segment as where a restore puts blocks: what is found in it, and when."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from app.cluster.placement import Placement
from app.node.destination import SegmentDestination
from app.node.holding import Holding
from app.node.proofs import Proofs
from shm import ExpertKey
from shm.checksum import checksum
from shm.segment import Segment
from transfer.checkpoint import read_checkpoint
from transfer.checkpoint.content import PinnedCheckpoint, pin
from transfer.destination import Resident
from transfer.errors import RestoreError
from transfer.memory import view
from transfer.plan import Want

ROW = 3


@pytest.fixture
def segment(sealed: Callable[..., Segment]) -> Segment:
    return sealed()


def destination_of(segment: Segment, disk: PinnedCheckpoint | None = None) -> SegmentDestination:
    manifest = segment.manifest
    placement = Placement.compute(manifest, ("n0",), 1)
    return SegmentDestination(Holding("n0", segment, manifest, placement, bytes(16), disk, Proofs(len(manifest)), ()))


def want(segment: Segment, expected: bytes | None = None) -> Want:
    return Want(ROW, int(segment.manifest.nbytes[ROW]), expected or segment.checksum(ROW))


def is_found(segment: Segment) -> bool:
    return ROW in segment.published().tolist()


@pytest.mark.parametrize("in_one_run", [False, True])
def test_a_block_is_hidden_from_before_its_bytes_change_until_it_is_published(
    segment: Segment, in_one_run: bool
) -> None:
    destination = destination_of(segment)
    for landing in destination.landings([want(segment)], in_one_run=in_one_run):
        with landing as landed:
            assert not is_found(segment)
            ((piece,),) = landed.pieces.values()
            assert (piece.destination, piece.offset) == (segment.address(ROW), 0)
            view(piece.destination, piece.nbytes)[0] ^= 1
            assert landed.settle({ROW: b"taken"}, ()) == {ROW: b"taken"}
    assert not is_found(segment)
    found = destination.checksum(want(segment)._replace(checksum=None))
    destination.publish(want(segment), found)
    assert is_found(segment)
    assert segment.checksum(ROW) == checksum(segment.block(ROW))


def test_a_block_in_place_is_neither_hidden_nor_touched_unless_it_is_wrong(segment: Segment) -> None:
    destination, wanted = destination_of(segment), want(segment)
    before = bytes(segment.block(ROW))
    assert destination.take([Resident(wanted, segment.address(ROW), segment.checksum(ROW), ())]) == {}
    assert destination.checksum(wanted) == wanted.checksum
    assert is_found(segment)
    assert bytes(segment.block(ROW)) == before
    segment.block(ROW)[7] ^= 1
    assert destination.checksum(wanted) != wanted.checksum
    assert not is_found(segment)
    assert segment.checksum(ROW) == wanted.checksum, "what it should be stays on record"


def test_a_block_that_lies_elsewhere_in_this_host_is_copied_hidden(segment: Segment) -> None:
    other = np.random.default_rng(3).integers(0, 256, int(segment.manifest.nbytes[ROW]), np.uint8)
    resident = Resident(want(segment), int(other.ctypes.data), b"", ())
    assert destination_of(segment).take([resident]) == {}
    assert not is_found(segment)
    assert bytes(segment.block(ROW)) == other.tobytes()


def test_a_block_of_another_content_is_not_shown_though_its_checksum_is_the_one_that_its_source_gave(
    moe_checkpoint: Path,
    expected_blocks: Callable[..., Mapping[ExpertKey, bytes]],
    sealed: Callable[..., Segment],
) -> None:
    disk = pin(read_checkpoint(moe_checkpoint, "moe"))
    segment = sealed("n0", disk.checkpoint.manifest)
    destination = destination_of(segment, disk)
    segment.quarantine(ROW)
    with pytest.raises(RestoreError, match="not of the content that this node keeps"):
        destination.publish(want(segment), destination.checksum(want(segment)))
    assert not is_found(segment)
    segment.block(ROW)[:] = expected_blocks(moe_checkpoint)[segment.manifest.keys[ROW]]
    destination.publish(want(segment), checksum(segment.block(ROW)))
    assert is_found(segment)

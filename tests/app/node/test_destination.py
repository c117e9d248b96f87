"""A segment as where a restore puts blocks: what it hides, what it shows, and what it will not have."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from app.cluster.placement import Placement
from app.node.destination import SegmentDestination
from app.node.holding import Holding
from app.node.proofs import Proofs
from shm import ExpertKey
from shm.checksum import checksum
from shm.layout import SegmentName
from shm.segment import Segment
from transfer.checkpoint import read_checkpoint
from transfer.checkpoint.content import pin
from transfer.errors import RestoreError
from transfer.plan import Want

ROW = 17


@pytest.fixture
def holding(moe_checkpoint: Path, namespace: str) -> Iterator[Holding]:
    """Of a node that has space for everything and no block yet."""
    disk = pin(read_checkpoint(moe_checkpoint, "moe"))
    manifest = disk.checkpoint.manifest
    segment = Segment.claim(SegmentName(namespace, "moe", "n0"))
    segment.allocate(manifest, range(len(manifest)))
    placement = Placement.compute(manifest, ("n0",), 1)
    yield Holding("n0", segment, manifest, placement, disk.digest, disk, Proofs(len(manifest)), ())
    segment.close()


@pytest.fixture
def right(moe_checkpoint: Path, expected_blocks: Callable[..., Mapping[ExpertKey, bytes]], holding: Holding) -> bytes:
    """The block's bytes."""
    return expected_blocks(moe_checkpoint)[holding.manifest.keys[ROW]]


def test_a_block_is_hidden_while_it_is_written_and_proved_once_it_is_shown(holding: Holding, right: bytes) -> None:
    destination, segment = SegmentDestination(holding), holding.segment
    want = Want(ROW, len(right), (), None)
    for _ in range(2):
        destination.begin(want)
        assert ROW not in segment.published()
        segment.block(ROW)[:] = right
        assert destination.checksum(want) == checksum(segment.block(ROW))
        destination.publish(want, destination.checksum(want))
        assert ROW in segment.published()
    assert holding.proofs.unproved(segment.published()) == 0


def test_a_block_of_another_content_is_not_shown_though_its_checksum_is_the_one_that_its_source_gave(
    holding: Holding, right: bytes
) -> None:
    destination, segment = SegmentDestination(holding), holding.segment
    want = Want(ROW, len(right), (), None)
    destination.begin(want)
    segment.block(ROW)[:] = bytes(len(right))
    with pytest.raises(RestoreError, match="not of the content that this node keeps"):
        destination.publish(want, destination.checksum(want))
    assert ROW not in segment.published()

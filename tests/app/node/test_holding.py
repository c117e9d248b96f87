"""What a node has at one moment, read while it is replaced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from app.cluster.placement import Placement
from app.node.holding import Holding
from app.node.proofs import Proofs
from app.restores.store import ALL_KINDS
from shm import ExpertKey, attach
from shm.checksum import checksum
from shm.errors import BlockUnavailable, InvalidInput
from shm.manifest import Manifest
from shm.segment import Segment
from transfer.progress import Progress


@pytest.fixture
def holding(sealed: Callable[..., Segment], make_manifest: Callable[..., Manifest]) -> Holding:
    """Of node n0 of two, without replicas: it has some of ten blocks."""
    manifest = make_manifest()
    placement = Placement.compute(manifest, ("n0", "n1"), 1)
    segment = sealed("n0", manifest, placement.rows_of("n0").tolist())
    return Holding(
        "n0", segment, manifest, placement, bytes(16), None, Proofs(len(manifest)), tuple(segment.served_ranges())
    )


def test_what_is_placed_here_and_not_published_is_missing(holding: Holding) -> None:
    assert holding.placed().tolist() == holding.published().tolist()
    row = int(holding.placed()[1])
    holding.segment.quarantine(row)
    assert holding.missing().tolist() == [row]
    assert holding.checks() == dict.fromkeys(("manifest", "sealed", "registered", "attachable"), True) | {
        "published": False
    }


def test_the_revision_changes_with_what_is_published_and_with_nothing_else(holding: Holding) -> None:
    row = int(holding.placed()[0])
    before = holding.revision
    assert holding.revision == before
    holding.segment.quarantine(row)
    hidden = holding.revision
    holding.segment.publish(row, checksum(b"other content"))
    other = holding.revision
    assert len({before, hidden, other}) == 3
    holding.segment.publish(row, checksum(holding.segment.block(row)))
    assert holding.revision == before, "the same blocks with the same content: nobody has to fetch the map again"


def test_experts_that_are_placed_elsewhere_are_refused_with_where_they_are(holding: Holding) -> None:
    elsewhere = sorted(set(range(len(holding.manifest))) - set(holding.placed().tolist()))[0]
    key = holding.manifest.keys[elsewhere]
    with pytest.raises(InvalidInput, match=f"expert {key.expert} of layer {key.layer} .*restore it on n1"):
        holding.rows_of([key])
    with pytest.raises(BlockUnavailable):
        holding.rows_of([ExpertKey(33, 0)])
    assert holding.rows_of(None).tolist() == holding.placed().tolist()


# -- replaced while it is read -------------------------------------------------------------------------------------


def test_one_that_was_replaced_can_still_be_read(live_node: Callable[..., Any], moe_checkpoint: Path) -> None:
    live = live_node(checkpoint=moe_checkpoint)
    assert live.context.restores.start_local(None, ALL_KINDS).finished.wait(30)
    node = live.context.node
    before = node.holding
    content = {row: bytes(before.segment.block(row)) for row in before.published().tolist()}
    revision = before.revision
    node.start_over(before.disk)
    assert node.holding is not before
    assert before.revision == revision
    assert {row: bytes(before.segment.block(row)) for row in before.published().tolist()} == content
    assert node.holding.published().tolist() == []


def test_a_restore_planned_before_a_renewal_publishes_nothing_in_the_next_segment(
    live_node: Callable[..., Any],
    moe_checkpoint: Path,
    namespace: str,
    expected_blocks: Callable[..., Mapping[ExpertKey, bytes]],
) -> None:
    """It published 39 blocks whose bytes were not there: the addresses were of one segment, the names of another."""
    live = live_node(checkpoint=moe_checkpoint)
    node = live.context.node
    planned = node.plan_restore(None, ALL_KINDS, Progress())
    node.start_over(node.holding.disk)
    node.run(planned)
    assert node.holding.published().tolist() == []
    assert node.checks()["sealed"] is False
    assert live.context.restores.start_local(None, ALL_KINDS).finished.wait(30)
    with attach("moe", namespace=namespace) as weights:
        found = {weights.manifest.keys[row]: bytes(weights.block(row)) for row in weights.rows().tolist()}
    assert found == expected_blocks(moe_checkpoint)


def test_a_node_tells_only_what_it_has_published_and_where_others_may_read_it(
    live_node: Callable[..., Any], moe_checkpoint: Path
) -> None:
    context = live_node(checkpoint=moe_checkpoint).context
    holding = context.node.holding
    assert holding.held() == {}
    assert context.restores.start_local((ExpertKey(3, 7),), ["disk"]).finished.wait(30)
    segment, row = holding.segment, holding.manifest.index(3, 7)
    served = segment.served_address(row)
    assert served != segment.address(row), "the view that nobody can write through"
    assert holding.held() == {row: (served, segment.checksum(row))}

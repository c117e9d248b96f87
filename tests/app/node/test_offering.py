"""Who a node takes blocks from, and in which order, out of what its peers say that they have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from app.cluster.cluster import Cluster
from app.cluster.membership import Membership, NodeReport
from app.cluster.peers import PeerBlocks
from app.cluster.placement import Placement
from app.node.holding import Holding
from app.node.offering import DISK, offer
from app.node.proofs import Proofs
from shm.manifest import Manifest
from shm.segment import Segment
from transfer.sources import Disk, HostMemory, PeerMemory, Source

OTHER = b"o" * 16
Has = Mapping[int, tuple[int, bytes]]


@pytest.fixture
def holding(sealed: Callable[..., Segment], make_manifest: Callable[..., Manifest]) -> Holding:
    """A node that has all ten blocks."""
    manifest = make_manifest()
    segment = sealed("n0", manifest)
    placement = Placement.compute(manifest, ("n0",), 1)
    return Holding("n0", segment, manifest, placement, bytes(16), None, Proofs(len(manifest)), ())


def cluster(holding: Holding, has: Mapping[str, Has], silent: str = "") -> Cluster:
    """Peers that said what they have; those named `silent` have failed since."""
    seen = Cluster(Membership({name: f"http://{name}" for name in has}, model="tiny", namespace="default"), lambda: 1.0)
    seen.use_manifest(holding.manifest, "d", holding.content_digest)
    for name, blocks in has.items():
        report = NodeReport(
            name, "tiny", "default", "ready", holding.manifest.digest, holding.content_digest, f"{name}:1", "1"
        )
        seen.answered(name, report, asked_at=0.0)
        seen.holds(name, report, holding.manifest, PeerBlocks(f"{name}:1", "1", blocks))
        if name in silent:
            seen.failed(name, "silence", asked_at=0.5)
    return seen


def reach(node_id: str, held: PeerBlocks) -> PeerMemory:
    def never(*_: Any) -> Any:
        raise AssertionError("nothing is moved here")

    return PeerMemory(node_id, never)


def names(tiers: list[list[Source]]) -> list[list[str]]:
    return [[source.name for source in tier] for tier in tiers]


def test_our_own_memory_then_peers_then_the_disk_then_peers_that_are_silent(holding: Holding) -> None:
    row = 3
    same = {row: (33, holding.segment.checksum(row))}
    seen = cluster(holding, {"p": same, "q": same}, silent="q")
    own, disk = HostMemory("own", holding.segment), Disk(DISK, lambda: None)  # type: ignore[arg-type, return-value]
    tiers, offered = offer(holding, [row], seen, own, reach, disk)
    assert names(tiers) == [["own"], ["p"], [DISK], ["q"]]
    assert [each.source.name for each in offered.by_row[row]] == ["own", "p", "q", DISK]  # type: ignore[attr-defined]
    assert offered.expected == {row: holding.segment.checksum(row)}


def test_a_peer_with_other_content_than_our_record_is_left_aside_and_named_in_the_log(
    holding: Holding, caplog: pytest.LogCaptureFixture
) -> None:
    seen = cluster(holding, {"p": {3: (33, OTHER), 4: (33, OTHER)}})
    _, offered = offer(holding, [3, 4], seen, HostMemory("own", holding.segment), reach, None)
    assert [each.source.name for each in offered.by_row[3]] == ["own"]  # type: ignore[attr-defined]
    assert "2 blocks of p are left aside" in caplog.text


def test_a_node_that_is_called_disk_does_not_hide_the_disk(holding: Holding) -> None:
    seen = cluster(holding, {DISK: {3: (33, holding.segment.checksum(3))}})
    holding.segment.quarantine(3)
    disk = Disk(DISK, lambda: None)  # type: ignore[arg-type, return-value]
    tiers, offered = offer(holding, [3], seen, HostMemory("own", holding.segment), reach, disk)
    node, on_disk = (each.source for each in offered.by_row[3])
    assert node is not on_disk
    assert on_disk is disk
    assert [tier for tier in tiers if node in tier] != [tier for tier in tiers if disk in tier]


def test_without_a_way_to_reach_them_no_peer_is_asked(holding: Holding) -> None:
    seen = cluster(holding, {"p": {3: (33, holding.segment.checksum(3))}})
    tiers, offered = offer(holding, [3], seen, HostMemory("own", holding.segment), None, None)
    assert names(tiers) == [["own"], [], []]
    assert len(offered.by_row[3]) == 1

"""Who has the blocks that a node wants, nearest first, and whose word on their checksums is taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from app.cluster.membership import PeerState
from app.cluster.peers import PeerBlocks
from app.cluster.placement import Placement
from app.node.holding import Holding
from app.node.offering import IN_PLACE, offer
from app.node.proofs import Proofs
from shm.layout import SegmentName
from shm.manifest import Manifest
from shm.segment import Segment
from transfer.plan import Offer
from transfer.sources import SourceKind

GOOD, OTHER = b"g" * 16, b"o" * 16
ROWS = (3, 7)


class View:
    """What a cluster says of peers: node → what it has of the rows; all of them alive but those named."""

    def __init__(self, holdings: dict[str, dict[int, bytes]], suspect: tuple[str, ...] = ()) -> None:
        self._holdings, self._suspect = holdings, suspect

    def holdings(self) -> dict[str, PeerBlocks]:
        return {
            node: PeerBlocks(
                f"{node}:15333", "7", {row: (ord(node[1]) * 1000 + row, said) for row, said in has.items()}
            )
            for node, has in self._holdings.items()
        }

    def peers(self) -> list[Any]:
        state = {True: PeerState.SUSPECT, False: PeerState.ALIVE}
        return [SimpleNamespace(node_id=node, state=state[node in self._suspect]) for node in self._holdings]


@pytest.fixture
def holding(namespace: str, make_manifest: Callable[..., Manifest]) -> Iterator[Holding]:
    """Of a node that holds nothing yet."""
    manifest = make_manifest()
    segment = Segment.claim(SegmentName(namespace, manifest.model, "n0"))
    segment.allocate(manifest, range(len(manifest)))
    placement = Placement.compute(manifest, ("n0", "n1", "n2"), 3)
    yield Holding("n0", segment, manifest, placement, bytes(16), None, Proofs(len(manifest)), ())
    segment.close()


def offered(holding: Holding, view: View, kinds: Any = (SourceKind.PEER,)) -> Any:
    return offer(holding, ROWS, view, None, None, kinds)  # type: ignore[arg-type]


def test_replicas_that_agree_are_all_offered_and_their_checksum_is_expected(holding: Holding) -> None:
    _, offers, expected = offered(holding, View({"n1": {3: GOOD, 7: OTHER}, "n2": {3: GOOD}}))
    assert offers == {3: [Offer("n1", 49003), Offer("n2", 50003)], 7: [Offer("n1", 49007)]}
    assert expected == {3: GOOD, 7: OTHER}


def test_replicas_that_disagree_are_taken_from_nobody_and_said(
    holding: Holding, caplog: pytest.LogCaptureFixture
) -> None:
    _, offers, expected = offered(holding, View({"n1": {3: GOOD, 7: GOOD}, "n2": {3: OTHER, 7: GOOD}}))
    assert offers == {3: [], 7: [Offer("n1", 49007), Offer("n2", 50007)]}
    assert expected == {7: GOOD}
    assert "disagree: n1, n2" in caplog.text


def test_a_checksum_on_record_here_says_which_of_them_is_right(holding: Holding) -> None:
    holding.segment.publish(3, OTHER)
    holding.segment.quarantine(3)
    _, offers, expected = offered(holding, View({"n1": {3: GOOD}, "n2": {3: OTHER}}))
    assert offers == {3: [Offer("n2", 50003)], 7: []}
    assert expected == {3: OTHER}


def test_what_is_in_place_comes_first_and_peers_that_were_silent_come_last(holding: Holding) -> None:
    holding.segment.publish(7, GOOD)
    tiers, offers, _ = offered(holding, View({"n1": {7: GOOD}, "n2": {7: GOOD}}, suspect=("n1",)))
    assert [[source.name for source in tier] for tier in tiers] == [[IN_PLACE], ["n2"], ["n1"]]
    assert [each.source for each in offers[7]] == [IN_PLACE, "n1", "n2"]


def test_peers_are_not_asked_where_only_the_disk_is_wanted(holding: Holding) -> None:
    tiers, offers, expected = offered(holding, View({"n1": {3: GOOD}}), (SourceKind.DISK,))
    assert [[source.name for source in tier] for tier in tiers] == [[IN_PLACE], []]
    assert (offers, expected) == ({3: [], 7: []}, {})

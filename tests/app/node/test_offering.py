"""Who has the blocks that a node wants, nearest first, and whose word on their checksums is taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from app.cluster.membership import PeerState
from app.cluster.peers import PeerBlocks
from app.cluster.placement import Placement
from app.node.holding import Holding
from app.node.offering import DISK, SecondLook, offer
from app.node.proofs import Proofs
from shm.layout import SegmentName
from shm.manifest import Manifest
from shm.segment import Segment
from transfer.offers import Offers
from transfer.sources import Disk, HostMemory, PeerMemory, Source

GOOD, OTHER = b"g" * 16, b"o" * 16
ROWS = (3, 7)
OWN = "in place"


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


def reach(node_id: str, held: PeerBlocks) -> PeerMemory:
    def never(*_: Any) -> Any:
        raise AssertionError("nothing is moved here")

    return PeerMemory(node_id, never)


def disk() -> Disk:
    def never() -> Any:
        raise AssertionError("nothing is read here")

    return Disk(DISK, never)


def offered(
    holding: Holding, view: View, *, peers: bool = True, with_disk: Disk | None = None
) -> tuple[list[list[Source]], Offers]:
    own = HostMemory(OWN, holding.segment)
    return offer(holding, ROWS, view, own, reach if peers else None, with_disk)  # type: ignore[arg-type]


def told(found: Offers) -> dict[int, list[tuple[str, int]]]:
    return {row: [(o.source.name, o.address) for o in each] for row, each in found.by_row.items()}  # type: ignore[attr-defined]


def names(tiers: list[list[Source]]) -> list[list[str]]:
    return [[source.name for source in tier] for tier in tiers]


def test_replicas_that_agree_are_all_offered_and_their_checksum_is_expected(holding: Holding) -> None:
    _, found = offered(holding, View({"n1": {3: GOOD, 7: OTHER}, "n2": {3: GOOD}}))
    assert told(found) == {3: [("n1", 49003), ("n2", 50003)], 7: [("n1", 49007)]}
    assert found.expected == {3: GOOD, 7: OTHER}


def test_replicas_that_disagree_are_taken_from_nobody_and_said(
    holding: Holding, caplog: pytest.LogCaptureFixture
) -> None:
    _, found = offered(holding, View({"n1": {3: GOOD, 7: GOOD}, "n2": {3: OTHER, 7: GOOD}}))
    assert told(found) == {3: [], 7: [("n1", 49007), ("n2", 50007)]}
    assert found.expected == {7: GOOD}
    assert "1 blocks of n1 are left aside: replicas disagree" in caplog.text
    assert "1 blocks of n2 are left aside: replicas disagree" in caplog.text


def test_a_checksum_on_record_here_says_which_of_them_is_right(holding: Holding) -> None:
    holding.segment.publish(3, OTHER)
    holding.segment.quarantine(3)
    _, found = offered(holding, View({"n1": {3: GOOD}, "n2": {3: OTHER}}))
    assert told(found) == {3: [("n2", 50003)], 7: []}
    assert found.expected == {3: OTHER}


def test_our_own_memory_comes_first_then_peers_then_the_disk_then_peers_that_were_silent(holding: Holding) -> None:
    holding.segment.publish(7, GOOD)
    view = View({"n1": {7: GOOD}, "n2": {7: GOOD}}, suspect=("n1",))
    tiers, found = offered(holding, view, with_disk=disk())
    assert names(tiers) == [[OWN], ["n2"], [DISK], ["n1"]]
    assert [name for name, _ in told(found)[7]] == [OWN, "n1", "n2", DISK]


def test_peers_are_not_asked_where_only_the_disk_is_wanted(holding: Holding) -> None:
    tiers, found = offered(holding, View({"n1": {3: GOOD}}), peers=False)
    assert names(tiers) == [[OWN], [], []]
    assert (told(found), found.expected) == ({3: [], 7: []}, {})


def test_a_node_that_is_called_disk_does_not_hide_the_disk(holding: Holding) -> None:
    ours = disk()
    tiers, found = offered(holding, View({DISK: {3: GOOD}}), with_disk=ours)
    node, on_disk = (each.source for each in found.by_row[3])
    assert on_disk is ours
    assert node is not ours
    assert [ours in tier for tier in tiers] == [False, False, True, False]
    assert [node in tier for tier in tiers] == [False, True, False, False]


# -- once more, before blocks are given up -------------------------------------------------------------------------


class Looked:
    """A second look at peers that became others since: what it finds, as `told` would say it."""

    def __init__(self, holding: Holding, before: View) -> None:
        self.view = before
        self.looks = 0
        self._look = SecondLook(holding, self, self._count, reach)  # type: ignore[arg-type]

    def holdings(self) -> dict[str, PeerBlocks]:
        return self.view.holdings()

    def _count(self) -> None:
        self.looks += 1

    def __call__(self, after: View) -> dict[int, list[tuple[str, int]]]:
        self.view = after
        found = self._look(ROWS)
        return {row: [(o.source.name, o.address) for o in each] for row, each in found.offers.items()}  # type: ignore[attr-defined]


def test_a_peer_that_appeared_or_has_more_by_now_is_offered_and_what_was_offered_before_is_not(
    holding: Holding,
) -> None:
    looked = Looked(holding, View({"n1": {3: GOOD}}))
    assert looked(View({"n1": {3: GOOD, 7: GOOD}, "n2": {3: GOOD}})) == {3: [("n2", 50003)], 7: [("n1", 49007)]}
    assert looked.looks == 1


def test_a_peer_that_was_started_again_or_mended_a_block_is_offered_anew(holding: Holding) -> None:
    class Restarted(View):
        def holdings(self) -> dict[str, PeerBlocks]:
            return {node: replace(held, session_id="n1:15334") for node, held in super().holdings().items()}

    assert Looked(holding, View({"n1": {3: GOOD}}))(Restarted({"n1": {3: GOOD}})) == {3: [("n1", 49003)], 7: []}
    assert Looked(holding, View({"n1": {3: OTHER}}))(View({"n1": {3: GOOD}})) == {3: [("n1", 49003)], 7: []}


def test_peers_that_disagree_are_offered_neither_then_nor_later(holding: Holding) -> None:
    assert Looked(holding, View({"n1": {3: GOOD}}))(View({"n1": {3: GOOD}, "n2": {3: OTHER}})) == {3: [], 7: []}


def test_our_own_record_decides_of_those_that_appeared_and_what_has_no_room_is_left(holding: Holding) -> None:
    holding.segment.publish(3, OTHER)
    holding.segment.quarantine(3)
    empty = Looked(holding, View({}))
    assert empty(View({"n1": {3: GOOD}, "n2": {3: OTHER}})) == {3: [("n2", 50003)], 7: []}
    empty._look._without_room = {3}
    assert empty(View({"n2": {3: OTHER, 7: GOOD}})) == {7: [("n2", 50007)]}

"""Who is asked where blocks are, and whose word is taken. The nodes are a double: none can be made to be wrong so."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import pytest

from shm.errors import HotspareError
from transfer.client.pinned_content import PinnedContent
from transfer.client.whereabouts import URLS_ASKED_MAX, Search
from transfer.shard_map import Mapped, Replica

MANIFEST: Any = None  # nothing here looks into it


def mapped(*node_ids: str, checksum: bytes = b"3" * 16) -> Mapped:
    return Mapped(checksum, tuple(Replica(node, f"session of {node}", 33) for node in node_ids))


class Nodes:
    """What each node says, by the last letter of its URL; one without an entry does not answer."""

    def __init__(self, maps: Mapping[str, Mapping[int, Mapped]], dead: str = "") -> None:
        self.urls = ["http://a", *sorted(f"http://{node}" for node in maps if node != "a")]
        self.maps = maps
        self.dead = set(dead)
        self.asked: list[str] = []
        self.asked_for: list[set[int]] = []
        self.learned: list[str] = []
        self.probed: list[str] = []

    def learn(self, url: str) -> str:
        self.learned.append(url[-1])
        return url[-1]

    def shard_map(
        self, url: str, manifest: Any, content: PinnedContent, rows: Collection[int]
    ) -> tuple[str, Mapping[int, Mapped]]:
        if url[-1] not in self.maps:
            raise HotspareError(f"{url} is silent")
        self.asked.append(url[-1])
        self.asked_for.append(set(rows))
        return url[-1], self.maps[url[-1]]

    def silent(self, node_ids: Collection[str], told_by: str) -> set[str]:
        self.probed.extend(node_ids)
        return self.dead.intersection(node_ids)


def nodes_of(found: Mapping[int, Mapped]) -> dict[int, str]:
    return {row: "".join(replica.node_id for replica in mapped.replicas) for row, mapped in found.items()}


def test_our_own_node_is_enough_where_it_knows_all() -> None:
    nodes = Nodes({"a": {0: mapped("a", "b"), 1: mapped("b"), 2: mapped("c")}, "b": {}, "c": {}})
    assert nodes_of(Search(nodes, MANIFEST, PinnedContent()).run([0, 1])) == {0: "ab", 1: "b"}
    assert nodes.asked == ["a"]
    assert sorted(nodes.probed) == ["b", "c"], "whoever just answered is not asked whether it lives"
    assert nodes.learned == [], "nobody else is needed"


def test_a_block_that_our_node_knows_on_a_dead_node_only_is_asked_of_the_others() -> None:
    nodes = Nodes({"a": {0: mapped("b"), 1: mapped("b", "c")}, "c": {0: mapped("b", "d"), 1: mapped("d")}}, dead="b")
    assert nodes_of(Search(nodes, MANIFEST, PinnedContent()).run([0, 1])) == {0: "d", 1: "c"}
    assert nodes.asked == ["a", "c"]
    assert nodes.asked_for == [{0, 1}, {0}], "only what is still missing"
    assert nodes.learned == ["a"]


def test_one_that_was_read_from_in_vain_is_asked_of_the_others_too() -> None:
    nodes = Nodes({"a": {0: mapped("b")}, "c": {0: mapped("b", "d")}})
    search = Search(nodes, MANIFEST, PinnedContent(), tried={(0, "session of b"), (1, "session of d")})
    assert nodes_of(search.run([0])) == {0: "d"}


@pytest.mark.parametrize(("bad", "expected"), [((), "ac"), ((0,), "c")])
def test_our_node_has_no_say_in_what_was_wrong_in_its_memory(bad: tuple[int, ...], expected: str) -> None:
    nodes = Nodes({"a": {0: mapped("a", "c")}})
    assert nodes_of(Search(nodes, MANIFEST, PinnedContent(), own="a", bad=bad).run([0])) == {0: expected}


def test_a_silent_node_of_our_own_is_noted_and_not_read_from() -> None:
    notes: list[str] = []
    nodes = Nodes({"b": {0: mapped("a", "b"), 1: mapped("a")}})
    assert nodes_of(Search(nodes, MANIFEST, PinnedContent(), own="a", note=notes.append).run([0, 1])) == {0: "b"}
    assert notes == ["http://a is silent"]


def test_only_so_many_nodes_are_asked() -> None:
    nodes = Nodes({letter: {} for letter in "abcdefghijklmnop"})
    assert Search(nodes, MANIFEST, PinnedContent()).run([0]) == {}
    assert len(nodes.asked) == URLS_ASKED_MAX


def test_a_replica_without_a_transfer_engine_is_of_no_use() -> None:
    here = Mapped(b"3" * 16, (Replica("b", "", 33), Replica("c", "session of c", 33)))
    nodes = Nodes({"a": {0: here, 1: here._replace(replicas=here.replicas[:1])}, "b": {}, "c": {}})
    assert nodes_of(Search(nodes, MANIFEST, PinnedContent()).run([0, 1])) == {0: "c"}

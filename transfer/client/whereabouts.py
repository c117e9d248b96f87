"""Which node that answers has which block: nodes are asked, our own first, until every block is found on one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Protocol

from shm.errors import HotspareError
from shm.manifest import Manifest
from transfer.client.pinned_content import PinnedContent
from transfer.shard_map import Mapped, Replica

URLS_ASKED_MAX = 8  # for their maps, in one search


class Nodes(Protocol):
    """The nodes' control planes: `transfer.client.control_plane.ControlPlane`."""

    urls: list[str]
    """Our own node's first. Grows."""

    def learn(self, url: str) -> str:
        """Remember the nodes that this one knows; returns its own id. Raises HotspareError."""
        ...

    def shard_map(
        self, url: str, manifest: Manifest, content: PinnedContent, rows: Collection[int]
    ) -> tuple[str, Mapping[int, Mapped]]:
        """This node's id, and who has which block, as it knows it: of these manifest rows at least.

        Raises HotspareError, also for other content.
        """
        ...

    def silent(self, node_ids: Collection[str], told_by: str) -> set[str]:
        """Those of the nodes that are known not to answer now; `told_by` is the URL that named them."""
        ...


def recorded(
    nodes: Nodes, manifest: Manifest, content: PinnedContent, rows: Iterable[int], note: Callable[[str], None]
) -> dict[int, bytes]:
    """Manifest row → the checksum that nodes have on record. Nodes are asked until each of `rows` has one."""
    found: dict[int, bytes] = {}
    missing = set(rows)
    for number in range(URLS_ASKED_MAX):
        if not missing or number == len(nodes.urls):
            break
        url = nodes.urls[number]
        try:
            _, told = nodes.shard_map(url, manifest, content, missing)
            found = {row: mapped.checksum for row, mapped in told.items()} | found
            missing.difference_update(found)
            if missing:
                nodes.learn(url)
        except HotspareError as error:
            note(str(error))
    return found


class Search:
    """One search. `own` is our own node's id; `bad` are rows that were wrong in the memory that it serves from;
    `tried` are (row, session) that were read from already."""

    def __init__(
        self,
        nodes: Nodes,
        manifest: Manifest,
        content: PinnedContent,
        *,
        own: str | None = None,
        bad: Collection[int] = (),
        tried: Collection[tuple[int, str]] = (),
        note: Callable[[str], None] = lambda said: None,
    ) -> None:
        self._nodes = nodes
        self._manifest = manifest
        self._content = content
        self._own = own
        self._bad = bad
        self._tried = tried
        self._note = note
        self._heard: set[str] = set()
        self._silent: set[str] = set()

    def run(self, rows: Iterable[int]) -> dict[int, Mapped]:
        """Row → the replicas that are worth reading from; rows without one are left out."""
        found: dict[int, Mapped] = {}
        missing = set(rows)
        for number in range(URLS_ASKED_MAX):
            if not missing or number == len(self._nodes.urls):
                break
            told = self._ask(number, missing)
            if told is None:
                continue
            for row in missing.intersection(told):
                if replicas := tuple(r for r in told[row].replicas if self._is_worth(row, r)):
                    found[row] = told[row]._replace(replicas=replicas)
            missing.difference_update(found)
            if missing:
                self._meet_others(self._nodes.urls[number])
        return found

    def _meet_others(self, url: str) -> None:
        try:
            self._nodes.learn(url)
        except HotspareError as error:
            self._note(str(error))

    def _ask(self, number: int, rows: Collection[int]) -> Mapping[int, Mapped] | None:
        """What a node says of these rows; None where it does not answer."""
        url = self._nodes.urls[number]
        try:
            node_id, told = self._nodes.shard_map(url, self._manifest, self._content, rows)
            self._heard.add(node_id)
            named = {replica.node_id for mapped in told.values() for replica in mapped.replicas}
            unknown = named - self._heard - self._silent
            self._silent |= self._nodes.silent(unknown, url) if unknown else set()
        except HotspareError as error:
            self._note(str(error))
            if number == 0 and self._own is not None:
                self._silent.add(self._own)
            return None
        self._heard |= named - self._silent
        return told

    def _is_worth(self, row: int, replica: Replica) -> bool:
        if not replica.session_id or replica.node_id in self._silent or (row, replica.session_id) in self._tried:
            return False
        return replica.node_id != self._own or row not in self._bad

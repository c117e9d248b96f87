"""Which node that answers has which block: nodes are asked, our own first, until every block is found on one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Protocol

from shm.errors import HotspareError
from shm.manifest import Manifest
from transfer.shard_map import Mapped, Replica

URLS_ASKED_MAX = 8  # for their maps, in one search


class Nodes(Protocol):
    """The nodes' control planes: `transfer.client.control_plane.ControlPlane`."""

    urls: list[str]
    """Our own node's first. Grows."""

    def learn(self, url: str) -> str:
        """Remember the nodes that this one knows; returns its own id. Raises HotspareError."""
        ...

    def shard_map(self, url: str, manifest: Manifest) -> Mapping[int, Mapped]:
        """Manifest row → who has the block, as this node knows it. Raises HotspareError."""
        ...

    def silent(self, node_ids: Iterable[str]) -> set[str]:
        """Those of the nodes that are known not to answer now."""
        ...


class Search:
    """One search. `own` is our own node's id; `bad` are rows that were wrong in the memory that it serves from;
    `tried` are (row, session) that were read from already."""

    def __init__(
        self,
        nodes: Nodes,
        manifest: Manifest,
        *,
        own: str | None = None,
        bad: Collection[int] = (),
        tried: Collection[tuple[int, str]] = (),
        note: Callable[[str], None] = lambda said: None,
    ) -> None:
        self._nodes = nodes
        self._manifest = manifest
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
            told = self._ask(number)
            for row in missing.intersection(told):
                if replicas := tuple(r for r in told[row].replicas if self._is_worth(row, r)):
                    found[row] = told[row]._replace(replicas=replicas)
            missing.difference_update(found)
        return found

    def _ask(self, number: int) -> Mapping[int, Mapped]:
        url = self._nodes.urls[number]
        try:
            self._heard.add(self._nodes.learn(url))
            told = self._nodes.shard_map(url, self._manifest)
        except HotspareError as error:
            self._note(str(error))
            if number == 0 and self._own is not None:
                self._silent.add(self._own)
            return {}
        named = {replica.node_id for mapped in told.values() for replica in mapped.replicas}
        unknown = named - self._heard - self._silent
        self._silent |= self._nodes.silent(unknown) if unknown else set()
        self._heard |= named - self._silent
        return told

    def _is_worth(self, row: int, replica: Replica) -> bool:
        if not replica.session_id or replica.node_id in self._silent or (row, replica.session_id) in self._tried:
            return False
        return replica.node_id != self._own or row not in self._bad

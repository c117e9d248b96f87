"""Who has the blocks that this node restores, nearest first: the same for its own segment and for its consumers.

Peers come back and are filled while a restore runs: before it gives a block up, it looks once more (`SecondLook`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence

from app.cluster.cluster import Cluster
from app.cluster.membership import PeerState
from app.cluster.peers import PeerBlocks
from app.node.holding import Holding
from transfer.offers import Holder, Offers, offers
from transfer.restore import Found
from transfer.sources import Disk, HostMemory, PeerMemory, Source, on_disk

DISK = "disk"

_log = logging.getLogger("hotspare.node")

Reach = Callable[[str, PeerBlocks], PeerMemory]
"""Node id and what it has → how its memory is reached."""


def offer(
    holding: Holding,
    rows: Sequence[int],
    cluster: Cluster,
    own: HostMemory,
    reach: Reach | None,
    disk: Disk | None,
    predecessor: HostMemory | None = None,
) -> tuple[list[list[Source]], Offers]:
    """The sources in tiers, and what each has.

    Our own memory, also that of the holding's predecessor, then peers, then the disk; last, peers that did not answer
    just now: whoever asks those waits, up to a minute, and moves nothing else meanwhile. Without `reach` no peer is
    asked.
    """
    alive = {peer.node_id for peer in cluster.peers() if peer.state is PeerState.ALIVE}
    holdings = cluster.holdings() if reach is not None else {}
    peers = {node: reach(node, held) for node, held in holdings.items() if reach is not None}
    holders = [Holder(own, holding.segment.held(rows))]
    holders += [Holder(peers[node], held.blocks) for node, held in holdings.items()]
    tiers: list[list[Source]] = [[own], [source for node, source in peers.items() if node in alive]]
    expected = {row: holding.segment.checksum(row) for row in rows if holding.is_recorded(row)}
    if predecessor is not None and holding.predecessor is not None:
        left = holding.predecessor.held(rows)
        holders.insert(1, Holder(predecessor, left))
        tiers[0].append(predecessor)
        expected = {row: block.checksum for row, block in left.items()} | expected
    if disk is not None:
        holders.append(Holder(disk, on_disk(holding.manifest, rows)))
        tiers.append([disk])
    tiers.append([source for node, source in peers.items() if node not in alive])
    offered = offers(rows, holders, expected)
    for name, count in offered.left_aside.items():
        _log.warning(
            "%d blocks of %s are left aside: replicas disagree on them, or differ from our record", count, name
        )
    return tiers, offered


class SecondLook:
    """Of one restore: what peers offer by then that they did not when it was planned, which is when this is made."""

    def __init__(
        self,
        holding: Holding,
        cluster: Cluster,
        look: Callable[[], None],
        reach: Reach,
        without_room: Collection[int] = (),
    ) -> None:
        """`look` asks every peer how it is. Rows `without_room` cannot be brought, whoever has them."""
        self._holding, self._cluster, self._look, self._reach = holding, cluster, look, reach
        self._without_room = without_room
        self._before = cluster.holdings()

    def __call__(self, rows: Sequence[int]) -> Found:
        self._look()
        rows = [row for row in rows if row not in self._without_room]
        now = self._cluster.holdings()
        sources = {node: self._reach(node, held) for node, held in now.items()}
        expected = {row: self._holding.segment.checksum(row) for row in rows if self._holding.is_recorded(row)}
        found = offers(rows, [Holder(sources[node], held.blocks) for node, held in now.items()], expected)
        node_of = {source: node for node, source in sources.items()}
        new = {
            row: [offer for offer in each if self._is_new(node_of[offer.source], now, row)]  # type: ignore[index]
            for row, each in found.by_row.items()
        }
        return Found(list(sources.values()), new, found.expected)

    def _is_new(self, node: str, now: Mapping[str, PeerBlocks], row: int) -> bool:
        before = self._before.get(node)
        if before is None or before.session_id != now[node].session_id:
            return True
        return before.blocks.get(row) != now[node].blocks[row]

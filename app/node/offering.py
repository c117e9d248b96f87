"""Who has the blocks that this node restores, nearest first: the same for its own segment and for its consumers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from app.cluster.cluster import Cluster
from app.cluster.membership import PeerState
from app.cluster.peers import PeerBlocks
from app.node.holding import Holding, is_recorded
from transfer.offers import Holder, Offers, offers
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
    records = [holding.segment]
    if predecessor is not None and holding.predecessor is not None:
        records.append(holding.predecessor)
        holders.insert(1, Holder(predecessor, holding.predecessor.held(rows)))
        tiers[0].append(predecessor)
    if disk is not None:
        holders.append(Holder(disk, on_disk(holding.manifest, rows)))
        tiers.append([disk])
    tiers.append([source for node, source in peers.items() if node not in alive])
    expected = {row: record.checksum(row) for record in records for row in rows if is_recorded(record, row)}
    offered = offers(rows, holders, expected)
    for name, count in offered.left_aside.items():
        _log.warning(
            "%d blocks of %s are left aside: replicas disagree on them, or differ from our record", count, name
        )
    return tiers, offered

"""Who has the blocks that this node wants, nearest first, and the checksum that each must have."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

from app.cluster.cluster import Cluster
from app.cluster.membership import PeerState
from app.node.holding import UNKNOWN_CHECKSUM, Holding
from shm.layout import BlockState
from transfer.checkpoint.content import PinnedCheckpoint
from transfer.engine import TransferEngine
from transfer.plan import Offer
from transfer.sources import DiskSource, InPlace, PeerSource, Source, SourceKind

IN_PLACE = "in place"
DISK = "disk"

_log = logging.getLogger("hotspare.node")

Offered = tuple[list[list[Source]], dict[int, list[Offer]], dict[int, bytes]]


def offer(
    holding: Holding,
    rows: Sequence[int],
    cluster: Cluster,
    engine: TransferEngine,
    disk: PinnedCheckpoint | None,
    kinds: Collection[SourceKind],
) -> Offered:
    """Who has what, and the checksum that each row must have.

    In place, then peers, then disk; last, peers that did not answer just now: the engine would wait for them, up to
    a minute, and move nothing else meanwhile.
    """
    segment = holding.segment
    published = set(segment.rows(BlockState.PUBLISHED).tolist())
    expected = {row: c for row in rows if (c := segment.checksum(row)) != UNKNOWN_CHECKSUM}
    offers = {row: [Offer(IN_PLACE, segment.address(row))] if row in published else [] for row in rows}
    tiers: list[list[Source]] = [[InPlace(IN_PLACE)]]
    peers: list[Source] = []
    if SourceKind.PEER in kinds:
        peers = _offer_peers(holding, rows, cluster, engine, offers, expected)
        alive = {peer.node_id for peer in cluster.peers() if peer.state is PeerState.ALIVE}
        tiers.append([source for source in peers if source.name in alive])
        peers = [source for source in peers if source.name not in alive]
    if disk is not None:
        source = DiskSource(disk.checkpoint, DISK)
        tiers.append([source])
        for row in rows:
            offers[row].append(Offer(DISK, source.position(row)))
    tiers.append(peers)
    return tiers, offers, expected


def _offer_peers(
    holding: Holding,
    rows: Sequence[int],
    cluster: Cluster,
    engine: TransferEngine,
    offers: dict[int, list[Offer]],
    expected: dict[int, bytes],
) -> list[Source]:
    holdings = cluster.holdings()
    for row in rows:
        held = [(node, block) for node, peer in holdings.items() if (block := peer.blocks.get(row)) is not None]
        if row not in expected:
            said = {block[1] for _, block in held}
            if len(said) != 1:
                if said:
                    key = holding.manifest.keys[row]
                    _log.error("replicas of %s disagree: %s", key, ", ".join(node for node, _ in held))
                continue
            expected[row] = said.pop()
        offers[row].extend(Offer(node, block[0]) for node, block in held if block[1] == expected[row])
    return [PeerSource(node, peer.session_id, engine) for node, peer in holdings.items()]

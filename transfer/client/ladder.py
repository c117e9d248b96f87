"""The rungs that a restore into slots climbs: this host's segment, then peers and, behind them, the disk.

Each rung is a `transfer.restore.Restore` over what the rungs before it could not bring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from shm.attachment import Attachment
from shm.block import HeldBlock
from transfer.checkpoint.content import PinnedCheckpoint
from transfer.client.bound_slots import CPU, BoundTable
from transfer.client.report import Tally
from transfer.engine import TransferEngine
from transfer.offers import Holder, offers
from transfer.plan import Limits, Want
from transfer.restore import Restore
from transfer.shard_map import Mapped
from transfer.slots.destination import SlotDestination
from transfer.sources import (
    LOCAL_LANES_MAX,
    Disk,
    HostMemory,
    PeerMemory,
    Source,
    local_limits,
    on_disk,
    reading,
)

LOCAL, DISK = "local", "disk"
PEER_BATCH_NBYTES = 96 << 20
PASSES_MAX = 3  # rounds of asking where blocks are: a node that was restarted has another session


class Reach(NamedTuple):
    """What peers' bytes come through: an engine, if there is one; see `Ladder.climb`."""

    engine: TransferEngine | None
    fence: Callable[[], None] | None
    is_straight: bool = False


class Ladder:
    """One restore's way up. `missing` is what is still to bring: manifest row → what each source said."""

    def __init__(self, bound: BoundTable, rows: Iterable[int], tally: Tally) -> None:
        self.manifest = bound.manifest
        self._bound = bound
        self._tally = tally
        self._expected: dict[int, bytes] = {}
        self.tried: set[tuple[int, str]] = set()
        """(row, session) of the peers that were read from."""
        self.missing: dict[int, list[str]] = {row: [] for row in rows}
        self.wrong: dict[str | None, list[int]] = {}
        """Node id, or None for this host's memory → the rows that were read wrong there."""
        self._node_of: dict[Source, str | None] = {}

    def climb_local(self, attachment: Attachment, held: Mapping[int, HeldBlock]) -> None:
        """Take what an attached segment has."""
        rows = [row for row in self.missing if row in held]
        if not rows:
            return
        bound = self._bound
        stages_host = bound.device != CPU and not attachment.is_pinned(rows)
        total, lanes = int(bound.manifest.nbytes[rows].sum()), max(2, min(LOCAL_LANES_MAX, bound.memory.lanes))
        direct = local_limits(total, lanes, share_a_bus=bound.device != CPU)
        limits = Limits(nbytes=bound.staging.capacity) if stages_host else direct
        source = HostMemory(LOCAL, attachment, lanes=lanes, limits=limits)
        self._node_of[source] = None
        self._expected.update((row, held[row].checksum) for row in rows)
        self._run([Holder(source, held)], [[source]], rows, self._destination(stages_host=stages_host))

    def climb_all(
        self,
        find: Callable[[Ladder], Mapping[int, Mapped]],
        reach: Callable[[], Reach],
        checkpoint: Callable[[], PinnedCheckpoint] | None,
    ) -> None:
        """Take what is missing from peers, and once from the disk, for as long as somebody has something new to offer.

        `find` says who has what is missing, and `reach` how they are read now; `checkpoint` as for `climb`.
        """
        for attempt in range(PASSES_MAX):
            if not self.missing:
                return
            found, through = find(self), reach()
            disk = checkpoint if attempt == 0 else None
            if not self.climb(found, through.engine, disk, is_straight=through.is_straight, fence=through.fence):
                return

    def climb(
        self,
        found: Mapping[int, Mapped],
        engine: TransferEngine | None,
        checkpoint: Callable[[], PinnedCheckpoint] | None,
        *,
        is_straight: bool,
        fence: Callable[[], None] | None = None,
    ) -> bool:
        """Take from peers, and from the disk what no peer could give; False if nobody had anything new to offer.

        `checkpoint` is called, and its headers read, only if something is to come from it; raises CheckpointError.
        `fence` ends what the engine was asked for and was given up on.
        """
        peers = {} if engine is None else self._peers(found, engine)
        holders = [Holder(source, has) for source, has in peers.items()]
        tiers: list[Sequence[Source]] = [list(peers)]
        if checkpoint is not None:
            disk = Disk(DISK, checkpoint, limits=Limits(nbytes=self._bound.staging.capacity))
            holders.append(Holder(disk, on_disk(self._bound.manifest, self.missing)))
            tiers.append([disk])
        rows = [row for row in self.missing if any(row in has for _, has in holders)]
        if rows:
            self._run(holders, tiers, rows, self._destination(engine=engine, is_straight=is_straight), fence)
        return bool(rows)

    def _peers(
        self, found: Mapping[int, Mapped], engine: TransferEngine
    ) -> dict[PeerMemory, Mapping[int, tuple[int, bytes]]]:
        """A source a session, with what is to be read from it for the first time."""
        has: dict[tuple[str, str], dict[int, tuple[int, bytes]]] = {}
        for row in self.missing:
            for replica in found[row].replicas if row in found else ():
                if (row, replica.session_id) not in self.tried:
                    self.tried.add((row, replica.session_id))
                    session = replica.node_id, replica.session_id
                    has.setdefault(session, {})[row] = replica.address, found[row].checksum
        limits = Limits(nbytes=min(self._bound.staging.capacity, PEER_BATCH_NBYTES))
        peers: dict[PeerMemory, Mapping[int, tuple[int, bytes]]] = {}
        for (node, session_id), blocks in has.items():
            source = PeerMemory(f"{node} ({session_id})", reading(engine, session_id), limits=limits)
            self._node_of[source] = node
            peers[source] = blocks
        return peers

    def _destination(self, **options: Any) -> SlotDestination:
        bound = self._bound
        return SlotDestination(bound.memory, bound.table, bound.staging, self._tally.tick, **options)

    def _run(
        self,
        holders: Sequence[Holder],
        tiers: Sequence[Sequence[Source]],
        rows: Sequence[int],
        destination: SlotDestination,
        fence: Callable[[], None] | None = None,
    ) -> None:
        manifest = self._bound.manifest
        offered = offers(rows, holders, self._expected)
        self._expected.update(offered.expected)
        sizes = manifest.nbytes[rows].tolist()
        wants = [Want(row, size, offered.expected.get(row)) for row, size in zip(rows, sizes, strict=True)]
        keys = manifest.keys.__getitem__
        restore = Restore(wants, offered.by_row, tiers, destination, keys, reasons=offered.reasons, fence=fence)
        self._tally.start_pass(restore.report)
        try:
            report = restore.run()
        except Exception as error:  # whatever it is, the engine goes on; which blocks are good is not known
            self._tally.end_pass(None)
            for row in rows:
                self.missing[row].append(f"{type(error).__name__}: {error}")
            return
        self._tally.end_pass(report)
        for source, wrong in restore.wrong.items():
            if source in self._node_of:
                self.wrong.setdefault(self._node_of[source], []).extend(wrong)
        failed = {manifest.index(*block.key): block.reason for block in report.failed}
        for row in rows:
            if row in failed:
                self.missing[row].append(failed[row])
            else:
                del self.missing[row]

"""The rungs that a restore into slots climbs: this host's segment, then peers and, behind them, the disk.

Each rung is a `transfer.restore.Restore` over what the rungs before it could not bring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from shm.attachment import Attachment, HeldBlock
from transfer.checkpoint import Checkpoint
from transfer.client.bound_slots import CPU, BoundSlots
from transfer.client.report import Tally
from transfer.client.sources import DiskSlots, LocalSlots, PeerSlots, SlotDestination, SlotSource, want_of
from transfer.client.whereabouts import Mapped
from transfer.engine import TransferEngine
from transfer.plan import Offer
from transfer.restore import Restore
from transfer.sources import DiskSource, position_on_disk

LOCAL, DISK = "local", "disk"


class Ladder:
    """One restore's way up. `missing` is what is still to bring: manifest row → what each source said."""

    def __init__(self, bound: BoundSlots, rows: Iterable[int], tally: Tally) -> None:
        self._bound = bound
        self._tally = tally
        self._expected: dict[int, bytes] = {}
        self.tried: set[tuple[int, str]] = set()
        """(row, session) of the peers that were read from."""
        self.missing: dict[int, list[str]] = {row: [] for row in rows}
        self.has_timed_out = False
        """Whether bytes may still arrive in a slot."""

    def climb_local(self, attachment: Attachment, held: Mapping[int, HeldBlock]) -> None:
        """Take what an attached segment has."""
        self._expected.update((row, block.checksum) for row, block in held.items())
        rows = [row for row in self.missing if row in held]
        if not rows:
            return
        staging = None if self._bound.device == CPU or attachment.is_pinned(rows) else self._bound.staging
        total = int(self._bound.manifest.nbytes[rows].sum())
        source = LocalSlots(LOCAL, attachment, self._bound.memory, total, staging)
        self._run(rows, {row: [Offer(LOCAL, held[row].address)] for row in rows}, [[source]])

    def climb(
        self,
        found: Mapping[int, Mapped],
        engine: TransferEngine | None,
        checkpoint: Callable[[], Checkpoint] | None,
        *,
        is_straight: bool,
    ) -> bool:
        """Take from peers, and from the disk what no peer could give; False if nobody had anything new to offer.

        `checkpoint` is called, and its headers read, only if something is to come from it; raises CheckpointError.
        """
        offers: dict[int, list[Offer]] = {}
        addresses: dict[tuple[str, str], dict[int, int]] = {}
        for row in self.missing:
            mapped = found.get(row)
            if mapped is None or engine is None:
                continue
            for replica in mapped.replicas:
                if self._expected.setdefault(row, mapped.checksum) != mapped.checksum:
                    self.missing[row].append(f"{replica.node_id} has other content")
                elif (row, replica.session_id) not in self.tried:
                    self.tried.add((row, replica.session_id))
                    name = f"{replica.node_id} ({replica.session_id})"
                    addresses.setdefault((name, replica.session_id), {})[row] = replica.address
                    offers.setdefault(row, []).append(Offer(name, replica.address))
        bound = self._bound
        peers = [
            PeerSlots(name, session, held, engine, bound.memory, bound.table, bound.staging, is_straight=is_straight)
            for (name, session), held in addresses.items()
            if engine is not None
        ]
        tiers: list[Sequence[SlotSource]] = [peers]
        if checkpoint is not None:
            tiers.append([DiskSlots(DISK, lambda: DiskSource(checkpoint(), DISK), bound.memory, bound.staging)])
            for row in self.missing:
                offers.setdefault(row, []).append(Offer(DISK, position_on_disk(bound.manifest, row)))
        if offers:
            self._run(list(offers), offers, tiers)
        self.has_timed_out |= any(peer.timed_out for peer in peers)
        return bool(offers)

    def _run(
        self, rows: Sequence[int], offers: Mapping[int, Sequence[Offer]], tiers: Sequence[Sequence[SlotSource]]
    ) -> None:
        bound = self._bound
        sizes = bound.manifest.nbytes[rows].tolist()
        wants = [want_of(row, nbytes, self._expected.get(row)) for row, nbytes in zip(rows, sizes, strict=True)]
        destination = SlotDestination(bound.memory, bound.table, self._tally.tick)
        restore = Restore(wants, offers, tiers, destination, bound.manifest.keys.__getitem__)
        self._tally.start_pass(restore.report)
        try:
            report = restore.run()
        except Exception as error:  # whatever it is, the engine goes on; which blocks are good is not known
            self._tally.end_pass(None)
            for row in rows:
                self.missing[row].append(f"{type(error).__name__}: {error}")
            return
        self._tally.end_pass(report)
        failed = {bound.manifest.index(*block.key): block.reason for block in report.failed}
        for row in rows:
            if row in failed:
                self.missing[row].append(failed[row])
            else:
                del self.missing[row]

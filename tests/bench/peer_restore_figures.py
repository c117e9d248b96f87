"""Restoring a segment from a peer over loopback, against a bare loop of Mooncake reads; and against the disk.

    python tests/bench/peer_restore_figures.py [--gib 1] [--rounds 5]

The peer is a real `hotspare serve` that has filled itself. Ours: `Segment.allocate`, registration, then a `Restore`
from a `PeerMemory` with the checksums that the peer's shard map tells, sealing included. The baseline: a new object of
the same size, reserved, mapped and registered in the same way, and one loop of Mooncake's `batch_transfer_sync_read`
over the same bytes, in the same batches, with the same engine in the same process, and no checksum.
Both pay for the first touch of every page.

The disk: the same blocks from the checkpoint's files, with the page cache warm, and with the files' pages dropped
before each run. What a disk gives cold is that machine's, and no target.
"""

from __future__ import annotations

import mmap
import os
import statistics
import time
from pathlib import Path

import numpy as np
from workbench import GIB, MODEL, Bench, Daemon, Figure, arguments, bench, paired, shape_of, tell

from app.cli.daemon import silence_native_output
from app.cluster.peers import PeerBlocks, PeerClient
from app.node.destination import SegmentDestination
from shm import posix
from shm.segment import Segment
from transfer.checkpoint import Checkpoint, read_checkpoint
from transfer.checkpoint.content import pin
from transfer.engine import Copy, MooncakeEngine
from transfer.engine.protocol import within_pieces
from transfer.plan import Limits, Offer, Queue, Want, coalesce
from transfer.restore import Restore
from transfer.sources import Disk, PeerMemory, Source, on_disk, reading

SPEED_MIN = 0.8
HOST = "127.0.0.1"
PEER = "peer"


class Scene:
    """The peer's blocks, our engine, and ways to bring the blocks here. Each returns seconds."""

    def __init__(self, made: Bench, directory: Path, peer: PeerBlocks, engine: MooncakeEngine) -> None:
        self._made = made
        self._peer = peer
        self._engine = engine
        self.checkpoint: Checkpoint = read_checkpoint(directory, MODEL)
        self._pinned = pin(self.checkpoint)
        self.manifest = self.checkpoint.manifest
        self.rows = range(len(self.manifest))

    def _wants(self, segment: Segment) -> list[Want]:
        return [Want(row, n, self._peer.blocks[row][1]) for row, n in enumerate(self.manifest.nbytes.tolist())]

    def _offers(self, source: Source) -> dict[int, list[Offer]]:
        return {row: [Offer(source, self._peer.blocks[row][0])] for row in self.rows}

    def _restore(self, source: Source, offers: dict[int, list[Offer]]) -> float:
        segment = Segment.claim(self._made.name("ours"))
        ranges: list[tuple[int, int]] = []
        try:
            started = time.perf_counter()
            segment.allocate(self.manifest, self.rows)
            ranges = segment.data_ranges()
            self._engine.register(ranges)
            destination = SegmentDestination(self._made.holding(segment))
            key_of = self.manifest.keys.__getitem__
            report = Restore(self._wants(segment), offers, [[source]], destination, key_of).run()
            segment.seal()
            seconds = time.perf_counter() - started
            assert report.ok, report.error
            return seconds
        finally:
            self._engine.unregister(ranges)
            segment.unlink()

    def from_peer(self) -> float:
        peer = PeerMemory(PEER, reading(self._engine, self._peer.session_id))
        return self._restore(peer, self._offers(peer))

    def from_disk(self) -> float:
        disk = Disk("disk", lambda: self._pinned)
        offers = {row: [Offer(disk, at)] for row, (at, _) in on_disk(self.manifest, self.rows).items()}
        return self._restore(disk, offers)

    def from_cold_disk(self) -> float:
        for number in range(len(self.manifest.files)):
            fd = os.open(self.checkpoint.path(number), os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
        return self.from_disk()

    def bare(self) -> float:
        segment = Segment.claim(self._made.name("layout"))
        segment.allocate(self.manifest, self.rows)  # only to learn where the blocks would lie
        base, nbytes, wants = segment.data_ranges()[0][0], segment.nbytes, self._wants(segment)
        places = [segment.address(row) for row in self.rows]
        skipped = nbytes - segment.data_ranges()[0][1]
        segment.unlink()
        del segment
        queue = Queue()
        for want in wants:
            queue.put(want, self._peer.blocks[want.row][0])
        batches = []
        while queue:
            batches.append(queue.cut(PEER, Limits()))
        name = self._made.name("bare").object_name
        started = time.perf_counter()
        fd = posix.create_exclusive(name)
        posix.reserve(fd, 0, nbytes)
        mapping = mmap.mmap(fd, nbytes)
        mapping.madvise(mmap.MADV_HUGEPAGE)
        address = int(np.frombuffer(mapping, np.uint8).ctypes.data)
        region = [(address + skipped, nbytes - skipped)]
        self._engine.register(region)
        try:
            shift = address + skipped - base
            for batch in batches:
                moved = coalesce(
                    Copy(places[want.row] + shift, at, want.nbytes)
                    for want, at in zip(batch.wants, batch.addresses, strict=True)
                )
                here, there, sizes = map(list, zip(*within_pieces(moved), strict=True))
                assert self._engine._engine.batch_transfer_sync_read(self._peer.session_id, here, there, sizes) == 0
            return time.perf_counter() - started
        finally:
            self._engine.unregister(region)
            os.close(fd)
            posix.unlink(name)


def main() -> None:
    options = arguments(__doc__, gib=(1.0, "GiB of experts"), rounds=(5, "pairs of runs"))
    with bench() as made:
        directory = made.checkpoint("checkpoint", shape_of(int(options.gib * GIB)))
        with Daemon(made, PEER, "--checkpoint", str(directory), "--fill", "disk") as daemon:
            daemon.wait_until_ready()
            with silence_native_output():
                engine = MooncakeEngine(HOST)
            client = PeerClient()
            session_id = client.node(daemon.url)["session_id"]
            peer = client.blocks(daemon.url, PEER, read_checkpoint(directory, MODEL).manifest)
            assert peer.session_id == session_id
            client.close()
            scene = Scene(made, directory, peer, engine)
            nbytes = int(scene.manifest.nbytes.sum())
            pairs = paired(scene.from_peer, scene.bare, options.rounds, nbytes)
            warm = paired(scene.from_peer, scene.from_disk, max(1, options.rounds // 2), nbytes)
            cold = paired(scene.from_peer, scene.from_cold_disk, max(1, options.rounds // 2), nbytes)
    figures = [
        Figure(
            f"peer restore, {nbytes / GIB:.1f} GiB, of a bare read loop", f"{pairs.ratio:.2f}", f"at least {SPEED_MIN}",
            pairs.ratio >= SPEED_MIN,
            f"{pairs.rate(pairs.ours_s)} against {pairs.rate(pairs.bare_s)}; rounds {pairs.spread}",
        ),
        *(
            Figure(
                f"the same, of a fill from the disk, {what}", f"{each.ratio:.2f}",
                note=f"disk {each.rate(each.bare_s)} in {statistics.median(each.bare_s):.2f} s; rounds {each.spread}",
            )
            for what, each in (("page cache warm", warm), ("files dropped from it", cold))
        ),
    ]  # fmt: skip
    document = {"against_bare": pairs.document(), "warm_disk": warm.document(), "cold_disk": cold.document()}
    tell(figures, document, as_json=options.json)


if __name__ == "__main__":
    main()

"""Filling a segment from warm files, against a bare parallel `preadv`; and the daemon's memory while it fills.

    python tests/bench/fill_figures.py [--gib 1] [--large-gib 8] [--rounds 5]

Speed. Ours: `Segment.allocate`, then a `Restore` from a `Disk`, as a node does it: checksums, publishing and
sealing included. The baseline: a new object of the same size, reserved and mapped in the same way, into which as many
threads read the same file ranges to the same offsets in the same chunks, and do nothing else. Both pay for the first
touch of every page.

Memory. A real `hotspare serve` fills itself. Counted is RssAnon + RssFile of its /proc/PID/status, every 5 ms: all of
the process's memory but the segment. That is an upper bound of the private memory, since it has the pages of shared
libraries too. The large checkpoint has real headers, and holes for content: to the daemon they are files like others.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import posix_ipc
from workbench import GIB, MIB, MODEL, Bench, Daemon, Figure, Pairs, arguments, bench, paired, shape_of, tell

from app.node.destination import SegmentDestination
from shm import posix
from shm.segment import Segment
from transfer.checkpoint import Checkpoint, read_checkpoint
from transfer.checkpoint.content import PinnedCheckpoint, pin
from transfer.checkpoint.reader import READ_CHUNK_NBYTES, position_on_disk, runs_of
from transfer.plan import Offer, Want
from transfer.restore import Restore
from transfer.sources import Disk, on_disk

SPEED_MIN = 0.8
PRIVATE_MIB_MAX = 300
SAMPLE_INTERVAL_S = 0.005


def fill(made: Bench, pinned: PinnedCheckpoint) -> float:
    """Seconds to fill and seal a new segment with every block."""
    segment = Segment.claim(made.name("ours"))
    checkpoint, rows = pinned.checkpoint, range(len(pinned.checkpoint.manifest))
    try:
        started = time.perf_counter()
        segment.allocate(checkpoint.manifest, rows)
        disk = Disk("disk", lambda: pinned)
        wants = [Want(row, n, None) for row, n in enumerate(checkpoint.manifest.nbytes.tolist())]
        offers = {row: [Offer(disk, at)] for row, (at, _) in on_disk(checkpoint.manifest, rows).items()}
        holding = made.holding(segment)
        destination = SegmentDestination(holding)
        report = Restore(wants, offers, [[disk]], destination, checkpoint.manifest.keys.__getitem__).run()
        segment.seal()
        seconds = time.perf_counter() - started
        assert report.ok, report.error
        return seconds
    finally:
        segment.unlink()


def bare_ranges(made: Bench, checkpoint: Checkpoint) -> tuple[int, list[tuple[int, int, int, int]]]:
    """Size of the object, and (file, file offset, offset in the object, bytes) of every range, in order on disk."""
    segment = Segment.claim(made.name("layout"))
    try:
        segment.allocate(checkpoint.manifest, range(len(checkpoint.manifest)))
        start = segment.data_ranges()[0][0] - segment.header.data_offset
        ranges = [
            (run.file, run.file_offset, segment.address(row) - start + run.offset, run.nbytes)
            for row in sorted(range(len(checkpoint.manifest)), key=partial(position_on_disk, checkpoint.manifest))
            for run in runs_of(checkpoint.manifest.block(row).tensors)
        ]
        return segment.nbytes, ranges
    finally:
        segment.unlink()


def read_bare(made: Bench, checkpoint: Checkpoint, nbytes: int, ranges: list[tuple[int, int, int, int]]) -> float:
    """Seconds to read the ranges into a new mapping, and nothing else."""
    name = made.name("bare").object_name
    files = {file: os.open(checkpoint.path(file), os.O_RDONLY) for file in {each[0] for each in ranges}}
    queue = deque(ranges)
    started = time.perf_counter()
    fd = posix.create_exclusive(name)
    try:
        posix.reserve(fd, 0, nbytes)
        mapping = mmap.mmap(fd, nbytes)
        mapping.madvise(mmap.MADV_HUGEPAGE)
        view = memoryview(mapping)

        def lane() -> None:
            while queue:
                try:
                    file, file_offset, offset, size = queue.popleft()
                except IndexError:
                    return
                for at in range(0, size, READ_CHUNK_NBYTES):
                    chunk = view[offset + at : offset + min(size, at + READ_CHUNK_NBYTES)]
                    assert os.preadv(files[file], [chunk], file_offset + at) == len(chunk)

        lanes = Disk("disk", partial(pin, checkpoint)).lanes
        with ThreadPoolExecutor(lanes) as pool:
            for done in [pool.submit(lane) for _ in range(lanes)]:
                done.result()
        seconds = time.perf_counter() - started
        view.release()
        mapping.close()
        return seconds
    finally:
        os.close(fd)
        posix_ipc.unlink_shared_memory("/" + name)
        for each in files.values():
            os.close(each)


def speed(made: Bench, directory: Path, rounds: int) -> Pairs:
    checkpoint = read_checkpoint(directory, MODEL)
    nbytes, ranges = bare_ranges(made, checkpoint)
    return paired(
        partial(fill, made, pin(checkpoint)),
        lambda: read_bare(made, checkpoint, nbytes, ranges),
        rounds,
        int(checkpoint.manifest.nbytes.sum()),
    )


class MemorySampler(threading.Thread):
    """The largest RssAnon + RssFile of a process that it saw, in bytes, until the process or the block ends."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._status = Path(f"/proc/{pid}/status")
        self._stopped = threading.Event()
        self.peak_nbytes = 0

    def run(self) -> None:
        while not self._stopped.wait(SAMPLE_INTERVAL_S):
            try:
                fields = dict(line.split(":", 1) for line in self._status.read_text().splitlines())
                now = sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))
            except (OSError, KeyError):
                return
            self.peak_nbytes = max(self.peak_nbytes, now)

    def __enter__(self) -> MemorySampler:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self.join()


def memory(made: Bench, directory: Path) -> tuple[int, int]:
    """The daemon's largest memory beyond the segment while it fills, and the segment's size, in bytes."""
    with Daemon(made, "memory", "--checkpoint", str(directory), "--fill", "disk") as daemon:
        with MemorySampler(daemon.process.pid) as sampler:
            daemon.wait_until_ready()
        nbytes = os.stat(f"/dev/shm/{made.name('memory').object_name}").st_size
    posix.unlink(made.name("memory").object_name)
    return sampler.peak_nbytes, nbytes


def main() -> None:
    options = arguments(
        __doc__,
        gib=(1.0, "GiB of experts for the speed, and for the first look at the memory"),
        large_gib=(8.0, "GiB of experts for the second look; 0 leaves it out"),
        rounds=(5, "pairs of runs"),
    )
    figures = []
    with bench() as made:
        directory = made.checkpoint("checkpoint", shape_of(int(options.gib * GIB)))
        pairs = speed(made, directory, options.rounds)
        rates = f"{pairs.rate(pairs.ours_s)} against {pairs.rate(pairs.bare_s)}; rounds {pairs.spread}"
        what, target = f"fill, {pairs.nbytes / GIB:.1f} GiB, of bare preadv", f"at least {SPEED_MIN}"
        figures.append(Figure(what, f"{pairs.ratio:.2f}", target, pairs.ratio >= SPEED_MIN, rates))
        peaks = [memory(made, directory)]
        if options.large_gib:
            peaks.append(memory(made, made.checkpoint("large", shape_of(int(options.large_gib * GIB)), sparse=True)))
    figures += [
        Figure(
            f"memory beyond the segment, {nbytes / GIB:.1f} GiB", f"{peak / MIB:.0f} MiB",
            f"at most {PRIVATE_MIB_MAX} MiB", peak <= PRIVATE_MIB_MAX * MIB,
        )
        for peak, nbytes in peaks
    ]  # fmt: skip
    tell(figures, {"speed": pairs.document(), "memory": peaks}, as_json=options.json)


if __name__ == "__main__":
    main()

"""Carry out a restore: bring wanted blocks from the nearest source that has them, verify, publish, report.

In rounds. Each block goes to the nearest tier that still offers it; a batch that fails, or a block whose checksum is
wrong, loses that offer and goes to the next. A round takes at least one offer from each block it does not finish, so
the number of rounds has a limit without being given one.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Protocol

from shm.block import ExpertKey
from shm.errors import HotspareError
from transfer.errors import TransferFailed
from transfer.plan import Batch, Offer, Want, plan
from transfer.progress import FailedBlock, Progress, Report, RestoreState
from transfer.sources import Source

LANES_MAX = 32  # threads that move bytes, over all sources
VERIFY_THREADS_MAX = 8
UNVERIFIED_BATCHES_MAX = 2  # a lane waits for its checksums beyond that
SOURCE_FAILURES_MAX = 2  # failed batches, after which a source is not asked again in this restore
REASONS_MAX = 4  # remembered for each block

_log = logging.getLogger("hotspare.restore")


class Destination(Protocol):
    """Where blocks go. Called from several threads, for different blocks."""

    def begin(self, want: Want) -> None:
        """Hide the block: its bytes are about to change."""
        ...

    def checksum(self, want: Want) -> bytes:
        """The xxh3-128 of the block's bytes as they lie at the destination."""
        ...

    def publish(self, want: Want, checksum: bytes) -> None:
        """The block is right: let it be found."""
        ...


class Restore:
    """One restore, from start to report. `run` blocks; `cancel` and `report` are for other threads."""

    def __init__(
        self,
        wants: Iterable[Want],
        offers: Mapping[int, Sequence[Offer]],
        tiers: Sequence[Sequence[Source]],
        destination: Destination,
        key_of: Callable[[int], ExpertKey],
        progress: Progress | None = None,
        settle: Callable[[], None] = lambda: None,
    ) -> None:
        """`tiers` are the sources, nearest first; `offers` says which of them have which row, and where.

        `settle` is called once all is published that could be had, before the report says that it is over.
        """
        self._pending = {want.row: want for want in wants}
        self._offers = {row: list(offered) for row, offered in offers.items()}
        self._sources = {source.name: source for tier in tiers for source in tier}
        self._tier = {source.name: number for number, tier in enumerate(tiers) for source in tier}
        self._destination = destination
        self._key_of = key_of
        self._settle = settle
        self.progress = progress or Progress()
        self._cancelled = threading.Event()
        self._lock = threading.Lock()
        self._failures: dict[str, int] = defaultdict(int)
        self._reasons: dict[int, list[str]] = defaultdict(list)
        self._late: dict[int, tuple[Want, Source, bytes]] = {}
        self._timed_out: set[int] = set()

    def cancel(self) -> None:
        """Stop after the batches under way. What was published stays, what was not is not."""
        self._cancelled.set()

    def report(self) -> Report:
        return self.progress.report()

    def run(self) -> Report:
        """Bring every block that can be had. Never raises for what a source does; the report says what is missing."""
        self.progress.start(len(self._pending), sum(want.nbytes for want in self._pending.values()))
        try:
            self._run()
        except BaseException as error:
            self.progress.finish(RestoreState.FAILED, f"{type(error).__name__}: {error}")
            raise
        finally:
            for source in self._sources.values():
                source.close()
        return self.report()

    def _run(self) -> None:
        verifiers = min(VERIFY_THREADS_MAX, max(2, len(self._sources)))
        with ThreadPoolExecutor(verifiers, thread_name_prefix="hotspare-verify") as pool:
            has_spoiled = True
            while has_spoiled:
                while self._pending and not self._cancelled.is_set() and self._round(pool):
                    continue
                has_spoiled = self._settle_late()
        self._settle()
        if self._cancelled.is_set() and self._pending:
            self.progress.finish(RestoreState.CANCELLED, "cancelled on request")
            return
        failed = [FailedBlock(self._key_of(row), self._reason(row)) for row in sorted(self._pending)]
        self.progress.fail(failed)
        if failed:
            self.progress.finish(
                RestoreState.FAILED, f"{len(failed)} blocks could not be had; first {failed[0].key}: {failed[0].reason}"
            )
        else:
            self.progress.finish(RestoreState.SUCCEEDED)

    def _reason(self, row: int) -> str:
        return "; ".join(self._reasons[row]) or "no source that was allowed and could be reached has it"

    # -- one round -------------------------------------------------------------------------------------------

    def _nearest(self, row: int) -> list[Offer]:
        offered = [o for o in self._offers.get(row, ()) if self._failures[o.source] < SOURCE_FAILURES_MAX]
        nearest = min((self._tier[o.source] for o in offered), default=None)
        return [o for o in offered if self._tier[o.source] == nearest]

    def _round(self, pool: ThreadPoolExecutor) -> bool:
        """Move what can be moved from each block's nearest sources; False if nobody offers anything."""
        offers = {row: self._nearest(row) for row in self._pending}
        limits = {name: source.limits for name, source in self._sources.items()}
        planned = plan(list(self._pending.values()), offers, limits).batches
        if not planned:
            return False
        queues = {name: deque(batches) for name, batches in planned.items()}
        lanes = [name for name, queue in queues.items() for _ in range(min(self._sources[name].lanes, len(queue)))]
        with ThreadPoolExecutor(min(LANES_MAX, len(lanes)), thread_name_prefix="hotspare-move") as movers:
            running = [movers.submit(self._lane, self._sources[name], queues[name], pool) for name in lanes]
            for lane in running:
                lane.result()
        return True

    def _lane(self, source: Source, queue: deque[Batch], pool: ThreadPoolExecutor) -> None:
        backlog: deque[list[Future[None]]] = deque()  # of batches whose checksums are being taken
        while not self._cancelled.is_set():
            try:
                batch = queue.popleft()
            except IndexError:
                break
            backlog.append(self._move(source, batch, pool))
            if len(backlog) > UNVERIFIED_BATCHES_MAX:
                wait(backlog.popleft())
        for futures in backlog:
            wait(futures)

    def _move(self, source: Source, batch: Batch, pool: ThreadPoolExecutor) -> list[Future[None]]:
        if self._failures[source.name] >= SOURCE_FAILURES_MAX:
            self._drop(batch.wants, source, f"{source.name}: given up after {SOURCE_FAILURES_MAX} failures")
            return []
        try:
            if source.writes:
                for want in batch.wants:
                    self._destination.begin(want)
            checksums = source.fetch(batch)
        except Exception as error:  # whatever it is, this source did not serve, and others may
            if not isinstance(error, HotspareError):
                _log.exception("%s failed in an unforeseen way", source.name)
            with self._lock:
                self._failures[source.name] += 1
                if isinstance(error, TransferFailed) and error.timed_out:
                    self._timed_out.update(want.row for want in batch.wants)
            self._drop(batch.wants, source, f"{source.name}: {_told(error)}")
            return []
        taken = [(want, checksums.get(want.row)) for want in batch.wants]
        for want, checksum in taken:
            if checksum is not None:  # the work is done: only the comparison is left
                self._verify(source, want, checksum)
        return [pool.submit(self._verify, source, want, None) for want, checksum in taken if checksum is None]

    def _verify(self, source: Source, want: Want, taken: bytes | None) -> None:
        try:
            checksum = taken if taken is not None else self._destination.checksum(want)
            if want.checksum is None or checksum == want.checksum:
                self._accept(source, want, checksum)
                return
            if not source.writes:
                self._destination.begin(want)
            reason = f"checksum {checksum.hex()} instead of {want.checksum.hex()}"
        except Exception as error:  # whatever it is, this block is not good, and the others go on
            reason = _told(error)
        self._drop((want,), source, f"{source.name}: {reason}")

    def _accept(self, source: Source, want: Want, checksum: bytes) -> None:
        if want.row in self._timed_out:
            with self._lock:
                self._late[want.row] = (want, source, checksum)
        else:
            self._publish(source, want, checksum)
        with self._lock:
            self._pending.pop(want.row, None)

    def _publish(self, source: Source, want: Want, checksum: bytes) -> None:
        self._destination.publish(want, checksum)
        self.progress.done(source.kind, want.nbytes)

    def _drop(self, wants: Iterable[Want], source: Source, reason: str) -> None:
        with self._lock:
            for want in wants:
                self._offers[want.row] = [o for o in self._offers[want.row] if o.source != source.name]
                if len(self._reasons[want.row]) < REASONS_MAX:
                    self._reasons[want.row].append(reason)

    def _settle_late(self) -> bool:
        """Blocks that a peer was given up on may still get bytes from it: look once more before they are published.

        Whether any was spoiled so: it is wanted again, from another source than the one whose bytes it was to keep.
        """
        late, self._late = self._late, {}
        has_spoiled = False
        for row, (want, source, checksum) in late.items():
            try:
                if self._destination.checksum(want) == checksum:
                    self._publish(source, want, checksum)
                    continue
                reason = "spoiled by late bytes of a peer that had timed out"
            except Exception as error:  # as in `_verify`
                reason = _told(error)
            self._pending[row] = want
            self._drop((want,), source, f"{source.name}: {reason}")
            has_spoiled = True
        return has_spoiled


def _told(error: Exception) -> str:
    """Our own errors say what is wrong; of others the class is half the message."""
    return str(error) if isinstance(error, HotspareError) else f"{type(error).__name__}: {error}"

"""Carry out a restore: bring wanted blocks from the nearest source that has them, verify, publish, report.

What is to be done is decided in `transfer.ledger`. Here are the threads that do it: each tells the ledger what came of
its work, under one short lock, and passes on what the ledger then orders. The thread that called `run` only waits.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, TypeVar

from shm.block import ExpertKey
from shm.errors import HotspareError
from transfer.destination import Destination
from transfer.errors import SomeLost, told
from transfer.ledger import LANES_MAX, Arrived, Ledger
from transfer.plan import Batch, Offer, Want
from transfer.progress import FailedBlock, Progress, Report, RestoreState
from transfer.sources import Source
from transfer.standing import Party

VERIFY_THREADS_MAX = 8
LATE_TIER = 1  # of sources that turned up late: as near as peers are, and nothing nearer has what they are asked for

T = TypeVar("T")

_log = logging.getLogger("hotspare.restore")


class Found(NamedTuple):
    """Who has, by now, blocks that could not be had: the sources, what they offer of which row, and its checksum."""

    sources: Sequence[Source]
    offers: Mapping[int, Sequence[Offer]]
    expected: Mapping[int, bytes]


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
        reasons: Mapping[int, str] | None = None,
        fence: Callable[[], None] | None = None,
        look_again: Callable[[Sequence[int]], Found] | None = None,
    ) -> None:
        """`tiers` are the sources, nearest first; `offers` says which of them have which row, and where.

        `settle` is called once all is published that could be had, before the report says that it is over. `reasons`
        is what the report says of a row that could not be had, before what its sources said. `fence` sees to it that no
        transfer that was given up on can write any more: blocks that one might write to are looked at once more after
        that, and only then published. Where it raises, they are not. Without a fence it is taken that what comes late
        has come. `look_again` is asked once, before rows are given up that nobody could serve: who has turned up since.
        """
        wants = list(wants)
        self._sources: dict[Hashable, Source] = {source: source for tier in tiers for source in tier}
        parties: dict[Hashable, Party] = {
            source: Party(source.name, number, source.lanes, source.limits)
            for number, tier in enumerate(tiers)
            for source in tier
        }
        self._totals = len(wants), sum(want.nbytes for want in wants)
        self._ledger = Ledger(wants, offers, parties, reasons)
        self._presumed: list[Batch] = []
        self._destination = destination
        self._key_of = key_of
        self._settle = settle
        self._fence = fence
        self._look_again = look_again
        self.progress = progress or Progress()
        self._changed = threading.Condition()
        self._wait_s: float | None = None
        self._broken: BaseException | None = None

    def cancel(self) -> None:
        """Start nothing more, and recall what is under way. What was published stays, what was not is not."""
        with self._changed:
            for batch in self._ledger.cancel():
                batch.watch.is_recalled = True
            self._changed.notify_all()

    def report(self) -> Report:
        return self.progress.report()

    @property
    def wrong(self) -> Mapping[Source, Sequence[int]]:
        """By source, the rows that it gave other bytes of than they should have. Complete once `run` has returned."""
        return {self._sources[source]: tuple(rows) for source, rows in self._ledger.wrong.items()}

    @property
    def outstanding(self) -> tuple[Batch, ...]:
        """Transfers that were given up on: nobody knows whether they have ended."""
        return (*self._ledger.outstanding, *self._presumed)

    def run(self) -> Report:
        """Bring every block that can be had. Never raises for what a source does; the report says what is missing."""
        self.progress.start(*self._totals)
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
        movers = max(1, min(LANES_MAX, sum(source.lanes for source in self._sources.values())))
        verifiers = min(VERIFY_THREADS_MAX, max(2, len(self._sources)))
        with (
            ThreadPoolExecutor(verifiers, thread_name_prefix="hotspare-verify") as self._verifiers,
            ThreadPoolExecutor(movers, thread_name_prefix="hotspare-move") as self._movers,
        ):
            try:
                self._wait()
            except BaseException:
                self.cancel()  # the pools wait for what is under way, and nothing more may begin
                raise
        self._settle()
        self._finish()

    def _finish(self) -> None:
        if self._ledger.is_cancelled and not self._ledger.is_complete:
            self.progress.finish(RestoreState.CANCELLED, "cancelled on request")
            return
        failed = [FailedBlock(self._key_of(row), reason) for row, reason in self._ledger.failures.items()]
        self.progress.fail(failed)
        if failed:
            self.progress.finish(
                RestoreState.FAILED, f"{len(failed)} blocks could not be had; first {failed[0].key}: {failed[0].reason}"
            )
        else:
            self.progress.finish(RestoreState.SUCCEEDED)

    # -- doing what the ledger orders ------------------------------------------------------------------------

    def _wait(self) -> None:
        """Until the ledger says that it is over."""
        self._tell(lambda: None)
        while True:
            with self._changed:
                if self._broken is not None:
                    raise self._broken
                is_quiet = not self._ledger.is_busy
                is_over = is_quiet and not self._ledger.outstanding
                if not is_quiet:
                    self._changed.wait(self._wait_s)
            if is_over and not self._find_others():
                return
            if is_quiet and not is_over:
                self._end_outstanding()
            else:
                self._tell(lambda: None)  # a doubted source may be asked again by now

    def _find_others(self) -> bool:
        """Look once more who has what could not be had; whether that was done now."""
        rows, look_again = tuple(self._ledger.failures), self._look_again
        self._look_again = None
        if look_again is None or not rows or self._ledger.is_cancelled:
            return False
        found = look_again(rows)
        self._sources |= {source: source for source in found.sources}
        parties: dict[Hashable, Party] = {
            each: Party(each.name, LATE_TIER, each.lanes, each.limits) for each in found.sources
        }
        self._tell(partial(self._ledger.offered, found.offers, found.expected, parties))
        return True

    def _end_outstanding(self) -> None:
        """Nothing of ours is under way any more but what was given up on: have that end, too."""
        if self._fence is not None:
            self._fence()
        self._tell(self._all_ended)

    def _all_ended(self) -> None:
        for batch in self._ledger.outstanding:
            if self._fence is None:
                self._presumed.append(batch)
            self._ledger.ended(batch)

    def _tell(self, what: Callable[[], None]) -> None:
        """Tell the ledger what happened, and have done what it orders."""
        with self._changed:
            what()
            orders = self._ledger.next(time.monotonic())
            for batch in orders.recall:
                batch.watch.is_recalled = True
            for batch in orders.move:
                self._movers.submit(self._guard, self._move, batch)
            for block in orders.verify:
                self._verifiers.submit(self._guard, self._verify, block)
            self._wait_s = orders.wait_s
            if self._wait_s is not None or not self._ledger.is_busy:
                self._changed.notify_all()
        if orders.publish:
            self._publish(orders.publish)

    def _guard(self, work: Callable[[T], None], subject: T) -> None:
        """Have `run` raise what a thread of ours did not foresee: else it would wait for ever."""
        try:
            work(subject)
        except BaseException as error:
            with self._changed:
                self._broken = error
                self._changed.notify_all()

    def _move(self, batch: Batch) -> None:
        source = self._sources[batch.source]
        try:
            checksums = source.fetch(batch, self._destination)
        except SomeLost as error:
            self._tell(partial(self._ledger.came_in_part, batch, error, time.monotonic()))
        except Exception as error:  # whatever it is, this source did not serve, and others may
            if not isinstance(error, HotspareError):
                _log.exception("%s failed in an unforeseen way", source.name)
            # No name may keep the error beyond this block: its frames hold the engine, which must be gone when dropped.
            self._tell(partial(self._ledger.failed, batch, error, time.monotonic()))
        else:
            self._tell(partial(self._ledger.moved, batch, checksums, time.monotonic()))

    def _verify(self, block: Arrived) -> None:
        try:
            checksum = self._destination.checksum(block.want)
        except Exception as error:  # whatever it is, this block is not good, and the others go on
            self._tell(partial(self._ledger.refused, block.want.row, told(error)))
        else:
            self._tell(partial(self._ledger.verified, block.want.row, checksum))

    def _publish(self, blocks: Sequence[Arrived]) -> None:
        """Publish what arrived together, and then tell the ledger, once: asking it what comes next costs more."""
        refused: dict[int, str] = {}
        for block in blocks:
            assert block.checksum is not None
            try:
                self._destination.publish(block.want, block.checksum)
            except Exception as error:  # as in `_verify`
                refused[block.want.row] = told(error)
            else:
                self.progress.done(self._sources[block.source].kind, block.want.nbytes)
        self._tell(partial(self._settled, [block.want.row for block in blocks], refused))

    def _settled(self, rows: Sequence[int], refused: Mapping[int, str]) -> None:
        for row in rows:
            if row in refused:
                self._ledger.refused(row, refused[row])
            else:
                self._ledger.published(row)

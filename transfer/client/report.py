"""What a restore into slots did, while it runs and when it has ended."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from shm.block import ExpertKey
from shm.errors import HotspareError
from transfer.progress import Report
from transfer.slots import SlotRef
from transfer.sources import SourceKind

PROGRESS_INTERVAL_S = 0.05  # between two calls of a progress callback
NOTES_MAX = 100

P = ParamSpec("P")
R = TypeVar("R")

_log = logging.getLogger("hotspare.restorer")


@dataclass(frozen=True, slots=True)
class FailedExpert:
    """An expert that could not be had. Its `slots` are not good: use none of them until a restore brings it."""

    key: ExpertKey
    slots: tuple[SlotRef, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class SlotReport:
    """Logical experts, and bytes of whole blocks, each counted once however many slots it fills."""

    experts_total: int
    experts_done: int
    bytes_total: int
    bytes_done: int
    bytes_by_source: Mapping[str, int]
    seconds: float
    failed: tuple[FailedExpert, ...]
    notes: tuple[str, ...]
    """Sources that could not be used at all, and why."""

    @property
    def ok(self) -> bool:
        """Whether every expert that was asked for is in its slots, verified."""
        return self.experts_done == self.experts_total


@dataclass(frozen=True, slots=True)
class ProofReport:
    """What was found in the slots when they were bound. Logical experts, and bytes of whole blocks, each once."""

    experts_total: int
    experts_proved: int
    experts_lost: int
    """Named by the caller, and not looked at."""
    experts_unknown: int
    """Looked for in vain: nobody who answered has a checksum of them, or, for parts of blocks, the block itself."""
    bytes_proved: int
    seconds: float
    unproved_layers: tuple[int, ...]
    """Of these nothing is restored until one of their experts is proved."""
    notes: tuple[str, ...] = ()
    """Whoever could not be asked, and why."""

    @classmethod
    def of_nothing(cls, keys: Collection[ExpertKey]) -> ProofReport:
        """Where no model is known yet."""
        return cls(len(keys), 0, 0, len(keys), 0, 0.0, tuple(sorted({key.layer for key in keys})))

    @property
    def ok(self) -> bool:
        """Whether every layer can be restored: proved, or vouched for by the caller."""
        return not self.unproved_layers


Progress = Callable[[SlotReport], None]


class Tally:
    """Adds up the passes of one restore. `tick` is for any thread."""

    def __init__(self, progress: Progress | None = None) -> None:
        self._totals = 0, 0
        self._progress = progress
        self._started = time.monotonic()
        self._ended: Counter[str] = Counter({kind.value: 0 for kind in SourceKind})
        self._done = 0
        self._running: Callable[[], Report] | None = None
        self._told = 0.0
        self._lock = threading.Lock()
        self.notes: list[str] = []

    def note(self, what: str) -> None:
        if what not in self.notes and len(self.notes) < NOTES_MAX:
            self.notes.append(what)

    def attempt(self, do: Callable[P, R], *args: P.args, **named: P.kwargs) -> R | None:
        """What `do` returns; None, and a note, where it raises a HotspareError."""
        try:
            return do(*args, **named)
        except HotspareError as error:
            self.note(str(error))
            return None

    def expect(self, experts: int, nbytes: int) -> None:
        """How much there is to do."""
        self._totals = experts, nbytes

    def start_pass(self, report: Callable[[], Report]) -> None:
        self._running = report

    def end_pass(self, report: Report | None) -> None:
        """Count what a pass brought; nothing of one that broke."""
        self._running = None
        if report is None:
            return
        self._ended.update(report.bytes_by_source)
        self._done += report.blocks_done

    def tick(self) -> None:
        """Tell the callback, unless it was told a moment ago."""
        if self._progress is None or not self._lock.acquire(blocking=False):
            return
        try:
            if time.monotonic() - self._told >= PROGRESS_INTERVAL_S:
                self._told = time.monotonic()
                self._tell(self.report())
        finally:
            self._lock.release()

    def report(self, failed: tuple[FailedExpert, ...] = ()) -> SlotReport:
        by_source, done = Counter(self._ended), self._done
        if (running := self._running) is not None:
            current = running()
            by_source.update(current.bytes_by_source)
            done += current.blocks_done
        return SlotReport(
            self._totals[0], done, self._totals[1], sum(by_source.values()), dict(by_source),
            time.monotonic() - self._started, failed, tuple(self.notes),
        )  # fmt: skip

    def finish(self, failed: tuple[FailedExpert, ...]) -> SlotReport:
        """The final report, which the callback gets in any case."""
        report = self.report(failed)
        with self._lock:
            self._tell(report)
        return report

    def _tell(self, report: SlotReport) -> None:
        if self._progress is None:
            return
        try:
            self._progress(report)
        except Exception:
            _log.exception("the progress callback failed; the restore goes on without it")
            self._progress = None

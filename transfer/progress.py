"""How far a restore is: one record, written by its threads and read by anyone."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from shm.block import ExpertKey
from transfer.sources import SourceKind


class RestoreState(StrEnum):
    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self not in (RestoreState.PENDING, RestoreState.RUNNING)


@dataclass(frozen=True, slots=True)
class FailedBlock:
    """A block that could not be had, and what each source said."""

    key: ExpertKey
    reason: str


@dataclass(frozen=True, slots=True)
class Report:
    """A snapshot of a restore. Bytes are those of whole blocks; times are seconds since the epoch."""

    state: RestoreState
    blocks_total: int
    blocks_done: int
    bytes_total: int
    bytes_done: int
    bytes_by_source: Mapping[str, int]
    failed: tuple[FailedBlock, ...]
    error: str | None
    created_at: float
    started_at: float | None
    finished_at: float | None

    @property
    def ok(self) -> bool:
        return self.state is RestoreState.SUCCEEDED


@dataclass(slots=True)
class Progress:
    """The mutable side of a Report. Thread-safe."""

    blocks_total: int = 0
    bytes_total: int = 0
    failed_total: int = 0
    """Blocks that could not be had, those included whose reasons were forgotten."""
    _state: RestoreState = RestoreState.PENDING
    _blocks_done: int = 0
    _by_source: dict[str, int] = field(default_factory=lambda: {kind.value: 0 for kind in SourceKind})
    _failed: list[FailedBlock] = field(default_factory=list)
    _error: str | None = None
    _created_at: float = field(default_factory=time.time)
    _started_at: float | None = None
    _finished_at: float | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self, blocks_total: int, bytes_total: int) -> None:
        """It runs from now on; one that was cancelled before stays so."""
        with self._lock:
            self.blocks_total, self.bytes_total = blocks_total, bytes_total
            if not self._state.is_final:
                self._state, self._started_at = RestoreState.RUNNING, time.time()

    def done(self, kind: SourceKind, nbytes: int) -> None:
        """One more block is in place, verified and published."""
        with self._lock:
            self._blocks_done += 1
            self._by_source[kind.value] += nbytes

    def fail(self, failed: list[FailedBlock]) -> None:
        with self._lock:
            self._failed.extend(failed)
            self.failed_total += len(failed)

    def forget_failed(self, kept: int) -> None:
        """Keep the first of the failed blocks only, and each reason once: one that is over is remembered for long."""
        reasons: dict[str, str] = {}
        with self._lock:
            first = self._failed[:kept]
            self._failed = [FailedBlock(f.key, reasons.setdefault(f.reason, f.reason)) for f in first]

    def finish(self, state: RestoreState, error: str | None = None) -> None:
        """End it, once: what comes after is ignored."""
        with self._lock:
            if not self._state.is_final:
                self._state, self._error, self._finished_at = state, error, time.time()

    @property
    def state(self) -> RestoreState:
        return self._state

    def report(self) -> Report:
        with self._lock:
            return Report(
                self._state, self.blocks_total, self._blocks_done, self.bytes_total, sum(self._by_source.values()),
                dict(self._by_source), tuple(self._failed), self._error,
                self._created_at, self._started_at, self._finished_at,
            )  # fmt: skip

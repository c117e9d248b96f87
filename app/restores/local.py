"""A restore that this node does itself, from the moment it is queued until long after it ended."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np

from app.documents import FailedExpert, RestoreDocument, RestoreTarget
from app.node.node import Node
from app.restores.pushes import ConsumerPush
from shm.block import ExpertKey
from shm.errors import HotspareError
from transfer.progress import Progress, RestoreState
from transfer.restore import Restore
from transfer.sources import SourceKind

FAILED_LISTED_MAX = 1000

_log = logging.getLogger("hotspare.restores")


class Wanted:
    """Experts that a request named, in as few bytes as they take: a request may name 131,072, and many may wait."""

    def __init__(self, experts: Iterable[ExpertKey]) -> None:
        self._pairs = np.array([(key.layer, key.expert) for key in experts], dtype=np.int32)

    def keys(self) -> tuple[ExpertKey, ...]:
        return tuple(ExpertKey(layer, expert) for layer, expert in self._pairs.tolist())


@dataclass(slots=True)
class LocalRestore:
    """A restore that this node does: into its own segment, or with `push`, into a consumer's memory."""

    id: str
    node_id: str
    wanted: Wanted | None
    kinds: Collection[SourceKind]
    push: ConsumerPush | None = None
    progress: Progress = field(default_factory=Progress)
    finished: threading.Event = field(default_factory=threading.Event)
    _has_begun: bool = False
    _running: Restore | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, node: Node) -> None:
        """Plan and run. What goes wrong is told in the record, never raised."""
        try:
            if not self.is_over:
                self._run(self.push or node)
        except HotspareError as error:
            self.progress.finish(RestoreState.FAILED, str(error))
        except Exception as error:
            _log.exception("restore %s ended in an unforeseen way", self.id)
            self.progress.finish(RestoreState.FAILED, f"{type(error).__name__}: {error}")
        finally:
            with self._lock:
                self._running = None  # it maps the memory it wrote to, and a restore is remembered for long
            self.wanted = None
            self.progress.forget_failed(FAILED_LISTED_MAX)
            self.finished.set()

    def widen(self, experts: Iterable[ExpertKey]) -> bool:
        """Have it bring these experts, too, if it has not begun; whether it does."""
        with self._lock:
            if self._has_begun or self.is_over:
                return False
            if self.wanted is not None:
                self.wanted = Wanted({*self.wanted.keys(), *experts})
            return True

    def _run(self, target: Node | ConsumerPush) -> None:
        with self._lock:
            self._has_begun = True
        experts = None if self.wanted is None else self.wanted.keys()
        restore = target.plan_restore(experts, self.kinds, self.progress)
        with self._lock:
            self._running = restore
            if self.is_over:  # cancelled while it was planned
                restore.cancel()
        target.run(restore)

    def cancel(self) -> None:
        with self._lock:
            if self._running is not None:
                self._running.cancel()
            else:
                self.progress.finish(RestoreState.CANCELLED, "cancelled before it began")

    @property
    def is_over(self) -> bool:
        return self.progress.state.is_final

    def document(self) -> RestoreDocument:
        report = self.progress.report()
        target = RestoreTarget(consumer_id=self.push.consumer.id) if self.push else RestoreTarget(node_id=self.node_id)
        return RestoreDocument(
            id=self.id,
            target=target,
            state=report.state,
            blocks_total=report.blocks_total,
            blocks_done=report.blocks_done,
            bytes_total=report.bytes_total,
            bytes_done=report.bytes_done,
            bytes_by_source={SourceKind(kind): nbytes for kind, nbytes in report.bytes_by_source.items()},
            failed=[
                FailedExpert(layer=f.key.layer, expert=f.key.expert, reason=f.reason)
                for f in report.failed[:FAILED_LISTED_MAX]
            ],
            failed_total=self.progress.failed_total,
            error=report.error,
            created_at=_time(report.created_at),
            started_at=None if report.started_at is None else _time(report.started_at),
            finished_at=None if report.finished_at is None else _time(report.finished_at),
        )


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)

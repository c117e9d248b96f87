"""Sees to it that a node has what belongs to it, for as long as it runs: made of ordinary restores.

`app.node.upkeep` decides; here is what it is told, and what is done about its answer. Nothing is changed here: restores
run in the restore worker's thread, one after the other.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection
from typing import Protocol

import numpy as np

from app.cluster.prober import Prober
from app.node.holding import Holding
from app.node.node import Node
from app.node.upkeep import Seen, Upkeep
from shm.block import ExpertKey
from shm.layout import BlockState
from transfer.loop import Loop
from transfer.progress import Progress
from transfer.sources import SourceKind

LOOK_INTERVAL_S = 0.5  # between looks at what is missing, and at whether peers have something new

_log = logging.getLogger("hotspare.fill")


class Bringing(Protocol):
    """A restore into this node, under way or waiting for its turn."""

    @property
    def finished(self) -> threading.Event: ...
    @property
    def progress(self) -> Progress: ...


Bring = Callable[[tuple[ExpertKey, ...] | None, Collection[SourceKind]], Bringing]
"""Starts a restore of these experts, or of all that belongs here, from these kinds of sources."""


class Caretaker:
    """Brings what is missing here, again and again; never done."""

    def __init__(self, node: Node, prober: Prober, bring: Bring) -> None:
        self.loop = Loop("hotspare-caretaker", self._turn)
        self._node = node
        self._prober = prober
        self._bring = bring
        self._upkeep = Upkeep(node.settings.fill)
        self._under_way: Bringing | None = None

    def start(self) -> None:
        self.loop.start()

    def stop(self) -> None:
        """Start nothing more. What was started is the restore store's, which cancels it."""
        self.loop.stop()

    def _turn(self) -> float:
        if self._under_way is None or self._ended(self._under_way):
            self._under_way = self._next()
        return LOOK_INTERVAL_S if self._under_way is None else 0.0

    def _ended(self, restore: Bringing) -> bool:
        if not restore.finished.wait(LOOK_INTERVAL_S):
            return False
        report = restore.progress.report()
        if report.error:
            _log.error("the node is not complete: %s", report.error)
        if report.ok:
            self._upkeep.brought()
        return True

    def _next(self) -> Bringing | None:
        if self._node.is_restoring:  # somebody else asked for it; what is hidden now may be on its way
            return None
        holding = self._node.holding
        if holding is None or len(holding.missing()):
            self._prober.look()  # what peers have now may be what is missing
        task = self._upkeep.next(self._seen(holding), time.monotonic())
        return None if task is None else self._bring(task.experts, task.kinds)

    def _seen(self, holding: Holding | None) -> Seen:
        cluster = self._node.cluster
        if holding is None:
            return Seen(False, cluster.has_version(), (), (), cluster.revision())
        keys, missing = holding.manifest.keys, holding.missing()
        hidden = holding.segment.rows(BlockState.QUARANTINED)
        once = [row for row in np.intersect1d(missing, hidden).tolist() if holding.is_recorded(row)]
        return Seen(
            has_manifest=True,
            can_begin=True,
            missing=tuple(keys[row] for row in missing.tolist()),
            damaged=tuple(keys[row] for row in once),
            sources=cluster.revision(),
            is_displaced=self._node.is_displaced,
            left_behind=tuple(keys[row] for row in holding.left_behind().tolist()),
        )

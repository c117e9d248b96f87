"""Filling a node when it starts: from peers, else from disk, as `--fill` says. Made of ordinary restores."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection
from typing import Protocol

from app.node.node import Node
from shm.block import ExpertKey
from shm.errors import HotspareError
from shm.layout import SegmentState
from transfer.checkpoint.origin import first_difference
from transfer.errors import CheckpointError
from transfer.progress import Progress, Report
from transfer.sources import SourceKind

LOOK_INTERVAL_S = 0.5  # between looks at whether peers have something new
RETRY_INTERVAL_S = 30.0  # after which what failed is tried again, although nothing new was seen

KINDS = {
    "auto": frozenset({SourceKind.PEER, SourceKind.DISK}),
    "disk": frozenset({SourceKind.DISK}),
    "peer": frozenset({SourceKind.PEER}),
}

_log = logging.getLogger("hotspare.fill")


class Bringing(Protocol):
    """A restore into this node, under way or waiting for its turn."""

    @property
    def finished(self) -> threading.Event: ...
    @property
    def progress(self) -> Progress: ...


Bring = Callable[[tuple[ExpertKey, ...] | None, Collection[SourceKind]], Bringing]
"""Starts a restore of these experts, or of all that belongs here, from these kinds of sources."""


class Filler:
    """Brings what belongs to the node. Ends when the node is complete.

    Tries again whenever its peers have more, and every RETRY_INTERVAL_S: what failed may have been a passing thing.
    """

    def __init__(self, node: Node, bring: Bring) -> None:
        self._node = node
        self._bring = bring
        self._kinds = KINDS.get(node.settings.fill, frozenset())
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hotspare-fill", daemon=True)

    def start(self) -> None:
        if self._node.settings.fill != "none":
            self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        tried, tried_at = "", -RETRY_INTERVAL_S
        while not self._stopped.is_set():
            try:
                if self._is_complete():
                    if not self._replace_foreign():
                        return
                    tried_at = -RETRY_INTERVAL_S
                if SourceKind.PEER in self._kinds:
                    self._node.cluster.refresh()
                known = self._node.cluster.revision()
                is_due = known != tried or time.monotonic() - tried_at >= RETRY_INTERVAL_S
                if is_due and self._can_begin():
                    tried, tried_at = known, time.monotonic()
                    self._fill()
                    continue
            except HotspareError as error:
                _log.error("filling the node failed: %s", error)
            self._stopped.wait(LOOK_INTERVAL_S)

    def _is_complete(self) -> bool:
        return self._node.manifest is not None and not len(self._node.missing())

    def _can_begin(self) -> bool:
        """Whether a restore has anything to go by: a manifest, ours or a peer's."""
        return self._node.manifest is not None or self._node.cluster.has_manifest()

    def _missing(self) -> tuple[ExpertKey, ...] | None:
        """What a restore has to bring; None, all that belongs here, while there is no manifest to say.

        What came with an earlier attempt was verified then, and is not read again.
        """
        manifest = self._node.manifest
        return None if manifest is None else tuple(manifest.keys[row] for row in self._node.missing())

    def _fill(self) -> None:
        report = self._finish(self._bring(self._missing(), self._kinds))
        if report.error:
            _log.error("the node is not complete: %s", report.error)

    def _finish(self, restore: Bringing) -> Report:
        while not restore.finished.wait(LOOK_INTERVAL_S) and not self._stopped.is_set():
            continue
        return restore.progress.report()

    def _replace_foreign(self) -> bool:
        """Fill from disk what was left unsealed, being other weights than --checkpoint has; whether there was such.

        Peers hold them when a model was exchanged under its name: the checkpoint wins.
        """
        node = self._node
        if node.checkpoint is None or node.settings.fill != "auto" or node.segment.state is SegmentState.SEALED:
            return False
        try:
            key = first_difference(node.checkpoint, node.segment)
        except CheckpointError as error:
            _log.warning("what came from peers was not compared with the checkpoint: %s", error)
            return False
        if key is None:
            return False
        _log.error("peers hold other weights than %s (first %s): filling from disk", node.checkpoint.directory, key)
        node.renew()
        node.use_manifest(node.checkpoint.manifest)
        self._kinds = KINDS["disk"]  # until it is complete: never the weights of both
        return True

"""One thread that does restores one after the other, and the bounded queue before it.

The worker of the node's own segment is the only thread that changes what the node holds: that is why nothing there
needs a lock (`app.node.node`). Consumers have a worker of their own, so that an engine waits for no node that fills.
"""

from __future__ import annotations

import threading
from collections import deque

from app.errors import LimitReached
from app.node.node import Node
from app.restores.local import LocalRestore
from transfer.loop import Loop

QUEUED_MAX = 64
RETRY_AFTER_S = 5


class Worker:
    """Does what is put before it, in order. Thread-safe."""

    def __init__(self, name: str, node: Node) -> None:
        self.loop = Loop(name, self._turn)
        self._node = node
        self._waiting: deque[LocalRestore] = deque()
        self._lock = threading.Lock()

    def put(self, restore: LocalRestore) -> None:
        """Queue it. Raises LimitReached."""
        with self._lock:
            if len(self._waiting) >= QUEUED_MAX:
                raise LimitReached(
                    f"{QUEUED_MAX} restores are waiting already: try again later", retry_after_s=RETRY_AFTER_S
                )
            self._waiting.append(restore)
        self.loop.wake()

    def _turn(self) -> float | None:
        with self._lock:
            restore = self._waiting.popleft() if self._waiting else None
        if restore is None:
            return None
        restore.run(self._node)
        return 0.0

    def stop(self) -> None:
        """Wait for the one under way, which somebody has cancelled, and run those that wait to their cancelled end."""
        self.loop.stop()
        while self._waiting:
            self._waiting.popleft().run(self._node)

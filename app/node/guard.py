"""Sees to it, every second, that what leads to the blocks is as this node wrote it, whatever was done to the object.

Header, manifest and block table rot like blocks do; and the object is a file, which others may overwrite or cut short.
All of that is known here, and written anew. What of the blocks was cut off is hidden, and comes back by a restore.

It waits for no restore, and none for it: a page behind the end of an object that was cut short is SIGBUS for whoever
touches it, so its length comes back first.
"""

from __future__ import annotations

from app.node.node import Node
from transfer.loop import Loop

LOOK_INTERVAL_S = 1.0  # takes a millisecond or two of a large model's: a few megabytes are compared


class Guard:
    """One node's. Counts what it did since it began."""

    def __init__(self, node: Node) -> None:
        self.loop = Loop("hotspare-guard", self._turn)
        self.mended = 0
        """Parts of what leads to the blocks found damaged, and written anew."""
        self._node = node

    def _turn(self) -> float:
        if (holding := self._node.holding) is not None:
            damage = self._node.mend(holding)
            self.mended += len(damage.parts) + len(damage.rows)
        return LOOK_INTERVAL_S

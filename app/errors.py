"""What a node can refuse or fail at, in words of the domain; branches of `shm.errors.HotspareError`.

Nothing here knows of HTTP: `app.api.problems` says which status and which headers each becomes, and whoever uses the
rooms below it without a server (a test, the command line) meets the same errors.

HotspareError
└── NodeError
    ├── NotFound               no such node, restore or consumer
    ├── Conflict               the thing asked of is in a state that forbids it
    ├── LimitReached           too much of it is there or runs already; `retry_after_s` says when to ask again
    ├── Unavailable            not now: the node is filling, or is stopping; perhaps `retry_after_s`
    └── PeerFailed             another node, asked on the caller's behalf, did not do its part
"""

from __future__ import annotations

from shm.errors import HotspareError


class NodeError(HotspareError):
    """A node does not do what was asked. `retry_after_s` is None where waiting changes nothing."""

    def __init__(self, detail: str, *, retry_after_s: int | None = None) -> None:
        super().__init__(detail)
        self.retry_after_s = retry_after_s


class NotFound(NodeError):
    """No such node, restore or consumer."""


class Conflict(NodeError):
    """The thing asked of is in a state that forbids it."""


class LimitReached(NodeError):
    """A limit on what there is, or what runs at once, is reached."""


class Unavailable(NodeError):
    """Not now: the node is still filling, or is stopping."""


class PeerFailed(NodeError):
    """Another node, asked on the caller's behalf, did not answer or answered with an error."""

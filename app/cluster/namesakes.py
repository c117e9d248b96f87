"""Two hosts under one node id, told from who asks: each node says its id and what start of it it is when it asks.

Nobody would notice otherwise. A peer's address leads to one of the two; the other asks like any peer, fills the same
share, and is never asked for it. A start that is heard again after another one of the same id was heard is a second
process, not a restart: what was stopped asks no more. A start under our own id is one at once: we do not ask ourselves.
Pure: whoever hears something says when. Not thread-safe.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import quote, unquote

ASKER_HEADER = "Hotspare-Asker"
START = "[0-9a-f]{16}"
STARTS_MAX = 8  # remembered of one id; the longest unheard is forgotten
TOLD_FOR_S = 60.0  # after it was last noticed


class Asker(NamedTuple):
    """Who asks: a node, and which start of it. As a header between nodes: its id, percent-encoded, and the start."""

    node_id: str
    start: str

    def __str__(self) -> str:
        return f"{quote(self.node_id, safe='')} {self.start}"

    @classmethod
    def read(cls, text: str) -> Asker | None:
        """None for what is none."""
        node_id, _, start = text.partition(" ")
        return cls(unquote(node_id), start) if re.fullmatch(START, start) else None


@dataclass
class _Heard:
    hosts: dict[str, str] = field(default_factory=dict)
    """Start → the host it asked from; the last heard stands last."""
    noticed_at: float | None = None


class Namesakes:
    """What one node has heard of the others' starts."""

    def __init__(self, own_id: str, peer_ids: Collection[str]) -> None:
        """Only these ids are listened to: nobody can have it remember others."""
        self.own_id = own_id
        self.own_start = secrets.token_hex(8)
        self._heard = {node_id: _Heard() for node_id in (own_id, *peer_ids)}

    def hear(self, node_id: str, start: str, host: str, now: float) -> str | None:
        """That this start of a node asked from that host; the warning if that is news."""
        heard = self._heard.get(node_id)
        if heard is None or (node_id, start) == (self.own_id, self.own_start):
            return None
        last = next(reversed(heard.hosts), start)
        is_second = node_id == self.own_id or (last != start and start in heard.hosts)
        heard.hosts.pop(start, None)
        heard.hosts[start] = host
        if len(heard.hosts) > STARTS_MAX:
            heard.hosts.pop(next(iter(heard.hosts)))
        if not is_second:
            return None
        was_told = self.warning(node_id, now) is not None
        heard.noticed_at = now
        return None if was_told else self.warning(node_id, now)

    def warning(self, node_id: str, now: float) -> str | None:
        """What is to be told of this id, if two hosts go by it."""
        heard = self._heard.get(node_id)
        if heard is None or heard.noticed_at is None or now - heard.noticed_at > TOLD_FOR_S:
            return None
        seen = ", ".join(sorted(set(heard.hosts.values())))
        who = "another process" if node_id == self.own_id else "two processes"
        return (
            f"{who} (asking from {seen}) run as node {node_id}: what one of them has, nobody finds; give each its own "
            "--node-id, and name it with --peer on the others"
        )

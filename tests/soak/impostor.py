"""A peer that is none: it answers on a node's port as its mood says, lying for as long as it is listened to, or saying
what a real node says, bent: other addresses, sessions, checksums, another content, a value that cannot be.

What it says is drawn from its mood alone, so it says the same until it has another mood.
"""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import httpx

from tests.liars import LIES, ODD, answering, changed, places
from tests.processes import Daemon

ASKED_WITHIN_S = 5.0
LISTENING_MAX = 8  # connections that a session takes which never speaks
TRUE = "true"

Bend = Callable[["Impostor", random.Random, str, Any], Any]


class Impostor:
    """One, in the place of `node`. It answers from its beginning on, truly at first, until it is closed."""

    def __init__(self, node: str, port: int, real: Callable[[], Daemon]) -> None:
        """`real` gives the node that it says to be."""
        self.node = node
        self._real = real
        self._mood, self._seed = TRUE, 0.0
        self._stack = ExitStack()
        self.mute = self._stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=LISTENING_MAX))
        self._stack.enter_context(answering(self._answer, port))

    def feel(self, mood: str, seed: float = 0.0) -> None:
        """Answer so from now on; who hears a lie already goes on hearing it."""
        self._mood, self._seed = mood, seed

    def close(self) -> None:
        self._stack.close()

    def _answer(self, connection: socket.socket, head: bytes) -> None:
        mood, seed = self._mood, self._seed
        if mood in _LIES:
            _LIES[mood](connection)
            return
        method, path, _ = head.decode("latin-1").split(" ", 2)
        if method != "GET":
            connection.sendall(b"HTTP/1.1 503 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            return
        try:
            said = self._real().ask("GET", path, timeout=ASKED_WITHIN_S)
        except httpx.HTTPError:
            return
        body = said.content.replace(json.dumps(self._real().node_id).encode(), json.dumps(self.node).encode())
        chance = random.Random(f"{seed} {path}")
        if mood in _BENDS and said.status_code == httpx.codes.OK:
            body = json.dumps(_BENDS[mood](self, chance, path, json.loads(body))).encode()
        told = f"HTTP/1.1 {said.status_code} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        if mood == "cut short":
            body = body[: chance.randrange(len(body) + 1)]
        connection.sendall(f"{told}Connection: close\r\n\r\n".encode() + body)


# -- bending -------------------------------------------------------------------------------------------------------


def _sessions(self: Impostor, chance: random.Random, path: str, document: Any) -> Any:
    """Another session: one that is mute, or none at all."""
    mute = f"127.0.0.1:{self.mute.getsockname()[1]}"
    # The same one in all documents of a mood: else it would only look as if the node had been started again.
    session = random.Random(str(self._seed)).choice((mute, mute, "127.0.0.1:1", "nowhere.invalid:15333", "odd", ""))
    return _exchange(document, "session_id", lambda _: session)


def _addresses(self: Impostor, chance: random.Random, path: str, document: Any) -> Any:
    """Other addresses for some blocks, or for all."""
    share, step = chance.choice((0.1, 1.0)), chance.choice((64, 4096, 1 << 20, 1 << 40, -4096))

    def other(address: int) -> int:
        return max(0, address + step) if chance.random() < share else address

    return _exchange(document, "address", other)


def _checksums(self: Impostor, chance: random.Random, path: str, document: Any) -> Any:
    """Other checksums for some blocks, or for all."""
    share = chance.choice((0.1, 1.0))
    return _exchange(document, "checksum", lambda c: chance.randbytes(16).hex() if chance.random() < share else c)


def _content(self: Impostor, chance: random.Random, path: str, document: Any) -> Any:
    """Another content, or another manifest."""
    name = random.Random(str(self._seed)).choice(("content_digest", "manifest_digest"))
    return _exchange(document, name, lambda digest: digest and chance.randbytes(len(digest) // 2).hex())


def _odd(self: Impostor, chance: random.Random, path: str, document: Any) -> Any:
    """One value that cannot be."""
    return changed(document, chance.choice(list(places(document))), chance.choice(ODD))


def _exchange(document: Any, name: str, other: Callable[[Any], Any]) -> Any:
    """The document with other values wherever something is called so."""
    for found in _called(document, name):
        found[name] = other(found[name])
    return document


def _called(document: Any, name: str) -> Iterator[dict[str, Any]]:
    inner = document.values() if isinstance(document, dict) else document if isinstance(document, list) else ()
    if isinstance(document, dict) and name in document:
        yield document
    for each in inner:
        yield from _called(each, name)


_LIES: Mapping[str, Any] = {lie.__name__: lie for lie in LIES}
_BENDS: Mapping[str, Bend] = {
    "other sessions": _sessions, "other addresses": _addresses, "other checksums": _checksums,
    "other content": _content, "odd": _odd,
}  # fmt: skip
MOODS = (*_LIES, *_BENDS, "cut short", TRUE)

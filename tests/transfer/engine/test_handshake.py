"""Where an engine's data connections lead, as a real one tells, and as others do not."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import pytest

from transfer.engine import Copy, MooncakeEngine
from transfer.engine.connections import connections
from transfer.engine.handshake import complaint, data_address

WITHIN_S = 3.3


def test_a_real_engine_tells_where_its_bytes_go() -> None:
    memory = np.arange(333, dtype=np.uint8)
    peer, ours = MooncakeEngine("127.0.0.1"), MooncakeEngine("127.0.0.1")
    peer.register([(memory.ctypes.data, memory.nbytes)])
    place = np.zeros(333, np.uint8)
    ours.read(peer.session_id, [Copy(place.ctypes.data, memory.ctypes.data, 333)])
    where = data_address(peer.session_id, WITHIN_S)
    assert where is not None
    assert where in {(each.host, each.port) for each in connections()}


ODD = [
    b"",
    b"HTTP/1.1 400 Bad Request\r\n\r\n",
    b"\x04\0\0\0\0\0\0\0\x01[]\n",
    b"\xff" * 9,
    b"\x03\0\0\0\0\0\0\0\x01{}",
]


SLOW = ["a byte at a time", "never"]


@pytest.fixture(params=[*ODD, *SLOW], ids=map(repr, [*ODD, *SLOW]))
def odd(request: pytest.FixtureRequest) -> Iterator[str]:
    """A listener that says something else, or says it too slowly."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            with suppress(OSError), listener.accept()[0] as line:
                line.recv(333)
                if isinstance(request.param, bytes):
                    line.sendall(request.param)
                    return
                while True:
                    line.sendall(b"\x01" if request.param == SLOW[0] else b"")
                    time.sleep(0.1)
                    if request.param == SLOW[1] and not line.recv(333):
                        return

        thread = threading.Thread(target=answer)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


def test_whoever_answers_otherwise_says_nothing_and_who_is_silent_or_too_slow_is_told_apart(
    odd: str, request: pytest.FixtureRequest
) -> None:
    if any(slow in request.node.name for slow in SLOW):
        with pytest.raises(TimeoutError):
            data_address(odd, 0.33)
    else:
        assert data_address(odd, 3.3) is None


@pytest.mark.parametrize("session", ["", "nonsense", "127.0.0.1:1", "127.0.0.1:99999", "[::1]:x"])
def test_nobody_says_nothing(session: str) -> None:
    assert data_address(session, 0.33) is None


def test_an_engine_that_can_be_read_from_gives_no_cause_for_complaint() -> None:
    assert complaint(MooncakeEngine("127.0.0.1").session_id, WITHIN_S) is None


def test_what_cannot_be_connected_to_or_says_nothing_is_complained_of() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        assert complaint(f"127.0.0.1:{port}", 0.33) == f"port {port} of 127.0.0.1 accepts, and says nothing"
    assert "cannot be connected to (Connection refused)" in (complaint(f"127.0.0.1:{port}", WITHIN_S) or "")


def test_names_are_not_looked_up() -> None:
    assert complaint("nowhere.example:15333", WITHIN_S) is None

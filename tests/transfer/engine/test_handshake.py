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
from transfer.engine.handshake import data_address

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


@pytest.fixture(params=[*ODD, None], ids=[*map(repr, ODD), "a byte at a time"])
def odd(request: pytest.FixtureRequest) -> Iterator[str]:
    """A listener that says something else, or says it too slowly."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            with suppress(OSError), listener.accept()[0] as line:
                line.recv(333)
                if request.param is not None:
                    line.sendall(request.param)
                    return
                while True:
                    line.sendall(b"\x09")
                    time.sleep(0.033)

        thread = threading.Thread(target=answer)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


def test_whoever_answers_otherwise_says_nothing(odd: str) -> None:
    assert data_address(odd, 0.33) is None


@pytest.mark.parametrize("session", ["", "nonsense", "127.0.0.1:1", "127.0.0.1:99999", "[::1]:x"])
def test_nobody_says_nothing(session: str) -> None:
    assert data_address(session, 0.33) is None

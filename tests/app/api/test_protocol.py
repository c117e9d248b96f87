"""Connections that drag something out end, and those that ask are heard however many others there are."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any
from urllib.parse import urlsplit

import pytest

from app.api import protocol
from tests.processes import DEADLINE_S

SHORT_S = 0.4
GET = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = (
    b"POST /v1/restores HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 3333\r\n\r\n"
)


@pytest.fixture(scope="module")
def node(shared_live_node: Callable[..., Any]) -> Any:
    return shared_live_node()


@pytest.fixture
def connect(node: Any) -> Iterator[Callable[[], socket.socket]]:
    where = urlsplit(node.url)
    with ExitStack() as opened:
        yield lambda: opened.enter_context(socket.create_connection((where.hostname, where.port), timeout=DEADLINE_S))


def hangs_up(connection: socket.socket, drip: bytes = b"") -> bytes:
    """What came before the other side hung up, while it is sent `drip` now and then; fails if it does not."""
    connection.settimeout(0.05)
    said, end = b"", time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        try:
            if drip:
                connection.sendall(drip)
            if not (more := connection.recv(65536)):
                return said
            said += more
        except TimeoutError:
            continue
        except OSError:
            return said
    raise AssertionError("it is still there")


def test_one_that_says_nothing_is_hung_up_on(
    connect: Callable[[], socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", SHORT_S)
    assert hangs_up(connect()) == b""


def test_a_head_that_comes_a_drop_at_a_time_is_given_up(
    connect: Callable[[], socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", SHORT_S)
    connection = connect()
    connection.sendall(GET[:-2])
    assert hangs_up(connection, b"X: y\r\n") == b""


def test_a_second_head_has_its_time_too(connect: Callable[[], socket.socket], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", SHORT_S)
    connection = connect()
    connection.sendall(GET)
    assert b" 200 " in connection.recv(65536).split(b"\r\n")[0]
    assert hangs_up(connection, b"X") in (b"", b'{"status":"ok"}')


def test_a_body_that_comes_a_drop_at_a_time_is_given_up(
    connect: Callable[[], socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "BODY_TIMEOUT_S", SHORT_S)
    connection = connect()
    connection.sendall(POST)
    assert hangs_up(connection, b" ") == b""


def test_an_answer_that_is_not_taken_is_given_up(
    node: Any, connect: Callable[[], socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "TAKE_TIMEOUT_S", SHORT_S)
    connection = connect()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    get = b"GET /docs/assets/swagger-ui-bundle.js HTTP/1.1\r\nHost: localhost\r\n\r\n"  # 1.5 MB
    with suppress(OSError):  # once it hangs up
        end = time.monotonic() + DEADLINE_S
        while time.monotonic() < end:
            connection.sendall(get)
            time.sleep(0.01)
        raise AssertionError("it is still there")


def test_a_head_over_its_limit_is_refused(connect: Callable[[], socket.socket]) -> None:
    connection = connect()
    connection.sendall(GET[:-2] + b"X: " + b"y" * 2 * protocol.HEAD_NBYTES_MAX)
    assert b" 400 " in hangs_up(connection).split(b"\r\n")[0]


def test_a_request_that_takes_long_is_not_cut_off(
    node: Any, connect: Callable[[], socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what the other side drags out is: our own work has limits of its own."""
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", SHORT_S)
    monkeypatch.setattr(protocol, "BODY_TIMEOUT_S", SHORT_S)

    def slow() -> list[Any]:
        time.sleep(3 * SHORT_S)
        return []

    monkeypatch.setattr(node.context.restores, "documents", slow)
    assert node.ask("GET", "/v1/restores").json() == {"restores": []}


def test_whoever_asks_is_heard_beside_more_connections_than_there_may_be(
    node: Any, connect: Callable[[], socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "connections_max", lambda: 33)
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", 10 * DEADLINE_S)  # not what ends them here
    idle = [connect() for _ in range(100)]
    slow = [connect() for _ in range(100)]
    for each in slow:
        each.sendall(GET[:9])
    asking = connect()
    asking.sendall(GET)
    assert b" 200 " in asking.recv(65536).split(b"\r\n")[0]
    assert hangs_up(idle[0]) == hangs_up(slow[0]) == b"", "those that waited longest made room"


def test_half_of_the_descriptors_are_left_for_other_things(monkeypatch: pytest.MonkeyPatch) -> None:
    for soft, most in ((1024, 512), (65_536, protocol.CONNECTIONS_MAX), (33, protocol.CONNECTIONS_MIN)):
        monkeypatch.setattr("resource.getrlimit", lambda _, soft=soft: (soft, soft))
        assert protocol.connections_max() == most

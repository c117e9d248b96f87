"""Connections whose every wait ends: also that for a name server, and the handshake of an encrypted one."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpcore
import pytest

from tests.liars import lying, silent
from tests.processes import DEADLINE_S
from transfer.client.http import NodeHttp, NodeUnreachable
from transfer.client.wire import Wire

PATIENCE_S = 0.5
SLACK_S = 15.0


@pytest.fixture
def deaf_name_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Looking a name up takes until the end of the test; the names that were. A double: the resolver's files are the
    host's own, and what is asked of it here is only that it takes its time."""
    asked: list[str] = []
    ended, real = threading.Event(), socket.getaddrinfo

    def wait(host: Any, *arguments: Any, **options: Any) -> Any:
        if options.get("flags", 0) & socket.AI_NUMERICHOST:
            return real(host, *arguments, **options)
        asked.append(host)
        ended.wait(DEADLINE_S)
        raise socket.gaierror(socket.EAI_AGAIN, "no name server answers")

    monkeypatch.setattr("socket.getaddrinfo", wait)
    yield asked
    ended.set()


def test_a_name_server_that_does_not_answer_holds_nobody_beyond_the_deadline(deaf_name_server: list[str]) -> None:
    http = NodeHttp()
    started = time.monotonic()
    for _ in range(3):
        with pytest.raises(NodeUnreachable, match="ConnectTimeout"):
            http.request("GET", "http://node-b.example:8470/", timeout=PATIENCE_S)
    assert time.monotonic() - started < 3 * PATIENCE_S + SLACK_S
    assert deaf_name_server == ["node-b.example"]  # one thread a name, however often it is asked for
    http.close()


def test_closing_ends_the_wait_for_a_name(deaf_name_server: list[str]) -> None:
    http = NodeHttp()
    said: list[str] = []

    def ask() -> None:
        try:
            http.request("GET", "http://node-b.example:8470/", timeout=10 * DEADLINE_S)
        except NodeUnreachable as error:
            said.append(str(error))

    asking = threading.Thread(target=ask)
    asking.start()
    while not deaf_name_server:
        time.sleep(0.01)
    http.close()
    asking.join(DEADLINE_S)
    assert "was closed" in said[0]


def test_a_handshake_that_never_ends_ends() -> None:
    with lying(silent) as url:
        http, started = NodeHttp(), time.monotonic()
        with pytest.raises(NodeUnreachable):
            http.request("GET", url.replace("http:", "https:"), timeout=PATIENCE_S)
        assert time.monotonic() - started < PATIENCE_S + SLACK_S
        http.close()


def test_one_that_takes_nothing_in_ends_what_is_sent_to_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        wire = Wire(())
        with wire.until(time.monotonic() + PATIENCE_S):
            stream = wire.connect_tcp("127.0.0.1", listener.getsockname()[1])
            with pytest.raises(httpcore.WriteTimeout):
                stream.write(b"x" * (64 << 20))
        stream.close()
        wire.close()


def test_the_next_address_of_a_name_is_tried_where_one_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in ("127.9.9.9", "127.0.0.1")]
        monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: found)
        wire = Wire(())
        with wire.until(time.monotonic() + DEADLINE_S):
            stream = wire.connect_tcp("both.example", port)
        assert stream.get_extra_info("socket").getpeername()[0] == "127.0.0.1"
        assert not stream.get_extra_info("is_readable")
        stream.close()
        assert stream.get_extra_info("is_readable")  # for the pool: it is of no use any more

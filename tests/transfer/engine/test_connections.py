"""Connections of this process, found by whom they lead to, and ended."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from transfer.engine.connections import Connection, connections, hang_up


@pytest.fixture(params=[socket.AF_INET, socket.AF_INET6], ids=["v4", "v6"])
def listening(request: pytest.FixtureRequest) -> Iterator[socket.socket]:
    """A listener that speaks to nobody."""
    host = "127.0.0.1" if request.param == socket.AF_INET else "::1"
    with socket.socket(request.param) as listener:
        try:
            listener.bind((host, 0))
        except OSError as error:
            pytest.skip(f"no {host} here: {error}")
        listener.listen()
        yield listener


def towards(listener: socket.socket) -> list[Connection]:
    host, port = listener.getsockname()[:2]
    return [each for each in connections() if (each.host, each.port) == (host, port)]


def test_a_connection_is_found_by_whom_it_leads_to_and_is_gone_with_its_descriptor(listening: socket.socket) -> None:
    assert towards(listening) == []
    with socket.create_connection(listening.getsockname()[:2]) as ours:
        (found,) = towards(listening)
        assert (found.descriptor, found.local_port) == (ours.fileno(), ours.getsockname()[1])
    assert towards(listening) == []


def test_an_address_of_ipv4_on_a_socket_of_ipv6_has_the_spelling_of_ipv4() -> None:
    with socket.socket() as listener, socket.socket(socket.AF_INET6) as ours:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        ours.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        ours.connect(("::ffff:127.0.0.1", listener.getsockname()[1]))
        assert len(towards(listener)) == 1


def test_who_waits_for_an_answer_is_woken_and_keeps_its_descriptor(listening: socket.socket) -> None:
    with socket.create_connection(listening.getsockname()[:2]) as ours:
        answers: list[bytes] = []
        waiting = threading.Thread(target=lambda: answers.append(ours.recv(333)))
        waiting.start()
        for each in towards(listening):
            hang_up(each)
        waiting.join(30)
        assert answers == [b""]
        assert ours.fileno() >= 0
        other, _ = listening.accept()
        with other:
            assert other.recv(333) == b"", "the other side is told"


def test_a_number_that_is_another_sockets_by_now_is_left_alone(listening: socket.socket) -> None:
    with socket.create_connection(listening.getsockname()[:2]) as ours:
        (found,) = towards(listening)
        hang_up(found._replace(inode=found.inode + 1))
        hang_up(found._replace(descriptor=1 << 20))
        other, _ = listening.accept()
        with other:
            other.sendall(b"still there")
            assert ours.recv(333) == b"still there"

"""What a connection that is closed still delivers, and what it does not."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import nullcontext

import pytest

from transfer.engine.unsent import discarding

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A connection whose other end does not read: (ours, theirs)."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)  # the least there is: the rest waits on our side
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
    with ours, theirs:
        yield ours, theirs


def send_until_full(ours: socket.socket) -> int:
    """Bytes that the kernel took."""
    ours.setblocking(False)
    taken = 0
    try:
        while True:
            taken += ours.send(bytes(3333))
    except BlockingIOError:
        return taken


def received(theirs: socket.socket) -> int:
    """Bytes that arrive until the connection has ended."""
    theirs.settimeout(60)
    count = 0
    try:
        while part := theirs.recv(1 << 20):
            count += len(part)
    except ConnectionResetError:
        pass
    return count


@pytest.mark.parametrize("is_discarding", [False, True])
def test_what_waits_in_a_connection_that_ends_is_not_sent(pair: Pair, is_discarding: bool) -> None:
    ours, theirs = pair
    taken = send_until_full(ours)
    with discarding() if is_discarding else nullcontext():
        ours.close()
    assert (received(theirs) < taken) is is_discarding


def test_a_connection_that_goes_on_delivers_all_and_ends_as_usual(pair: Pair) -> None:
    ours, theirs = pair
    taken = send_until_full(ours)
    with discarding():
        pass
    ours.close()
    assert received(theirs) == taken


def test_a_connection_that_goes_on_ends_as_usual_although_dropping_failed(pair: Pair) -> None:
    ours, theirs = pair
    taken = send_until_full(ours)
    with pytest.raises(ZeroDivisionError), discarding():
        raise ZeroDivisionError
    ours.close()
    assert received(theirs) == taken


def test_a_connection_that_others_made_delivers_all_though_it_ends() -> None:
    """A peer that reads from us has asked for it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        ours, _ = server.accept()
        with ours, theirs:
            taken = send_until_full(ours)
            with discarding():
                ours.close()
            assert received(theirs) == taken


def test_no_descriptor_is_left(pair: Pair) -> None:
    before = os.listdir("/proc/self/fd")
    with discarding():
        assert os.listdir("/proc/self/fd") == before
    assert os.listdir("/proc/self/fd") == before

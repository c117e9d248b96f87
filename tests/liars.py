"""Servers that speak HTTP as nobody should: a plain socket, and one function for every connection, in a thread.

The functions below are lies that go on until whoever is lied to hangs up; those at the end bend what a node says.
"""

from __future__ import annotations

import copy
import functools
import gzip
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

DRIP_S = 0.05
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"

Lie = Callable[[socket.socket], None]
Answer = Callable[[socket.socket, bytes], None]


@contextmanager
def lying(lie: Lie) -> Iterator[str]:
    """A server's URL; each connection is given to `lie` once the head of a request has come."""
    with answering(lambda connection, head: lie(connection)) as url:
        yield url


@contextmanager
def answering(answer: Answer, port: int = 0) -> Iterator[str]:
    """The same, where `answer` is given the head, too."""
    listener = socket.create_server(("127.0.0.1", port))
    open_now: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def serve(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            answer(connection, _read_head(connection))

    def accept() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                open_now.append(connection)
                threads.append(threading.Thread(target=serve, args=(connection,)))
                threads[-1].start()

    accepting = threading.Thread(target=accept)
    accepting.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        accepting.join()
        for connection in open_now:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()


def _read_head(connection: socket.socket) -> bytes:
    head = b""
    while b"\r\n\r\n" not in head:
        if not (more := connection.recv(65536)):
            raise OSError("hung up")
        head += more
    return head


def _drip(connection: socket.socket, drops: Iterator[bytes]) -> None:
    for drop in drops:
        connection.sendall(drop)
        time.sleep(DRIP_S)


def says(*parts: bytes) -> Lie:
    """These bytes, and the end of the connection."""
    return lambda connection: connection.sendall(b"".join(parts))


def silent(connection: socket.socket) -> None:
    """Takes the request, and never answers."""
    while connection.recv(65536):
        pass


def header_drips(connection: socket.socket) -> None:
    """An answer whose head comes a byte at a time, without end."""
    _drip(connection, itertools.chain((OK[i : i + 1] for i in range(len(OK))), itertools.repeat(b"X-A: b\r\n")))


def head_without_end(connection: socket.socket) -> None:
    """As many header lines as one can send."""
    connection.sendall(OK)
    while True:
        connection.sendall(b"X-A: %s\r\n" % (b"b" * 333) * 333)


def continues(connection: socket.socket) -> None:
    """`100 Continue`, now and then, and never an answer."""
    _drip(connection, itertools.repeat(b"HTTP/1.1 100 Continue\r\n\r\n"))


def continues_fast(connection: socket.socket) -> None:
    """`100 Continue`, as often as one can."""
    while True:
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" * 3333)


def empty_gzip(connection: socket.socket) -> None:
    """A compressed body of blocks with nothing in them."""
    connection.sendall(OK + b"Content-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n")
    connection.sendall(b"a\r\n" + gzip.compress(b"")[:10] + b"\r\n")
    _drip(connection, itertools.repeat(b"5\r\n\x00\x00\x00\xff\xff\r\n"))


def gzip_bomb(connection: socket.socket) -> None:
    """A megabyte or two that is a gigabyte or two."""
    packed = _bomb()
    head = b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(packed)
    connection.sendall(OK + head + packed)


@functools.cache
def _bomb() -> bytes:
    return gzip.compress(b" " * (1 << 28), 9) * 8


def body_drips(connection: socket.socket) -> None:
    """A body that comes a byte at a time."""
    connection.sendall(OK + b"Content-Length: 1000000\r\n\r\n{")
    _drip(connection, itertools.repeat(b" "))


def body_without_end(connection: socket.socket) -> None:
    """A map that never ends, as fast as one can send it."""
    connection.sendall(OK + b"Transfer-Encoding: chunked\r\n\r\n")
    while True:
        connection.sendall(b"100000\r\n" + b"[" * (1 << 20) + b"\r\n")


def empty_chunk_extensions(connection: socket.socket) -> None:
    """Chunks of one byte, each with an extension that says nothing."""
    connection.sendall(OK + b"Transfer-Encoding: chunked\r\n\r\n")
    while True:
        connection.sendall(b"1;%s\r\n \r\n" % (b"a" * 33) * 3333)


def redirects(connection: socket.socket) -> None:
    """Sends whoever asks back to the same place."""
    host, port = connection.getsockname()
    connection.sendall(
        b"HTTP/1.1 307 Go\r\nLocation: http://%s:%d/\r\nContent-Length: 0\r\n\r\n" % (host.encode(), port)
    )


LIES: tuple[Lie, ...] = (
    silent, header_drips, head_without_end, continues, continues_fast, empty_gzip, gzip_bomb, body_drips,
    body_without_end, empty_chunk_extensions, redirects,
)  # fmt: skip


# -- what a node says, bent ----------------------------------------------------------------------------------------

ODD: tuple[Any, ...] = (None, 7, -1, 2**64, 1e300, "", "odd", "[::1", [], [7], {}, {"a": [None]}, True)
ENTRIES_CHANGED = 1  # of each list: what is wrong with one is wrong with all


def places(document: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a value can be exchanged: keys and indices that lead there."""
    yield at
    if isinstance(document, dict):
        for key, value in document.items():
            yield from places(value, (*at, key))
    elif isinstance(document, list):
        for index, value in enumerate(document[:ENTRIES_CHANGED]):
            yield from places(value, (*at, index))


def changed(document: Any, at: tuple[Any, ...], value: Any) -> Any:
    """The document with another value at that place."""
    if not at:
        return value
    made = copy.deepcopy(document)
    inner = made
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = value
    return made

"""What the kernel would still send of connections that end: nothing, for those that end within `discarding`.

A connection that is closed is closed to us alone: what waits in its send buffer, megabytes, is delivered all the same,
for seconds over a slow link (measured: 0.25 MB arrived in the 6 s after a transfer engine was dropped, at 400 kbit/s).
So before an engine is dropped whose transfers were given up on, its connections are told to end by a reset, which
throws away what was not sent. What was sent and is on its way arrives within a round trip, and that is waited for.

Which of a process's connections are its engine's nobody says. So all are told that this process made itself, those that
others made to it being left alone: for as long as dropping takes, in which Mooncake holds the GIL and nobody else
closes any. Those that are still there afterwards are told to end as before. A process that is killed throws nothing
away: its send buffers are delivered.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

ROUND_TRIP_S_MAX = 5.0  # that is waited for: no link that is of any use holds more
BY_RESET = struct.pack("ii", 1, 0)  # of SO_LINGER: on, for no time
AS_USUAL = struct.pack("ii", 0, 0)
TCP_INFO_NBYTES = 104
ROUND_TRIP_AT = 68  # in the kernel's `struct tcp_info`: it and its variation, each a u32 in microseconds
VARIATIONS = 4  # that a round trip may take longer: as many as TCP itself waits before it sends again (RFC 6298)


@contextmanager
def discarding() -> Iterator[None]:
    """Connections that end meanwhile send nothing more. At the end, waits until what they had sent has arrived."""
    told: dict[int, float] = {}
    for connection in _connections():
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, BY_RESET)
        told[_number(connection)] = _round_trip_s(connection)
    try:
        yield
    finally:
        for connection in _connections():
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AS_USUAL)
            told.pop(_number(connection), None)
        time.sleep(min(ROUND_TRIP_S_MAX, max(told.values(), default=0.0)))


def _connections() -> Iterator[socket.socket]:
    """The TCP connections that this process made, each as another descriptor of it that is closed again."""
    listening = {found.getsockname()[1] for found in _sockets() if _listens(found)}
    for found in _sockets():
        with suppress(OSError):  # it ended meanwhile
            if not _listens(found) and found.getsockname()[1] not in listening and found.getpeername():
                yield found


def _sockets() -> Iterator[socket.socket]:
    """This process's TCP sockets, in the same way."""
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # closed meanwhile, or no socket
            copy = os.dup(int(descriptor))
            try:
                found = socket.socket(fileno=copy)
            except OSError:
                os.close(copy)
                continue
            with found:
                if found.type == socket.SOCK_STREAM and found.family in (socket.AF_INET, socket.AF_INET6):
                    yield found


def _listens(found: socket.socket) -> bool:
    return bool(found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _number(connection: socket.socket) -> int:
    """The same for all descriptors of a connection, and no other's while it is open."""
    return os.fstat(connection.fileno()).st_ino


def _round_trip_s(connection: socket.socket) -> float:
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_NBYTES)
    round_trip_us, variation_us = struct.unpack_from("II", info, ROUND_TRIP_AT)
    return float(round_trip_us + VARIATIONS * variation_us) / 1e6

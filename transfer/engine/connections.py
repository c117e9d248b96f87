"""The TCP connections of this process, and hanging up: the recall that a one-sided transfer has not.

A read that was given up on goes on, and its bytes land whenever its peer wakes up, in memory that may be another's by
then. What ends it is the end of its connection, as if the network had cut it: Mooncake calls the copy failed within
milliseconds, makes another connection for the next one, and nothing arrives any more (tried, 0.3.13 over TCP). It has
no call for that, and does not tell its sockets; the kernel does. Shutting a socket down leaves its descriptor to
whoever owns it, so that nobody's number is taken away.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

TABLES = ("/proc/self/net/tcp", "/proc/self/net/tcp6")  # see proc_net_tcp(5): addresses in hex, words little-endian
WORD_CHARS = 8
LISTENING = "0A"


class Connection(NamedTuple):
    """One that this process has, or is making; `inode` is the kernel's number for the socket."""

    descriptor: int
    inode: int
    local_port: int
    host: str
    port: int


def connections() -> list[Connection]:
    """All of this process. An IPv4 address has its own spelling, also where the socket is of IPv6."""
    own = dict(_own_sockets())
    return [
        Connection(own[inode], inode, local_port, host, port)
        for inode, local_port, host, port in _table()
        if inode in own
    ]


def hang_up(connection: Connection) -> None:
    """End a connection as the network would: both sides notice at once. Harmless for one that has ended."""
    with suppress(OSError):
        descriptor = os.dup(connection.descriptor)
        with suppress(OSError), socket.socket(fileno=descriptor) as held:
            if _inode(descriptor) == connection.inode:  # the number may be another socket's by now
                held.shutdown(socket.SHUT_RDWR)


def _own_sockets() -> Iterator[tuple[int, int]]:
    """(inode, descriptor)."""
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if (inode := _inode(descriptor)) is not None:
            yield inode, descriptor


def _inode(descriptor: int) -> int | None:
    try:
        match = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(f"/proc/self/fd/{descriptor}"))
    except OSError:  # closed meanwhile
        return None
    return int(match[1]) if match else None


def _table() -> Iterator[tuple[int, int, str, int]]:
    """(inode, local port, host, port) of every connection in this network namespace."""
    for name in TABLES:
        try:
            with open(name, encoding="ascii") as table:
                lines = table.read().splitlines()[1:]
        except OSError:  # a kernel without IPv6
            continue
        for line in lines:
            _, local, remote, state, *_, inode = line.split()[:10]
            if state != LISTENING:
                yield int(inode), int(local.rpartition(":")[2], 16), *_address(remote)


def _address(text: str) -> tuple[str, int]:
    words, _, port = text.partition(":")
    packed = b"".join(bytes.fromhex(words[at : at + WORD_CHARS])[::-1] for at in range(0, len(words), WORD_CHARS))
    return plain(ipaddress.ip_address(packed)), int(port, 16)


def plain(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    """One spelling for one address: that of IPv4 where it is one in IPv6's clothes."""
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)

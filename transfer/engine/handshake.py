"""Asking a Mooncake engine where its data connections lead: the one thing that is needed of its handshake.

Its session id names the port of its handshake; bytes go through another one, which Mooncake tells to itself alone. Both
sides of a message are: its length and one byte of kind, eight bytes little-endian; the kind; JSON (0.3.13, seen on the
wire). Whoever does not answer so is of another version: then nothing is known, and nothing depends on it but how fast a
transfer can be recalled (`transfer.engine.connections`).
"""

from __future__ import annotations

import ipaddress
import socket
import struct
import time

import orjson

from transfer.engine.connections import plain
from transfer.engine.protocol import session_host

DESCRIBE_YOURSELF = 1  # the kind of message that asks for a segment's description, and the kind of its answer
HEAD = struct.Struct("<QB")
DESCRIPTION_NBYTES_MAX = 16 << 20  # thousands of registered ranges


def data_address(session_id: str, within_s: float) -> tuple[str, int] | None:
    """The IP address and port of a session's data connections; None where it does not say so in time."""
    ends_at = time.monotonic() + within_s
    try:
        port = int(session_id.rpartition(":")[2])
        with socket.create_connection((session_host(session_id), port), within_s) as line:
            line.sendall(HEAD.pack(3, DESCRIBE_YOURSELF) + b"{}")
            length, kind = HEAD.unpack(_read(line, HEAD.size, ends_at))
            if kind != DESCRIBE_YOURSELF or not 1 < length <= DESCRIPTION_NBYTES_MAX:
                return None
            said = orjson.loads(_read(line, length - 1, ends_at))
        return plain(ipaddress.ip_address(said["tcp_data_host"])), int(said["tcp_data_port"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read(line: socket.socket, nbytes: int, ends_at: float) -> bytes:
    said = bytearray()
    while len(said) < nbytes:
        line.settimeout(max(0.001, ends_at - time.monotonic()))
        part = line.recv(nbytes - len(said))
        if not part or time.monotonic() > ends_at:
            raise OSError("it ended before all was said")
        said += part
    return bytes(said)

"""Connections on which every wait ends by the deadline of the exchange that waits, whatever the other side does.

An HTTP client's own timeouts are for one read: a server that sends a header byte every second, or `100 Continue`
without end, starts them anew each time, and a name server that does not answer knows none. So the deadline is looked
at here, where the waiting is done: an exchange is one thread's from its first byte to its last, and so is its deadline.

`close` ends what is under way in other threads too, so that who stops waits for no peer.
"""

from __future__ import annotations

import select
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from typing import Any

import httpcore

CONNECT_TIMEOUT_S = 1.0  # to one address: a host that is up answers within milliseconds
Address = tuple[socket.AddressFamily, tuple[Any, ...]]


class Wire(httpcore.NetworkBackend):
    """Where an HTTP client's connections come from. Thread-safe."""

    def __init__(self, options: Iterable[tuple[int, int, int]]) -> None:
        """`options` are set on every socket: (level, name, value)."""
        self._options = tuple(options)
        self._exchange = threading.local()
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._lookups: dict[tuple[str, int], Future[list[Address]]] = {}
        self._lock = threading.Lock()
        self.is_closed = False

    @contextmanager
    def until(self, deadline: float) -> Iterator[None]:
        """What this thread sends, receives and waits for in the block ends by then, in `time.monotonic` seconds."""
        self._exchange.deadline = deadline
        try:
            yield
        finally:
            del self._exchange.deadline

    def left_s(self) -> float:
        """Seconds that this thread's exchange may still take. Raises TimeoutError when there are none."""
        if self.is_closed:
            raise ConnectionAbortedError("the client was closed")
        left: float = self._exchange.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the exchange took too long as a whole")
        return left

    def close(self) -> None:
        """End every exchange that is under way, in whatever thread, and let no other begin."""
        with self._lock:
            self.is_closed = True
            sockets, lookups = list(self._sockets), list(self._lookups.values())
        for lookup in lookups:
            _settle(lookup, ConnectionAbortedError("the client was closed"))
        for each in sockets:
            try:
                each.shutdown(socket.SHUT_RDWR)  # wakes who reads from it; closing it would not
            except OSError:  # it is closed already
                continue

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        """Connect to the first address of `host` that answers. The exchange's deadline takes the place of `timeout`."""
        try:
            return _Stream(self._connect(host, port), self)
        except TimeoutError as error:
            raise httpcore.ConnectTimeout(str(error)) from error
        except (OSError, UnicodeError) as error:  # the latter for a name that none can be
            raise httpcore.ConnectError(str(error)) from error

    def _connect(self, host: str, port: int) -> socket.socket:
        said: OSError = OSError(f"{host} has no address")
        for family, where in self._addresses(host, port):
            made = socket.socket(family, socket.SOCK_STREAM)
            try:
                for option in (*self._options, (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)):
                    made.setsockopt(*option)
                made.settimeout(min(self.left_s(), CONNECT_TIMEOUT_S))
                made.connect(where)
                self._note(made)
            except OSError as error:
                made.close()
                said = error
                continue
            return made
        raise said

    def _note(self, made: socket.socket) -> None:
        with self._lock:
            if self.is_closed:
                raise ConnectionAbortedError("the client was closed")
            self._sockets.add(made)

    def _addresses(self, host: str, port: int) -> list[Address]:
        """Of a name, or of an IP address, which needs nobody."""
        try:
            return _look_up(host, port, socket.AI_NUMERICHOST)
        except socket.gaierror:
            return self._lookup(host, port).result(self.left_s())

    def _lookup(self, host: str, port: int) -> Future[list[Address]]:
        """The one that is under way for this name, or a new one. It cannot be ended: it has a thread of its own."""
        with self._lock:
            if (host, port) in self._lookups:
                return self._lookups[host, port]
            lookup: Future[list[Address]] = Future()
            thread = threading.Thread(target=self._finish, args=(lookup, host, port), name="hotspare-dns", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # the system has none to give
                raise OSError(f"{host} cannot be looked up: {error}") from error
            self._lookups[host, port] = lookup
            return lookup

    def _finish(self, lookup: Future[list[Address]], host: str, port: int) -> None:
        try:
            found: list[Address] | Exception = _look_up(host, port)
        except (OSError, UnicodeError) as error:
            found = error
        with self._lock:  # which whoever started this thread held until it was on record
            del self._lookups[host, port]
        _settle(lookup, found)

    def adopt(self, changed: socket.socket) -> None:
        """A socket of ours goes on as another object: encrypted."""
        self._note(changed)


class _Stream(httpcore.NetworkStream):
    def __init__(self, made: socket.socket, wire: Wire) -> None:
        self._socket = made
        self._wire = wire

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        try:
            self._socket.settimeout(self._wire.left_s())
            return self._socket.recv(max_bytes)
        except TimeoutError as error:
            raise httpcore.ReadTimeout(str(error)) from error
        except OSError as error:
            raise httpcore.ReadError(str(error)) from error

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        unsent = memoryview(buffer)
        try:
            while unsent:
                self._socket.settimeout(self._wire.left_s())
                unsent = unsent[self._socket.send(unsent) :]
        except TimeoutError as error:
            raise httpcore.WriteTimeout(str(error)) from error
        except OSError as error:
            raise httpcore.WriteError(str(error)) from error

    def close(self) -> None:
        self._socket.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        try:
            self._socket.settimeout(self._wire.left_s())  # Python counts it over the whole handshake
            encrypted = ssl_context.wrap_socket(self._socket, server_hostname=server_hostname)
            self._wire.adopt(encrypted)
        except TimeoutError as error:
            self.close()
            raise httpcore.ConnectTimeout(str(error)) from error
        except OSError as error:
            self.close()
            raise httpcore.ConnectError(str(error)) from error
        return _Stream(encrypted, self._wire)

    def get_extra_info(self, info: str) -> Any:
        """`is_readable` is what the pool asks of an idle connection: whether the other side has hung up."""
        if info == "is_readable":
            return _is_readable(self._socket)
        if info == "ssl_object":
            return self._socket if isinstance(self._socket, ssl.SSLSocket) else None
        return self._socket if info == "socket" else None


def _settle(lookup: Future[list[Address]], found: list[Address] | Exception) -> None:
    """What was found, or why not; unless `close` was faster."""
    with suppress(InvalidStateError):
        if isinstance(found, Exception):
            lookup.set_exception(found)
        else:
            lookup.set_result(found)


def _look_up(host: str, port: int, flags: int = 0) -> list[Address]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    return [(family, where) for family, _, _, _, where in found]


def _is_readable(made: socket.socket) -> bool:
    if made.fileno() < 0:
        return True
    poll = select.poll()
    poll.register(made, select.POLLIN)
    return bool(poll.poll(0))

"""The transfer engine of an engine's process: its own, which is lent to us, or one that we start and may throw away."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Sequence
from typing import Any

from transfer.engine import DisposableEngine, MooncakeEngine, TransferEngine
from transfer.errors import EngineError

_log = logging.getLogger("hotspare.restorer")


class EngineLease:
    """An engine, and the memory that is registered with it for us. Not thread-safe."""

    def __init__(self, engine: Any, host: str | None, transport: str, towards: tuple[str, int]) -> None:
        """`engine` is Mooncake's, or ours, or None: then one is started when it is needed, reachable at `host`.

        Without a host it is what `suggest_host` says, or this host's address on the way to `towards`, a host and port.
        """
        self.engine: TransferEngine | None = None
        """None until `start`."""
        self.is_ours = engine is None
        self.transport = transport
        self._lent = engine
        self._host = host
        self._suggested: str | None = None
        self._towards = towards
        self._registered: list[tuple[int, int]] = []

    def suggest_host(self, host: str) -> None:
        """Where this host's node is reached by others: so are we, unless we live in another network namespace."""
        self._suggested = host

    @property
    def has_registered(self) -> bool:
        """Whether `register` succeeded, with this engine."""
        return bool(self._registered)

    def start(self) -> TransferEngine:
        """The engine, started if it was not yet. Raises EngineError."""
        if self.engine is None:
            if self._lent is None:
                engine = self.another()
                assert engine.session_id  # it starts
                self.engine = engine
            elif hasattr(self._lent, "batch_transfer_sync_read"):
                self.engine = MooncakeEngine.wrap(self._lent, self._host or self._own_address())
            else:
                self.engine = self._lent
        return self.engine

    def another(self) -> DisposableEngine:
        """One more engine like ours, for who needs one that can be thrown away; not started yet."""
        host = self._host or self._own_address()
        return DisposableEngine(lambda: MooncakeEngine(host, self.transport))

    @property
    def fence(self) -> Callable[[], None] | None:
        """Sees to it that nothing which was given up on arrives any more; None for a lent engine, which goes on."""
        return self.engine.fence if isinstance(self.engine, DisposableEngine) else None

    def _own_address(self) -> str:
        if self._suggested is not None and is_own_address(self._suggested):
            return self._suggested
        return address_towards(self._towards)

    def register(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Open (address, nbytes) ranges, once; in bounded pieces. Raises EngineError."""
        if not self._registered:
            self.start().register(ranges)
            self._registered = list(ranges)

    def unregister(self) -> None:
        """Close what `register` opened."""
        ranges, self._registered = self._registered, []
        if self.engine is not None and ranges:
            try:
                self.engine.unregister(ranges)
            except EngineError as error:
                _log.warning("%s", error)

    def drop(self) -> None:
        """Throw our engine away, and with it whatever might still arrive; a lent one goes on.

        Also what an earlier fence could not end, for whoever lets the engine go uses the memory for something else.
        """
        if not self.is_ours:
            return
        if self.fence is not None:
            try:
                self.fence()
            except EngineError as error:
                _log.error("bytes of a peer that had timed out may still arrive: %s", error)
        self.engine, self._registered = None, []


def is_own_address(host: str) -> bool:
    """Whether an IP is one of this host's, in this network namespace. Sends nothing."""
    try:
        family, kind, _, _, where = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.bind(where)
            return True
    except OSError:
        return False


def address_towards(host_and_port: tuple[str, int]) -> str:
    """This host's address on the way to another. Sends nothing."""
    try:
        family, kind, _, _, where = socket.getaddrinfo(*host_and_port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(where)
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"

"""The transfer engine of an engine's process: its own, which is lent to us, or one that we start and may throw away."""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from typing import Any

from transfer.engine import MooncakeEngine, TransferEngine
from transfer.errors import EngineError

_log = logging.getLogger("hotspare.restorer")


class EngineLease:
    """An engine, and the memory that is registered with it for us. Not thread-safe."""

    def __init__(self, engine: Any, host: str | None, transport: str, towards: tuple[str, int]) -> None:
        """`engine` is Mooncake's, or ours, or None: then one is started when it is needed, reachable at `host`.

        Without a host it is this host's address on the way to `towards`, a host and port.
        """
        if engine is not None and hasattr(engine, "batch_transfer_sync_read"):
            engine = MooncakeEngine.wrap(engine, host or address_towards(towards))
        self.engine: TransferEngine | None = engine
        self.is_ours = engine is None
        self._host = host
        self.transport = transport
        self._towards = towards
        self._registered: list[tuple[int, int]] = []

    @property
    def has_registered(self) -> bool:
        """Whether `register` succeeded, with this engine."""
        return bool(self._registered)

    def start(self) -> TransferEngine:
        """The engine, started if it was not yet. Raises EngineError."""
        if self.engine is None:
            self.engine = MooncakeEngine(self._host or address_towards(self._towards), self.transport)
        return self.engine

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

    def drop(self) -> bool:
        """Throw our engine away, and with it whatever might still arrive; False for a lent one, which goes on."""
        if self.is_ours:
            self.engine, self._registered = None, []
        return self.is_ours


def address_towards(host_and_port: tuple[str, int]) -> str:
    """This host's address on the way to another. Sends nothing."""
    try:
        family, kind, _, _, where = socket.getaddrinfo(*host_and_port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(where)
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"

"""Mooncake's transfer engine. The only place that imports mooncake.

Mooncake answers in return codes; none leaves this file.
"""

from __future__ import annotations

import importlib
import math
import os
import time
from collections.abc import Iterable, Sequence
from typing import Any

from transfer.engine.environment import engine_environment
from transfer.engine.protocol import TRANSFER_TIMEOUT_S, Copy, pieces, pieces_to_register, within_pieces
from transfer.errors import EngineMissing, EngineRefused, TransferFailed

# Mooncake's own wait spins on a core, which a small host then lacks to move the bytes: asking now and then
# instead made a restore on 2 cores 1.5 times as fast with half the processor time.
POLL_INTERVAL_S = 0.0005
TIMED_OUT = -2  # what `transfer_check_status` calls a copy that the transport gave up on; 0 is under way, 1 done

EXTRAS = "`pip install 'hotspare[cpu]'`, `[cuda12]` or `[cuda13]`"


class MooncakeEngine:
    """Mooncake's transfer engine in peer-to-peer mode: no metadata server, a port of its own on every interface."""

    def __init__(self, host: str, transport: str = "tcp", devices: str = "") -> None:
        """Start an engine that peers reach at `host`. Raises EngineMissing or EngineRefused."""
        with engine_environment(transport, host):
            engine = _mooncake().TransferEngine()
            code = engine.initialize(host, "P2PHANDSHAKE", transport, devices)
        if code:
            raise EngineRefused(
                f"Mooncake would not start on {host} over {transport} (code {code}): is {host} an address "
                "of this host, and for rdma, is there a card?"
            )
        self._engine = engine
        self._host = host

    @classmethod
    def wrap(cls, engine: Any, host: str) -> MooncakeEngine:
        """Use an engine that this process has already: a `mooncake.engine.TransferEngine` initialized on `host`."""
        wrapped = cls.__new__(cls)
        wrapped._engine, wrapped._host = engine, host
        return wrapped

    @property
    def session_id(self) -> str:
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{host}:{self._engine.get_rpc_port()}"

    def register(self, ranges: Iterable[tuple[int, int]]) -> None:
        done: list[tuple[int, int]] = []
        for piece in pieces_to_register(ranges):
            # The batch call releases the GIL, the single one does not.
            code = self._engine.batch_register_memory([piece[0]], [piece[1]])
            if code:
                for address, _ in done:  # nothing stays half-registered, also if one of them is refused
                    self._engine.batch_unregister_memory([address])
                raise EngineRefused(
                    f"Mooncake would not register {piece[1]:,} bytes at {piece[0]:#x} (code {code}): over rdma, raise "
                    "the memory-lock limit (`ulimit -l unlimited`); ranges must not overlap"
                )
            done.append(piece)

    def unregister(self, ranges: Iterable[tuple[int, int]]) -> None:
        addresses = [address for address, _ in pieces(ranges)]
        if addresses and (code := self._engine.batch_unregister_memory(addresses)):
            raise EngineRefused(f"Mooncake would not unregister {len(addresses)} ranges (code {code})")

    def read(self, session_id: str, copies: Sequence[Copy]) -> None:
        self._transfer(self._engine.batch_transfer_async_read, session_id, copies, "destination")

    def write(self, session_id: str, copies: Sequence[Copy], within_s: float | None = None) -> None:
        self._transfer(self._engine.batch_transfer_async_write, session_id, copies, "source", within_s)

    def _transfer(
        self, submit: Any, session_id: str, copies: Sequence[Copy], ours: str, within_s: float | None = None
    ) -> None:
        """Every copy is a batch of its own: only of such a one can Mooncake be asked whether it is done."""
        started = time.monotonic()
        under_way, is_refused = [], False
        for destination, source, nbytes in within_pieces(copies):
            here, there = (destination, source) if ours == "destination" else (source, destination)
            batch = submit(session_id, [here], [there], [nbytes])
            if not batch:
                is_refused = True
                break
            under_way.append(batch)
        has_failed, timed_out = self._wait(under_way, math.inf if within_s is None else started + within_s)
        if is_refused or has_failed:
            nbytes, seconds = sum(copy.nbytes for copy in copies), time.monotonic() - started
            raise TransferFailed(
                f"{len(copies)} copies, {nbytes:,} bytes, with {session_id} failed after {seconds:.1f} s",
                timed_out=timed_out,
            )

    def _wait(self, batches: Iterable[int], until_s: float) -> tuple[bool, bool]:
        """Until all have ended, whatever becomes of one, or none ends for too long: (has one failed, timed out)."""
        timeout_s = float(os.environ.get("MC_TRANSFER_TIMEOUT", TRANSFER_TIMEOUT_S))
        has_failed = timed_out = False
        for batch in batches:
            deadline_s = min(until_s, time.monotonic() + timeout_s)
            while not (code := self._engine.transfer_check_status(batch)):
                if time.monotonic() > deadline_s:
                    return True, True
                time.sleep(POLL_INTERVAL_S)
            has_failed |= code < 0
            timed_out |= code == TIMED_OUT
        return has_failed, timed_out


def _mooncake() -> Any:
    try:
        return importlib.import_module("mooncake.engine")
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] == "mooncake":
            raise EngineMissing(
                f"no Mooncake transfer engine is installed: {EXTRAS} brings the one for this host"
            ) from error
        raise
    except ImportError as error:
        raise EngineMissing(
            f"the Mooncake wheel that is installed does not load ({error}): {EXTRAS} must fit this host's CUDA, one "
            "wheel at a time, and Debian's libibverbs1 is needed (`apt-get install libibverbs1`)"
        ) from error

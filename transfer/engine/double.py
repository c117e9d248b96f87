"""A transfer engine in memory, for tests and simulations: engines of one `Network` reach each other by session id.

It moves bytes of this process between addresses, as the real one does between processes, and refuses what the real one
refuses. What goes wrong is switched on, and happens every time in the same way: a session that fails, one that has
stopped, whose transfers time out and are carried out when it wakes, and one that is slow by the caller's clock. As with
the real one, what a dropped engine had under way never arrives; so hold no engine that should be gone.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from transfer.engine.protocol import TRANSFER_TIMEOUT_S, Copy, Watch, pieces, pieces_to_register, within_pieces
from transfer.errors import EngineRefused, TransferFailed

FIRST_PORT = 15_000


@dataclass(frozen=True, slots=True)
class _Transfer:
    """Copies between an engine's memory and that of a session. `into_peer`: the peer's is the destination."""

    issuer: weakref.ref[EngineDouble]
    session_id: str
    copies: tuple[Copy, ...]
    into_peer: bool

    @property
    def nbytes(self) -> int:
        return sum(copy.nbytes for copy in self.copies)


class Network:
    """Engines that reach each other, and what is wrong with them. Thread-safe."""

    def __init__(self, sleep: Callable[[float], None] = lambda seconds: None) -> None:
        """`sleep` is told of the seconds that slow and stopped sessions cost: a fake clock's, say."""
        self._sleep = sleep
        self._engines: weakref.WeakValueDictionary[str, EngineDouble] = weakref.WeakValueDictionary()
        self._ports = itertools.count(FIRST_PORT)
        self._failing: Counter[str] = Counter()
        self._nbytes_per_s: dict[str, float] = {}
        self._stopped: set[str] = set()
        self._late: list[_Transfer] = []
        self._lock = threading.RLock()

    def engine(self, host: str = "127.0.0.1") -> EngineDouble:
        with self._lock:
            engine = EngineDouble(self, f"{host}:{next(self._ports)}")
            self._engines[engine.session_id] = engine
            return engine

    # -- what goes wrong -------------------------------------------------------------------------------------

    def fail(self, session_id: str, transfers: int = 1) -> None:
        """Let the next transfers with this session fail, before a byte has moved."""
        with self._lock:
            self._failing[session_id] += transfers

    def slow(self, session_id: str, nbytes_per_s: float) -> None:
        """Let transfers with this session take time: `sleep` is told of it."""
        with self._lock:
            self._nbytes_per_s[session_id] = nbytes_per_s

    def stop(self, session_id: str) -> None:
        """Let transfers with this session time out, as if its process were stopped."""
        with self._lock:
            self._stopped.add(session_id)

    def wake(self, session_id: str) -> None:
        """Let a stopped session go on: what it was asked for meanwhile is done now, with the bytes of now."""
        with self._lock:
            self._stopped.discard(session_id)
            late = [transfer for transfer in self._late if transfer.session_id == session_id]
            self._late = [transfer for transfer in self._late if transfer.session_id != session_id]
            for transfer in late:
                if transfer.issuer() is not None:
                    self._move(transfer)

    # -- moving ----------------------------------------------------------------------------------------------

    def carry(self, transfer: _Transfer, within_s: float | None = None) -> None:
        """Do a transfer, or what is to go wrong with it. Raises TransferFailed."""
        timeout_s = min(TRANSFER_TIMEOUT_S, within_s or TRANSFER_TIMEOUT_S)
        with self._lock:
            is_failing = self._failing[transfer.session_id] > 0
            rate = self._nbytes_per_s.get(transfer.session_id)
            takes_s = 0.0 if rate is None else transfer.nbytes / rate
            is_stopped = transfer.session_id in self._stopped or takes_s > timeout_s
            if is_stopped:
                self._late.append(transfer)
            elif is_failing:
                self._failing[transfer.session_id] -= 1
        self._sleep(timeout_s if is_stopped else takes_s)
        lost = frozenset(range(len(transfer.copies))) if is_stopped or is_failing else self._move(transfer)
        if lost:
            raise TransferFailed(
                f"{len(lost)} of {len(transfer.copies)} copies, {transfer.nbytes:,} bytes, with {transfer.session_id} "
                "failed",
                timed_out=is_stopped,
                lost=frozenset() if is_stopped else lost,
            )

    def _move(self, transfer: _Transfer) -> frozenset[int]:
        """The numbers of the copies that the session did not take: all, if it is gone. The others are done."""
        with self._lock:
            peer = self._engines.get(transfer.session_id)
            lost = set()
            for number, copy in enumerate(transfer.copies):
                remote = [p.destination if transfer.into_peer else p.source for p in within_pieces([copy])]
                sizes = [piece.nbytes for piece in within_pieces([copy])]
                if peer is not None and all(map(peer.has_open, remote, sizes)):
                    ctypes.memmove(copy.destination, copy.source, copy.nbytes)
                else:
                    lost.add(number)
            return frozenset(lost)


class EngineDouble:
    """One engine of a network: see `transfer.engine.protocol.TransferEngine`."""

    def __init__(self, network: Network, session_id: str) -> None:
        self._network = network
        self._session_id = session_id
        self._open: dict[int, int] = {}

    @property
    def session_id(self) -> str:
        return self._session_id

    def has_open(self, address: int, nbytes: int) -> bool:
        """Whether these bytes lie within one registered piece."""
        return any(start <= address and address + nbytes <= start + size for start, size in self._open.items())

    def register(self, ranges: Iterable[tuple[int, int]]) -> None:
        done: dict[int, int] = {}
        for address, nbytes in pieces_to_register(ranges):
            taken = {**self._open, **done}.items()
            if any(address < start + size and start < address + nbytes for start, size in taken):
                raise EngineRefused(f"{nbytes:,} bytes at {address:#x} are registered already: ranges must not overlap")
            done[address] = nbytes
        self._open |= done

    def unregister(self, ranges: Iterable[tuple[int, int]]) -> None:
        addresses = [address for address, _ in pieces(ranges)]
        if strangers := [address for address in addresses if address not in self._open]:
            raise EngineRefused(f"{len(strangers)} ranges are not registered, first {strangers[0]:#x}")
        for address in addresses:
            del self._open[address]

    def read(self, session_id: str, copies: Sequence[Copy], watch: Watch | None = None) -> None:
        self._carry(session_id, copies, into_peer=False)
        if watch is not None:
            watch.arrived_nbytes += sum(copy.nbytes for copy in copies)

    def write(self, session_id: str, copies: Sequence[Copy], within_s: float | None = None) -> None:
        self._carry(session_id, copies, into_peer=True, within_s=within_s)

    def _carry(
        self, session_id: str, copies: Sequence[Copy], *, into_peer: bool, within_s: float | None = None
    ) -> None:
        if any(copy.nbytes for copy in copies):
            self._network.carry(_Transfer(weakref.ref(self), session_id, tuple(copies), into_peer), within_s)

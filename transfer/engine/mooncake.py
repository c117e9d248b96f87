"""Mooncake's transfer engine. The only place that imports mooncake.

Mooncake answers in return codes; none leaves this file.
"""

from __future__ import annotations

import importlib
import ipaddress
import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from transfer.engine.connections import connections, hang_up, plain
from transfer.engine.environment import TCP_LANES_PER_PEER, engine_environment
from transfer.engine.handshake import data_address
from transfer.engine.protocol import (
    TRANSFER_TIMEOUT_S,
    Copy,
    Watch,
    pieces,
    pieces_to_register,
    session_host,
    within_pieces,
)
from transfer.engine.unsent import ROUND_TRIP_S_MAX
from transfer.engine.window import Window
from transfer.errors import EngineMissing, EngineRefused, TransferFailed

# Mooncake's own wait spins on a core, which a small host then lacks to move the bytes: asking now and then
# instead made a restore on 2 cores 1.5 times as fast with half the processor time.
POLL_INTERVAL_S = 0.0005
# What `transfer_check_status` says of a copy, once, and then forgets it. All else is that it failed, and that nothing
# of it comes any more.
UNDER_WAY, DONE, TIMED_OUT = 0, 1, -2  # the last: the transport gave it up, and it may still arrive
GIVE_UP_SHARE = 0.9  # of Mooncake's own patience: who is first to cut the connection knows what became of the copy
# For copies to end whose connections were cut: that takes milliseconds, or a second where one was just being made, and
# within that an engine is dropped.
HANG_UP_WAIT_S = 0.25
CONTACT_S = 2.0  # for first contact: a few hundred bytes each way
CONTACT_POLL_S = 0.02
KNOCK_NBYTES = 64
KNOCK_S = 1.5  # for that; a slow link delays it by what waits in its queue
FRESH_S = 0.05  # a connection that was used since then is taken for good; to ask costs one round trip
SILENCES_MAX = 2  # the first may be that of connections which a firewall dropped, not the peer's
KNOCKS_MAX = TCP_LANES_PER_PEER + SILENCES_MAX  # one connection cut with a reset is found each time, at least

EXTRAS = "`pip install 'hotspare[cpu]'`, `[cuda12]` or `[cuda13]`"


@dataclass(slots=True)
class _Line:
    """What an engine knows of one session."""

    session_id: str
    is_met: bool = False
    is_silent: bool = False
    """Whether it said nothing when it was last asked."""
    data_address: tuple[str, int] | None = None
    """Where its data connections lead, if that is known."""
    meeting: threading.Thread | None = None
    answered_at: float = -math.inf
    """When bytes last came."""
    window: Window = field(default_factory=Window)


class _Sent(NamedTuple):
    """A copy that is under way."""

    number: int
    batch: int
    nbytes: int
    begun_at: float


@dataclass(slots=True)
class _Course:
    """How far the copies of one transfer are. No more are under way with a session than its window lets in."""

    line: _Line
    watch: Watch
    waiting: deque[tuple[int, Copy]]
    under_way: deque[_Sent] = field(default_factory=deque)
    lost: set[int] = field(default_factory=set)
    is_settled: bool = True

    def begin(self, way: _Way) -> bool:
        """Begin as many as there is room for; whether that was any, or nothing waits."""
        began = not self.waiting
        while self.waiting and self.line.window.enter(self.waiting[0][1].nbytes):
            number, copy = self.waiting.popleft()
            began = True
            if batch := way.submit(copy):
                self.under_way.append(_Sent(number, batch, copy.nbytes, time.monotonic()))
            else:  # refused, and never under way
                self.line.window.leave(copy.nbytes)
                self.lost.add(number)
        return began

    def end(self, code: int) -> None:
        """The one that was begun first has ended so, or is left."""
        sent = self.under_way.popleft()
        window = self.line.window
        window.leave(sent.nbytes)
        if code == DONE:
            self.watch.arrived_nbytes += sent.nbytes
            self.line.answered_at = time.monotonic()
            window.arrived(sent.nbytes, self.line.answered_at - sent.begun_at)
        else:
            self.lost.add(sent.number)
            self.is_settled &= code not in (UNDER_WAY, TIMED_OUT)
            window.narrow()

    def close(self) -> None:
        """Give up the room of what has not ended."""
        for each in self.under_way:
            self.line.window.leave(each.nbytes)


class _Way(NamedTuple):
    """How, and with whom: `begin` is a call of Mooncake's that takes lists of addresses, here and there, and sizes."""

    begin: Callable[[str, list[int], list[int], list[int]], int]
    session_id: str
    is_read: bool

    def submit(self, copy: Copy) -> int:
        """The number of a batch that is under way; 0 if it was refused."""
        here, there = (copy.destination, copy.source) if self.is_read else (copy.source, copy.destination)
        return self.begin(self.session_id, [here], [there], [copy.nbytes])


class MooncakeEngine:
    """Mooncake's transfer engine in peer-to-peer mode: no metadata server, a port of its own on every interface.

    What Mooncake waits for in a peer that says nothing is a minute at first contact, and 10 s or 30 s later. So contact
    is made apart from any transfer, and a few bytes go over connections that were idle before many do: either ends
    within seconds, and with nothing asked for that might arrive later. A transfer is recalled by cutting the session's
    connections, and those of no other session (`transfer.engine.connections`).
    """

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
        self._take(engine, host)

    @classmethod
    def wrap(cls, engine: Any, host: str) -> MooncakeEngine:
        """Use an engine that this process has already: a `mooncake.engine.TransferEngine` initialized on `host`."""
        wrapped = cls.__new__(cls)
        wrapped._take(engine, host)
        return wrapped

    def _take(self, engine: Any, host: str) -> None:
        self._engine = engine
        self._host = host
        self._lines: dict[str, _Line] = {}
        self._lock = threading.Lock()

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

    def read(self, session_id: str, copies: Sequence[Copy], watch: Watch | None = None) -> None:
        self._transfer(_Way(self._engine.batch_transfer_async_read, session_id, is_read=True), copies, watch or Watch())

    def write(self, session_id: str, copies: Sequence[Copy], within_s: float | None = None) -> None:
        way = _Way(self._engine.batch_transfer_async_write, session_id, is_read=False)
        self._transfer(way, copies, Watch(), math.inf if within_s is None else time.monotonic() + within_s)

    # -- moving ----------------------------------------------------------------------------------------------

    def _transfer(self, way: _Way, copies: Sequence[Copy], watch: Watch, until_s: float = math.inf) -> None:
        """Every copy is a batch of its own: only of such a one can Mooncake be asked whether it is done."""
        numbered = [(number, piece) for number, copy in enumerate(copies) for piece in within_pieces([copy])]
        if not numbered:
            return
        started = time.monotonic()
        line = self._line(way.session_id)
        self._meet(line, watch)
        self._knock(line, way, numbered[0][1], watch, until_s)
        lost, is_settled = self._carry(line, way, numbered, watch, until_s)
        if not lost:
            return
        line.answered_at = -math.inf  # knock before the next one: connections may have ended
        nbytes, seconds = sum(copy.nbytes for copy in copies), time.monotonic() - started
        what = "was recalled" if watch.is_recalled else "failed"
        raise TransferFailed(
            f"{len(lost)} of {len(copies)} copies, {nbytes:,} bytes, with {way.session_id} {what} after "
            f"{seconds:.1f} s",
            timed_out=not is_settled,
            lost=lost if is_settled else frozenset(),
        )

    def _carry(
        self, line: _Line, way: _Way, copies: Sequence[tuple[int, Copy]], watch: Watch, until_s: float
    ) -> tuple[frozenset[int], bool]:
        """Until all have ended, whatever becomes of one, or they are cut off: (which failed, have all ended).

        They are cut off once the transfer is recalled, or none ends for too long.
        """
        limit_s = GIVE_UP_SHARE * float(os.environ.get("MC_TRANSFER_TIMEOUT", TRANSFER_TIMEOUT_S))
        course = _Course(line, watch, deque(copies))
        try:
            while course.waiting or course.under_way:
                until = min(until_s, time.monotonic() + limit_s)
                while not course.begin(way) and not course.under_way:  # others have all the room
                    if watch.is_recalled or time.monotonic() >= until:
                        break
                    time.sleep(POLL_INTERVAL_S)
                if not course.under_way or not (code := self._await(course.under_way[0].batch, until, watch)):
                    break
                course.end(code)
            for code in self._cut(line, [each.batch for each in course.under_way]):
                course.end(code)
        finally:
            course.close()
        return frozenset(course.lost | {number for number, _ in course.waiting}), course.is_settled

    def _cut(self, line: _Line, batches: Sequence[int]) -> list[int]:
        """What becomes of these copies once their connections are cut: of those that waited for one, also the next.

        Returns once what was sent over these has arrived: a write that was cut off writes no more.
        """
        codes = dict.fromkeys(batches, UNDER_WAY)
        ends_at, trip_s = time.monotonic() + HANG_UP_WAIT_S, 0.0
        while UNDER_WAY in codes.values() and time.monotonic() < ends_at:
            trip_s = max(trip_s, _hang_up(line.data_address))
            again_at = time.monotonic() + CONTACT_POLL_S
            codes = {batch: code or self._await(batch, again_at) for batch, code in codes.items()}
        time.sleep(min(ROUND_TRIP_S_MAX, trip_s))
        return list(codes.values())

    def _await(self, batch: int, until_s: float, watch: Watch | None = None) -> int:
        """What becomes of a copy by then, or until it is recalled; UNDER_WAY if nothing does."""
        while not (code := int(self._engine.transfer_check_status(batch))):
            if time.monotonic() >= until_s or (watch is not None and watch.is_recalled):
                break
            time.sleep(POLL_INTERVAL_S)
        return code

    # -- peers that say nothing ------------------------------------------------------------------------------

    def _line(self, session_id: str) -> _Line:
        with self._lock:
            return self._lines.setdefault(session_id, _Line(session_id))

    def _meet(self, line: _Line, watch: Watch) -> None:
        """First contact, in a thread of its own: Mooncake may wait for a minute, and keep others waiting."""
        with self._lock:
            if line.is_met:
                return
            if line.meeting is None or not line.meeting.is_alive():
                line.meeting = threading.Thread(target=_contact, args=(line, weakref.ref(self)), daemon=True)
                line.meeting.start()
            meeting = line.meeting
        ends_at = time.monotonic() + 2 * CONTACT_S
        while meeting.is_alive() and time.monotonic() < ends_at:
            if watch.is_recalled:
                raise TransferFailed(f"{line.session_id} had not answered when the transfer was recalled")
            meeting.join(CONTACT_POLL_S)
        ends_at = time.monotonic() + HANG_UP_WAIT_S
        while (is_stuck := meeting.is_alive()) and time.monotonic() < ends_at:
            _hang_up(_contact_address(line.session_id))
            meeting.join(CONTACT_POLL_S)
        if line.is_silent or is_stuck:
            raise TransferFailed(
                f"{line.session_id} did not answer within {CONTACT_S:.0f} s: are its ports open to this host?"
            )

    def contact(self, session_id: str) -> bool:
        """Have Mooncake make contact. Of the calls that do, this one releases the GIL meanwhile; it moves nothing."""
        return bool(self._engine.batch_transfer_sync_read(session_id, [], [], []) == 0)

    def _knock(self, line: _Line, way: _Way, copy: Copy, watch: Watch, until_s: float) -> None:
        """Send a few bytes over connections that were idle: a firewall may have cut them, and said so or not.

        Each that was cut with a reset fails once; where nothing comes at all, all are cut, and made anew once. What is
        sent is the beginning of what is to be sent, to where it belongs.
        """
        (piece, *_) = within_pieces([copy._replace(nbytes=min(copy.nbytes, KNOCK_NBYTES))])
        silences, began_at = 0, time.monotonic()
        for _ in range(KNOCKS_MAX):
            now = time.monotonic()
            if now - line.answered_at < FRESH_S or (not silences and now - began_at > KNOCK_S):
                return
            batches = [batch for _ in range(TCP_LANES_PER_PEER) if (batch := way.submit(piece))]
            ends_at = min(until_s, time.monotonic() + KNOCK_S)
            codes = {batch: self._await(batch, ends_at, watch) for batch in batches}
            if UNDER_WAY not in codes.values():
                if all(
                    code == DONE for code in codes.values()
                ):  # or all were refused, which the transfer itself will tell
                    line.answered_at = time.monotonic()
                continue
            ends = self._cut(line, [batch for batch, code in codes.items() if not code])
            silences += 1
            is_over = watch.is_recalled or silences >= SILENCES_MAX or time.monotonic() >= until_s
            if UNDER_WAY in ends or is_over:
                raise TransferFailed(
                    f"{way.session_id} sends nothing, although it answers: are its data ports open to this host?",
                    timed_out=UNDER_WAY in ends or TIMED_OUT in ends,
                )


def _hang_up(address: tuple[str, int] | None) -> float:
    """Cut every connection of this process that leads there; for how many seconds what they sent may be on its way."""
    there = [each for each in connections() if (each.host, each.port) == address]
    return max(map(hang_up, there), default=0.0)


def _contact(line: _Line, engine: weakref.ref[MooncakeEngine]) -> None:
    """Ask a session where it is to be found, and only if it says anything have Mooncake do so.

    An engine that was dropped meanwhile asks nobody any more.
    """
    line.is_silent = False
    try:
        line.data_address = data_address(line.session_id, CONTACT_S)
    except TimeoutError:
        line.is_silent = True
        return
    if (asking := engine()) is not None:
        line.is_met = asking.contact(line.session_id)


def _contact_address(session_id: str) -> tuple[str, int] | None:
    """Where first contact leads; None for a session that has no IP address, which is not looked up here."""
    try:
        return plain(ipaddress.ip_address(session_host(session_id))), int(session_id.rpartition(":")[2])
    except ValueError:
        return None


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

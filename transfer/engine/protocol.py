"""What Hotspare needs of a transfer engine, and the limits that all of them keep.

Two are here: `mooncake` is the real one, `double` is one in memory for tests and simulations. They are held to the same
behaviour by one test that runs over both (tests/transfer/engine/test_conformance.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from transfer.errors import EngineRefused

REGISTER_PIECE_NBYTES = 1 << 30  # larger RDMA regions were once truncated without a word
RANGES_MAX = 8192  # in one go: registering takes 0.25 s for 4,000, 4 s for 8,000, and 5 minutes for 89,000
ITEMS_PER_BATCH_MAX = 1024  # over TCP a batch of 2,048 passes and one of 3,000 is refused
BATCH_NBYTES_MAX = 128 << 20
TRANSFER_TIMEOUT_S = 10  # a stopped peer is given up after this; Mooncake's own default is 30


class Copy(NamedTuple):
    """`nbytes` bytes from address `source` to address `destination`; which side is remote, the verb says."""

    destination: int
    source: int
    nbytes: int


class Watch:
    """What who ordered a transfer and who carries it out tell each other meanwhile. Each side writes one field."""

    __slots__ = ("arrived_nbytes", "is_recalled")

    def __init__(self) -> None:
        self.is_recalled = False
        """Whether it is wanted no longer: end it, if that can be done, and raise."""
        self.arrived_nbytes = 0
        """So far; bytes that came in vain are counted, too."""


class TransferEngine(Protocol):
    """Moves bytes between registered memory of two processes. Every call may block; none holds the GIL for long."""

    @property
    def session_id(self) -> str:
        """What a peer calls this engine: `host:port`. A restarted process has another."""
        ...

    def register(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Open (address, nbytes) ranges to transfers, both as source and as destination. Raises EngineRefused."""
        ...

    def unregister(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Close ranges that `register` opened. Raises EngineRefused."""
        ...

    def read(self, session_id: str, copies: Sequence[Copy], watch: Watch | None = None) -> None:
        """Copy from the peer's memory into ours.

        Raises TransferFailed, which says what came and whether anything still may. One that is recalled by its `watch`
        ends soon, also with a peer that has stopped.
        """
        ...

    def write(self, session_id: str, copies: Sequence[Copy], within_s: float | None = None) -> None:
        """Copy from our memory into the peer's, and give up after `within_s` if that is sooner than the engine would.

        Raises TransferFailed.
        """
        ...


def session_host(session_id: str) -> str:
    """The host in a session id, an IPv6 address without its brackets; empty for what is none."""
    return session_id.rpartition(":")[0].strip("[]")


def pieces(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Cut (address, nbytes) ranges at addresses that are multiples of REGISTER_PIECE_NBYTES.

    Mooncake refuses a copy that is not within one registered region (over TCP, 0.3.13, "not within any registered
    buffer"). With cuts at fixed addresses, the other side knows where they are without being told.
    """
    step = REGISTER_PIECE_NBYTES
    return [
        (max(address, at), min(address + nbytes, at + step) - max(address, at))
        for address, nbytes in ranges
        if nbytes > 0
        for at in range(address // step * step, address + nbytes, step)
    ]


def pieces_to_register(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same, if they are few enough to register. Raises EngineRefused."""
    wanted = pieces(ranges)
    if len(wanted) > RANGES_MAX:
        raise EngineRefused(
            f"{len(wanted):,} ranges of memory are too many to register, {RANGES_MAX:,} at most: keep experts in "
            "fewer, larger tensors"
        )
    return wanted


def within_pieces(copies: Iterable[Copy]) -> list[Copy]:
    """Cut copies so that each lies within one registered piece on both sides; see `pieces`."""
    step = REGISTER_PIECE_NBYTES
    cut: list[Copy] = []
    for destination, source, nbytes in copies:
        while nbytes > 0:
            size = min(nbytes, step - destination % step, step - source % step)
            cut.append(Copy(destination, source, size))
            destination, source, nbytes = destination + size, source + size, nbytes - size
    return cut

"""One behaviour of every transfer engine: the real one, in two processes over loopback, and the double.

A peer is an engine with memory of its own that can be stopped, woken and ended: a process, or a session of the double.
"""

from __future__ import annotations

import gc
import json
import mmap
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest

from tests.processes import pause, wait_until
from transfer.destination import Landing
from transfer.engine import Copy, MooncakeEngine, TransferEngine, protocol
from transfer.engine.double import EngineDouble, Network
from transfer.errors import EngineRefused, TransferFailed
from transfer.plan import Batch, Limits, Piece, Want
from transfer.sources import reading

ROOT = Path(__file__).parents[3]
HOST = "127.0.0.1"
PEER_NBYTES = 1_333_333
Bytes = np.ndarray[Any, np.dtype[np.uint8]]

# A process with an engine and a buffer of random bytes, registered in pieces of argv[1] bytes. It says what it holds,
# and closes its memory if it is told to.
PEER = """
    import json, sys
    import numpy as np
    from transfer.engine import MooncakeEngine, protocol
    protocol.REGISTER_PIECE_NBYTES = int(sys.argv[1])
    data = np.random.default_rng(33).integers(0, 256, int(sys.argv[2]), np.uint8)
    ours = MooncakeEngine("127.0.0.1")
    ours.register([(data.ctypes.data, data.nbytes)])
    print(json.dumps({"session": ours.session_id, "address": data.ctypes.data}), flush=True)
    for line in sys.stdin:
        if line == "close\\n":
            ours.unregister([(data.ctypes.data, data.nbytes)])
        print(json.dumps({"bytes": data.tobytes().hex()}), flush=True)
"""


class Peer(Protocol):
    """`data` is what its memory held at the start, at `address`."""

    session_id: str
    address: int
    data: Bytes

    def memory(self) -> bytes:
        """What its memory holds now."""
        ...

    def close_memory(self) -> None: ...
    def stop(self) -> None: ...
    def wake(self) -> None: ...
    def kill(self) -> None: ...


class PeerProcess:
    def __init__(self, piece_nbytes: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PEER), str(piece_nbytes), str(PEER_NBYTES)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT, text=True,
        )  # fmt: skip
        said = self._line()
        self.session_id: str = said["session"]
        self.address: int = said["address"]
        self.data = np.random.default_rng(33).integers(0, 256, PEER_NBYTES, np.uint8)

    def _line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return dict(json.loads(self.process.stdout.readline()))

    def _ask(self, what: str) -> bytes:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        return bytes.fromhex(self._line()["bytes"])

    def memory(self) -> bytes:
        return self._ask("memory")

    def close_memory(self) -> None:
        self._ask("close")

    def stop(self) -> None:
        pause(self.process.pid)

    def wake(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


class PeerDouble:
    def __init__(self, network: Network) -> None:
        self._network = network
        self._engine: EngineDouble | None = network.engine(HOST)
        self.session_id = self._engine.session_id
        self.data = np.random.default_rng(33).integers(0, 256, PEER_NBYTES, np.uint8)
        self._memory = self.data.copy()
        self.address = int(self._memory.ctypes.data)
        self._engine.register([(self.address, PEER_NBYTES)])

    def memory(self) -> bytes:
        return self._memory.tobytes()

    def close_memory(self) -> None:
        assert self._engine is not None
        self._engine.unregister([(self.address, PEER_NBYTES)])

    def stop(self) -> None:
        self._network.stop(self.session_id)

    def wake(self) -> None:
        self._network.wake(self.session_id)

    def kill(self) -> None:
        self._engine = None


class Mooncakes:
    def engine(self) -> TransferEngine:
        return MooncakeEngine(HOST)

    def peer(self, piece_nbytes: int = protocol.REGISTER_PIECE_NBYTES) -> Peer:
        return PeerProcess(piece_nbytes)


class Doubles:
    def __init__(self) -> None:
        self._network = Network()

    def engine(self) -> TransferEngine:
        return self._network.engine(HOST)

    def peer(self, piece_nbytes: int = protocol.REGISTER_PIECE_NBYTES) -> Peer:
        return PeerDouble(self._network)  # cut as the test has it cut: it is in this process


World = Mooncakes | Doubles


@pytest.fixture(scope="module", params=[Mooncakes, Doubles], ids=["mooncake", "double"])
def world(request: pytest.FixtureRequest) -> World:
    made: World = request.param()
    return made


@pytest.fixture(scope="module")
def engine(world: World) -> TransferEngine:
    return world.engine()


@pytest.fixture(scope="module")
def peer(world: World) -> Iterator[Peer]:
    started = world.peer()
    yield started
    started.kill()


@pytest.fixture
def start_peer(world: World) -> Iterator[Callable[..., Peer]]:
    started: list[Peer] = []

    def start(piece_nbytes: int = protocol.REGISTER_PIECE_NBYTES) -> Peer:
        started.append(world.peer(piece_nbytes))
        return started[-1]

    yield start
    for each in started:
        each.kill()


@pytest.fixture
def memory(engine: TransferEngine) -> Iterator[Callable[[int], Bytes]]:
    """`memory(nbytes)` is an array of zeros that the engine may write to while the test runs."""
    opened: list[Bytes] = []

    def allocate(nbytes: int) -> Bytes:
        array = np.zeros(nbytes, np.uint8)
        engine.register([(array.ctypes.data, nbytes)])
        opened.append(array)
        return array

    yield allocate
    for array in opened:
        engine.unregister([(array.ctypes.data, array.nbytes)])


def test_reading_brings_exactly_the_bytes_asked_for(engine: TransferEngine, peer: Peer, memory: Any) -> None:
    ours = memory(7777)
    engine.read(
        peer.session_id,
        [Copy(ours.ctypes.data + 11, peer.address + 333, 3333), Copy(ours.ctypes.data + 5555, peer.address + 1, 7)],
    )
    expected = np.zeros(7777, np.uint8)
    expected[11 : 11 + 3333] = peer.data[333 : 333 + 3333]
    expected[5555:5562] = peer.data[1:8]
    assert (ours == expected).all()


def test_writing_puts_the_bytes_into_the_peer_and_nowhere_else(
    engine: TransferEngine, start_peer: Callable[..., Peer], memory: Any
) -> None:
    ours, peer = memory(3333), start_peer()
    ours[:] = 77
    engine.write(peer.session_id, [Copy(peer.address + 1001, ours.ctypes.data, 3333)])
    expected = peer.data.copy()
    expected[1001 : 1001 + 3333] = 77
    assert peer.memory() == expected.tobytes()


def test_every_engine_has_a_session_of_its_own_on_its_host(world: World, engine: TransferEngine) -> None:
    other = world.engine()
    assert other.session_id != engine.session_id
    assert other.session_id.startswith(f"{HOST}:")


def test_no_copies_are_no_call(engine: TransferEngine) -> None:
    engine.read("127.0.0.1:1", [])
    engine.write("127.0.0.1:1", [Copy(1, 1, 0)])


def test_a_copy_across_pieces_works_and_would_be_refused_uncut(
    engine: TransferEngine, start_peer: Callable[..., Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "REGISTER_PIECE_NBYTES", 100_000)
    peer = start_peer(100_000)
    ours = np.zeros(777_777, np.uint8)
    ranges = [(ours.ctypes.data, ours.nbytes)]
    engine.register(ranges)
    copy = Copy(ours.ctypes.data + 3, peer.address + 333, 777_000)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules[type(engine).__module__], "within_pieces", list)
            with pytest.raises(TransferFailed):
                engine.read(peer.session_id, [copy])
        engine.read(peer.session_id, [copy])
        assert (ours[3 : 3 + 777_000] == peer.data[333 : 333 + 777_000]).all()
    finally:
        engine.unregister(ranges)


# -- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "nbytes"), [(PEER_NBYTES - 100, 3333), (-4096, 33), (1 << 44, 33)], ids=["end", "before", "wild"]
)
def test_addresses_that_the_peer_did_not_open_are_refused(
    engine: TransferEngine, peer: Peer, memory: Any, start: int, nbytes: int
) -> None:
    ours = memory(3333)
    with pytest.raises(TransferFailed, match=peer.session_id) as failed:
        engine.read(peer.session_id, [Copy(ours.ctypes.data, peer.address + start, nbytes)])
    assert not failed.value.timed_out
    engine.read(peer.session_id, [Copy(ours.ctypes.data, peer.address, 3333)])  # and the session is none the worse
    assert (ours == peer.data[:3333]).all()


def test_one_refused_copy_fails_the_call_only_when_the_others_have_ended(
    engine: TransferEngine, peer: Peer, memory: Any
) -> None:
    ours = memory(777_777)
    copies = [Copy(ours.ctypes.data, 1 << 44, 33), Copy(ours.ctypes.data + 33, peer.address, 777_000)]
    with pytest.raises(TransferFailed, match="2 copies"):
        engine.read(peer.session_id, copies)
    assert (ours[33 : 33 + 777_000] == peer.data[:777_000]).all()


def test_a_stopped_peer_is_given_up_and_what_is_said_of_late_bytes_is_true(
    engine: TransferEngine, start_peer: Callable[..., Peer], memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MC_TRANSFER_TIMEOUT", "0.33")
    peer, ours = start_peer(), memory(777_777)
    engine.read(peer.session_id, [Copy(ours.ctypes.data, peer.address, 33)])
    peer.stop()
    with pytest.raises(TransferFailed) as failed:
        engine.read(peer.session_id, [Copy(ours.ctypes.data, peer.address, 777_000)])
    peer.wake()
    if failed.value.timed_out:  # they do come, and only then may the memory be let go
        wait_until(lambda: (ours[:777_000] == peer.data[:777_000]).all(), "the late bytes")
    else:  # its connections were cut: it serves again, and what was asked of it before does not come
        ours[:] = 0
        engine.read(peer.session_id, [Copy(ours.ctypes.data, peer.address, 333_333)])
        assert not ours[333_333:].any()


def test_nothing_late_reaches_an_engine_that_was_dropped(
    world: World, start_peer: Callable[..., Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MC_TRANSFER_TIMEOUT", "0.33")
    peer, engine, ours = start_peer(), world.engine(), np.zeros(777_777, np.uint8)
    engine.register([(ours.ctypes.data, ours.nbytes)])
    engine.read(peer.session_id, [Copy(ours.ctypes.data, peer.address, 33)])
    peer.stop()
    with pytest.raises(TransferFailed):
        engine.read(peer.session_id, [Copy(ours.ctypes.data, peer.address, 777_000)])
    ours[:] = 0
    del engine
    gc.collect()
    peer.wake()
    again = np.zeros(777_777, np.uint8)
    world.engine().read(peer.session_id, [Copy(again.ctypes.data, peer.address, 777_000)])
    assert (again[:777_000] == peer.data[:777_000]).all(), "it is awake, and has answered a later call"
    assert not ours.any()


def test_memory_that_its_owner_closed_is_neither_read_nor_written(
    engine: TransferEngine, start_peer: Callable[..., Peer], memory: Any
) -> None:
    peer, ours = start_peer(), memory(3333)
    ours[:] = 77
    engine.write(peer.session_id, [Copy(peer.address, ours.ctypes.data, 33)])
    before = peer.memory()
    peer.close_memory()
    with pytest.raises(TransferFailed):
        engine.write(peer.session_id, [Copy(peer.address, ours.ctypes.data, 3333)])
    with pytest.raises(TransferFailed):
        engine.read(peer.session_id, [Copy(ours.ctypes.data, peer.address, 3333)])
    assert peer.memory() == before
    assert (ours == 77).all()


def test_a_session_that_nobody_has_fails_the_transfer(engine: TransferEngine, memory: Any) -> None:
    ours = memory(3333)
    with pytest.raises(TransferFailed) as failed:
        engine.read(f"{HOST}:1", [Copy(ours.ctypes.data, 1 << 40, 33)])
    assert not failed.value.timed_out


def test_a_dead_peer_fails_the_transfer(engine: TransferEngine, start_peer: Callable[..., Peer], memory: Any) -> None:
    peer, ours = start_peer(), memory(3333)
    engine.read(peer.session_id, [Copy(ours.ctypes.data, peer.address, 3333)])
    peer.kill()
    with pytest.raises(TransferFailed, match="3,333 bytes"):
        engine.read(peer.session_id, [Copy(ours.ctypes.data, peer.address, 3333)])


def test_a_range_is_not_registered_twice_and_nothing_of_the_second_stays(engine: TransferEngine) -> None:
    buffer = mmap.mmap(-1, 40 * 4096)
    start = np.frombuffer(buffer, np.uint8).ctypes.data
    engine.register([(start + 20 * 4096, 8 * 4096)])
    with pytest.raises(EngineRefused, match="overlap"):
        engine.register([(start, 4 * 4096), (start + 20 * 4096, 8 * 4096)])
    engine.register([(start, 4 * 4096)])  # the first part of the refused call was closed again
    engine.unregister([(start, 4 * 4096), (start + 20 * 4096, 8 * 4096)])


def test_closing_what_is_not_open_is_refused(engine: TransferEngine) -> None:
    with pytest.raises(EngineRefused):
        engine.unregister([(0x7000_0000_0000, 4096)])
    engine.unregister([])


# -- whole batches -------------------------------------------------------------------------------------------


class Scattered:
    """A destination of blocks of 33 bytes, cut into single bytes or not, that touch nowhere."""

    def __init__(self, memory: Bytes, pieces: int) -> None:
        self._start = int(memory.ctypes.data)
        self._pieces = pieces

    def landings(self, wants: Sequence[Want], *, in_one_run: bool) -> Iterator[AbstractContextManager[Landing]]:
        size = 33 // self._pieces
        places = {
            want.row: tuple(
                Piece(self._start + 40 * want.row + (size + 1) * number, size * number, size)
                for number in range(self._pieces)
            )
            for want in wants
        }
        yield nullcontext(Landing(places, lambda taken, lost: taken))


@pytest.mark.parametrize("pieces", [1, 3])
def test_more_items_than_the_engine_takes_at_once_go_through_in_several_calls(
    engine: TransferEngine, peer: Peer, memory: Any, pieces: int
) -> None:
    ours = memory(3333 * 40 + 3)
    destination: Any = Scattered(ours, pieces)
    wants = tuple(Want(row, 33, None) for row in range(3333))
    addresses = tuple(peer.address + 77 * row for row in range(3333))
    assert Limits().items < 3333
    assert reading(engine, peer.session_id)(Batch("peer", wants, addresses, 3333 * 33), destination) == {}
    size = 33 // pieces
    for row in range(3333):
        for number in range(pieces):
            at = 40 * row + (size + 1) * number
            assert (ours[at : at + size] == peer.data[77 * row + size * number : 77 * row + size * (number + 1)]).all()

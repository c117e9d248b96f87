"""Two real Mooncake engines in two processes, over loopback."""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.processes import pause, wait_until
from transfer import engine as engine_module
from transfer.engine import ITEMS_PER_BATCH_MAX, Copy, MooncakeEngine, pieces, set_defaults, within_pieces
from transfer.errors import EngineMissing, EngineRefused, TransferFailed
from transfer.plan import Batch, Limits, Offer, Piece, Want, plan
from transfer.sources import PeerSource

ROOT = Path(__file__).parents[2]
PEER_NBYTES = 1_333_333

# A process with an engine and a buffer of random bytes, registered in pieces of argv[1] bytes.
PEER = """
    import json, sys
    import numpy as np
    from transfer import engine
    engine.REGISTER_PIECE_NBYTES = int(sys.argv[1])
    data = np.random.default_rng(33).integers(0, 256, int(sys.argv[2]), np.uint8)
    ours = engine.MooncakeEngine("127.0.0.1")
    ours.register([(data.ctypes.data, data.nbytes)])
    print(json.dumps({"session": ours.session_id, "address": data.ctypes.data}), flush=True)
    for line in sys.stdin:
        print(json.dumps({"bytes": data.tobytes().hex()}), flush=True)
"""


class Peer:
    """The other process. `data` is what its buffer held at the start."""

    def __init__(self, piece_nbytes: int = engine_module.REGISTER_PIECE_NBYTES) -> None:
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
        line = self.process.stdout.readline()
        return dict(json.loads(line))

    def memory(self) -> bytes:
        """What its buffer holds now."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return bytes.fromhex(self._line()["bytes"])

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def engine() -> MooncakeEngine:
    return MooncakeEngine("127.0.0.1")


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    started = Peer()
    yield started
    started.kill()


@pytest.fixture
def start_peer() -> Iterator[Callable[[int], Peer]]:
    started: list[Peer] = []

    def start(piece_nbytes: int = engine_module.REGISTER_PIECE_NBYTES) -> Peer:
        started.append(Peer(piece_nbytes))
        return started[-1]

    yield start
    for each in started:
        each.kill()


@pytest.fixture
def memory(engine: MooncakeEngine) -> Iterator[Callable[..., np.ndarray[Any, np.dtype[np.uint8]]]]:
    """`memory(nbytes)` is an array of zeros that the engine may write to while the test runs."""
    opened: list[np.ndarray[Any, np.dtype[np.uint8]]] = []

    def allocate(nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        array = np.zeros(nbytes, np.uint8)
        engine.register([(array.ctypes.data, nbytes)])
        opened.append(array)
        return array

    yield allocate
    for array in opened:
        engine.unregister([(array.ctypes.data, array.nbytes)])


def test_reading_brings_exactly_the_bytes_asked_for(engine: MooncakeEngine, peer: Peer, memory: Any) -> None:
    ours = memory(7777)
    engine.read(
        peer.session_id,
        [Copy(ours.ctypes.data + 11, peer.address + 333, 3333), Copy(ours.ctypes.data + 5555, peer.address + 1, 7)],
    )
    expected = np.zeros(7777, np.uint8)
    expected[11 : 11 + 3333] = peer.data[333 : 333 + 3333]
    expected[5555:5562] = peer.data[1:8]
    assert (ours == expected).all()


def test_writing_puts_the_bytes_into_the_peer_and_nowhere_else(engine: MooncakeEngine, memory: Any) -> None:
    peer = Peer()
    try:
        ours = memory(3333)
        ours[:] = 77
        engine.write(peer.session_id, [Copy(peer.address + 1001, ours.ctypes.data, 3333)])
        expected = peer.data.copy()
        expected[1001 : 1001 + 3333] = 77
        assert peer.memory() == expected.tobytes()
    finally:
        peer.kill()


def test_no_copies_are_no_call(engine: MooncakeEngine) -> None:
    engine.read("127.0.0.1:1", [])
    engine.write("127.0.0.1:1", [Copy(1, 1, 0)])


# -- pieces --------------------------------------------------------------------------------------------------


def test_registration_is_cut_at_absolute_multiples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "REGISTER_PIECE_NBYTES", 1000)
    assert pieces([(2500, 2100), (7000, 1000), (9999, 2)]) == [
        (2500, 500), (3000, 1000), (4000, 600), (7000, 1000), (9999, 1), (10_000, 1),
    ]  # fmt: skip
    assert pieces([(3333, 0)]) == []


def test_copies_are_cut_where_either_side_has_a_border(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "REGISTER_PIECE_NBYTES", 1000)
    assert within_pieces([Copy(900, 5300, 1000), Copy(0, 0, 10)]) == [
        Copy(900, 5300, 100), Copy(1000, 5400, 600), Copy(1600, 6000, 300), Copy(0, 0, 10),
    ]  # fmt: skip


def test_a_copy_across_pieces_works_and_would_be_refused_uncut(
    engine: MooncakeEngine, start_peer: Callable[[int], Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "REGISTER_PIECE_NBYTES", 100_000)
    peer = start_peer(100_000)
    ours = np.zeros(777_777, np.uint8)
    ranges = [(ours.ctypes.data, ours.nbytes)]
    engine.register(ranges)
    copy = Copy(ours.ctypes.data + 3, peer.address + 333, 777_000)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(engine_module, "within_pieces", list)
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
    engine: MooncakeEngine, peer: Peer, memory: Any, start: int, nbytes: int
) -> None:
    ours = memory(3333)
    with pytest.raises(TransferFailed, match=peer.session_id) as failed:
        engine.read(peer.session_id, [Copy(ours.ctypes.data, peer.address + start, nbytes)])
    assert not failed.value.timed_out
    engine.read(peer.session_id, [Copy(ours.ctypes.data, peer.address, 3333)])  # and the session is none the worse
    assert (ours == peer.data[:3333]).all()


def test_one_refused_copy_fails_the_call_only_when_the_others_have_ended(
    engine: MooncakeEngine, peer: Peer, memory: Any
) -> None:
    ours = memory(777_777)
    copies = [Copy(ours.ctypes.data, 1 << 44, 33), Copy(ours.ctypes.data + 33, peer.address, 777_000)]
    with pytest.raises(TransferFailed, match="2 copies"):
        engine.read(peer.session_id, copies)
    assert (ours[33 : 33 + 777_000] == peer.data[:777_000]).all()


def test_a_stopped_peer_is_given_up_and_said_to_be_late(
    engine: MooncakeEngine, start_peer: Callable[[], Peer], memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MC_TRANSFER_TIMEOUT", "0.33")
    peer, ours = start_peer(), memory(777_777)
    engine.read(peer.session_id, [Copy(ours.ctypes.data, peer.address, 33)])
    pause(peer.process.pid)
    with pytest.raises(TransferFailed) as failed:
        engine.read(peer.session_id, [Copy(ours.ctypes.data, peer.address, 777_000)])
    assert failed.value.timed_out
    peer.process.send_signal(signal.SIGCONT)  # the late bytes do come, and only then may the memory be let go
    wait_until(lambda: (ours[:777_000] == peer.data[:777_000]).all(), "the late bytes")


def test_a_dead_peer_fails_the_transfer(engine: MooncakeEngine, start_peer: Callable[[], Peer], memory: Any) -> None:
    peer, ours = start_peer(), memory(3333)
    engine.read(peer.session_id, [Copy(ours.ctypes.data, peer.address, 3333)])
    peer.kill()
    with pytest.raises(TransferFailed, match="3,333 bytes"):
        engine.read(peer.session_id, [Copy(ours.ctypes.data, peer.address, 3333)])


def test_a_range_is_not_registered_twice_and_nothing_of_the_second_stays(engine: MooncakeEngine) -> None:
    buffer = mmap.mmap(-1, 40 * 4096)
    start = np.frombuffer(buffer, np.uint8).ctypes.data
    engine.register([(start + 20 * 4096, 8 * 4096)])
    with pytest.raises(EngineRefused, match="overlap"):
        engine.register([(start, 4 * 4096), (start + 20 * 4096, 8 * 4096)])
    engine.register([(start, 4 * 4096)])  # the first part of the refused call was closed again
    engine.unregister([(start, 4 * 4096), (start + 20 * 4096, 8 * 4096)])


def test_closing_what_is_not_open_is_refused(engine: MooncakeEngine) -> None:
    with pytest.raises(EngineRefused):
        engine.unregister([(0x7000_0000_0000, 4096)])
    engine.unregister([])


class Failing:
    """Mooncake as it answers when it fails in ways that loopback cannot show: it will not start, or gives up late."""

    TransferEngine = property(lambda self: lambda: self)

    def initialize(self, *_: object) -> int:
        return -7

    def get_rpc_port(self) -> int:
        return 15_333

    def __init__(self, status: int = -1) -> None:
        self._status = status

    def batch_transfer_async_read(self, *_: object) -> int:
        return 33

    def transfer_check_status(self, batch: int) -> int:
        return self._status


def test_an_engine_that_does_not_start_says_where_to_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "_mooncake", Failing)
    with pytest.raises(EngineRefused, match=r"192\.0\.2\.33 over rdma \(code -7\)"):
        MooncakeEngine("192.0.2.33", "rdma")


@pytest.mark.parametrize(
    ("status", "timed_out"), [(0, True), (-2, True), (-1, False)], ids=["under way", "given up", "failed"]
)
def test_a_copy_that_has_not_ended_in_time_warns_of_late_bytes(
    monkeypatch: pytest.MonkeyPatch, status: int, timed_out: bool
) -> None:
    monkeypatch.setenv("MC_TRANSFER_TIMEOUT", "0.033")
    with pytest.raises(TransferFailed) as failed:
        MooncakeEngine.wrap(Failing(status), "127.0.0.1").read("127.0.0.1:33", [Copy(1, 1, 33)])
    assert failed.value.timed_out is timed_out


def test_what_the_user_set_in_the_environment_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"MC_TRANSFER_TIMEOUT": "33"})
    set_defaults("rdma")
    assert os.environ["MC_TRANSFER_TIMEOUT"] == "33"
    assert "MC_FORCE_TCP" not in os.environ
    set_defaults("tcp")
    assert os.environ["MC_FORCE_TCP"] == "1"


# -- through the planner -------------------------------------------------------------------------------------


def scattered(count: int, destination: int, source: int) -> list[tuple[Want, Offer]]:
    """Blocks of 33 bytes that touch nowhere."""
    return [
        (Want(row, 33, (Piece(destination + 40 * row, 0, 33),), None), Offer("peer", source + 77 * row))
        for row in range(count)
    ]


def test_more_items_than_the_engine_takes_at_once_go_through_in_batches(
    engine: MooncakeEngine, peer: Peer, memory: Any
) -> None:
    ours = memory(3333 * 40)
    work = scattered(3333, ours.ctypes.data, peer.address)
    planned = plan([want for want, _ in work], {want.row: [offer] for want, offer in work}, {})
    source = PeerSource("peer", peer.session_id, engine)
    assert len(planned.batches["peer"]) == -(-3333 // ITEMS_PER_BATCH_MAX)
    for batch in planned.batches["peer"]:
        assert source.fetch(batch) == {}
    for row in range(3333):
        assert (ours[40 * row : 40 * row + 33] == peer.data[77 * row : 77 * row + 33]).all()


def test_a_block_of_more_items_than_a_call_takes_is_sent_in_several(
    engine: MooncakeEngine, peer: Peer, memory: Any
) -> None:
    ours = memory(3333 * 40)
    copies = tuple(Copy(ours.ctypes.data + 40 * i, peer.address + 77 * i, 33) for i in range(3333))
    PeerSource("peer", peer.session_id, engine).fetch(Batch("peer", (), copies, 3333 * 33))
    for i in range(3333):
        assert (ours[40 * i : 40 * i + 33] == peer.data[77 * i : 77 * i + 33]).all()
    assert Limits().items < 3333


# -- without Mooncake ----------------------------------------------------------------------------------------


def without(statement: str) -> str:
    """What a fresh process says of an engine after `statement`."""
    script = f"""
import sys
{statement}
from transfer.engine import MooncakeEngine
try:
    MooncakeEngine("127.0.0.1")
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_missing_wheel_says_what_to_install() -> None:
    hide = """
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mooncake":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
"""
    said = without(hide)
    assert said.startswith(EngineMissing.__name__)
    assert "hotspare[cpu]" in said
    assert "[cuda12]" in said


def test_a_wheel_that_does_not_load_says_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "mooncake").mkdir()
    (tmp_path / "mooncake" / "__init__.py").touch()
    (tmp_path / "mooncake" / "engine.py").write_text("raise ImportError('libcudart.so.12: cannot open')\n")
    said = without(f"sys.path.insert(0, {str(tmp_path)!r})")
    assert said.startswith(EngineMissing.__name__)
    assert "libcudart.so.12" in said
    assert "libibverbs1" in said

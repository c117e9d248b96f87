"""What is Mooncake's own: how it starts, what it answers, what it lacks. What every engine does: test_conformance."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.processes import pause
from transfer.engine import Copy, MooncakeEngine, Watch
from transfer.engine import mooncake as mooncake_module
from transfer.engine.connections import connections, hang_up
from transfer.engine.handshake import data_address
from transfer.errors import EngineMissing, EngineRefused, TransferFailed

ROOT = Path(__file__).parents[3]


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

    def batch_transfer_sync_read(self, *_: object) -> int:
        return 0

    def transfer_check_status(self, batch: int) -> int:
        return self._status


def test_an_engine_that_does_not_start_says_where_to_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mooncake_module, "_mooncake", Failing)
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


# -- peers that say nothing ----------------------------------------------------------------------------------

PEER = """
import sys
import numpy as np
from transfer.engine import MooncakeEngine
memory = np.random.default_rng(3).integers(0, 256, int(sys.argv[1]), np.uint8)
engine = MooncakeEngine("127.0.0.1")
engine.register([(memory.ctypes.data, memory.nbytes)])
print("peer", engine.session_id, memory.ctypes.data, flush=True)
sys.stdin.readline()
"""
NBYTES = 33 << 20  # more than sockets hold between two processes
CUT_S_MAX = 8.0  # seconds; it takes three, and Mooncake itself a minute


class Peer:
    """A process that gives its memory, and a place of ours for it."""

    def __init__(self, child: Any) -> None:
        self.child = child
        self.session_id, address = child.expect("peer").split()
        self.address = int(address)
        self.right = np.random.default_rng(3).integers(0, 256, NBYTES, np.uint8)
        self.place = np.zeros(NBYTES, np.uint8)
        self.engine = MooncakeEngine("127.0.0.1")

    def copies(self, count: int = 11) -> list[Copy]:
        step = NBYTES // count
        start = int(self.place.ctypes.data)
        return [Copy(start + at, self.address + at, step) for at in range(0, NBYTES, step)]

    def read(self, watch: Watch | None = None) -> None:
        self.place[:] = 0
        self.engine.read(self.session_id, self.copies(), watch)
        assert np.array_equal(self.place, self.right)

    def cut_connections(self) -> int:
        """As a firewall does that sends resets."""
        where = data_address(self.session_id, 30)
        ours = [each for each in connections() if (each.host, each.port) == where]
        for each in ours:
            hang_up(each)
        return len(ours)


@pytest.fixture
def peer(python: Callable[..., Any]) -> Peer:
    return Peer(python(PEER, str(NBYTES)))


def failure(do: Callable[[], object]) -> tuple[TransferFailed, float]:
    started = time.monotonic()
    with pytest.raises(TransferFailed) as failed:
        do()
    return failed.value, time.monotonic() - started


def test_a_session_that_accepts_and_never_speaks_is_left_within_seconds_and_others_go_on(peer: Peer) -> None:
    peer.read()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        session = f"127.0.0.1:{silent.getsockname()[1]}"
        error, took_s = failure(lambda: peer.engine.read(session, peer.copies()))
        assert "did not answer" in str(error)
        assert not error.timed_out, "nothing was asked of it, so nothing arrives"
        assert took_s < CUT_S_MAX
    peer.read()


def test_connections_that_were_cut_while_idle_cost_no_transfer(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mooncake_module, "FRESH_S", 0.0)  # they need not be idle for long here
    for _ in range(3):
        peer.read()
        assert peer.cut_connections() > 1, "this test needs a pool of them"
    peer.read()


def test_a_peer_that_stopped_between_two_transfers_is_left_within_seconds_and_sends_nothing_later(
    peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mooncake_module, "FRESH_S", 0.0)
    peer.read()
    pause(peer.child.pid)
    peer.place[:] = 0
    error, took_s = failure(lambda: peer.engine.read(peer.session_id, peer.copies()))
    assert not error.timed_out
    assert took_s < CUT_S_MAX
    os.kill(peer.child.pid, signal.SIGCONT)
    peer.read()


def test_a_transfer_that_is_recalled_ends_at_once_and_nothing_of_it_arrives_when_its_peer_wakes(peer: Peer) -> None:
    """The engine is neither dropped nor held up; the memory is another's right after."""
    peer.read()
    pause(peer.child.pid)
    peer.engine._line(peer.session_id).answered_at = math.inf  # it stops between the knock and the transfer
    watch, failed = Watch(), []
    waiting = threading.Thread(target=lambda: failed.append(failure(lambda: peer.read(watch))))
    waiting.start()
    assert not failed
    watch.is_recalled = True
    waiting.join(30)
    ((error, _),) = failed
    assert "was recalled" in str(error)
    assert not error.timed_out
    lost = [copy for number, copy in enumerate(peer.copies()) if number in error.lost]
    assert lost
    assert watch.arrived_nbytes == NBYTES - sum(copy.nbytes for copy in lost)
    peer.place[:] = 0xA5
    os.kill(peer.child.pid, signal.SIGCONT)
    other = MooncakeEngine("127.0.0.1")
    elsewhere = np.zeros(NBYTES, np.uint8)
    other.read(peer.session_id, [Copy(int(elsewhere.ctypes.data), peer.address, NBYTES)])  # it is awake, and serves
    assert (peer.place == 0xA5).all()
    peer.engine._line(peer.session_id).answered_at = -math.inf
    peer.read()


def test_a_peer_that_stops_in_the_middle_is_given_up_with_nothing_outstanding(
    peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MC_TRANSFER_TIMEOUT", "5")
    peer.read()
    pause(peer.child.pid)
    peer.engine._line(peer.session_id).answered_at = math.inf
    error, _ = failure(peer.read)
    assert not error.timed_out
    assert error.lost


def test_one_copy_from_a_wrong_address_costs_no_other(peer: Peer) -> None:
    peer.place[:] = 0
    copies = peer.copies()
    copies[5] = copies[5]._replace(source=peer.address + (1 << 40))
    error, _ = failure(lambda: peer.engine.read(peer.session_id, copies))
    assert error.lost == {5}
    assert not error.timed_out
    step = copies[0].nbytes
    assert np.array_equal(
        np.delete(peer.place, np.s_[5 * step : 6 * step]), np.delete(peer.right, np.s_[5 * step : 6 * step])
    )


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

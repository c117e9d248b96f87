"""A short run of each campaign, from a fixed seed: nothing is found wrong, something was compared, nothing is left.

`make soak SEED=… MINUTES=…` runs them for as long as it is told.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from shm.layout import SHM_DIRECTORY
from tests.processes import DEADLINE_S, ROOT
from tests.soak import campaigns
from tests.soak.campaigns import run_campaign
from tests.soak.ground import Ground, Traced
from tests.soak.images import expected_blocks, flip, look
from tests.soak.slow_link import slow_link, why_not
from tests.soak.tally import Tally

SEED = 3333
ROUND_S = 6.0


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    with Ground() as made:
        yield made
    assert not made.directory.exists()


slow = pytest.param("slow", marks=pytest.mark.skipif(bool(reason := why_not()), reason=reason))


@pytest.mark.parametrize("name", ["pauses", "given-back", slow, "flips", "contents", "kills", "hostile", "objects"])
def test_a_short_campaign_finds_nothing_wrong(ground: Ground, name: str) -> None:
    tally = run_campaign(ground, name, SEED, round_s=ROUND_S)
    assert tally.violations == []
    assert sum(tally.compared.values()) > 100


def test_a_violation_says_how_to_see_it_again(
    ground: Ground, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def campaign(ground: Ground, chance: random.Random, tally: Tally, seconds: float, keep: Path | None) -> None:
        tally.note(f"draws {chance.random()}")
        raise AssertionError("a byte\nis wrong")

    monkeypatch.setattr(campaigns, "CAMPAIGNS", {"some": campaign})
    draws = []
    for only in (None, 7, 7):
        tally = run_campaign(ground, "some", SEED, only=only)
        (violation,) = tally.violations
        assert "AssertionError: a byte is wrong" in violation
        assert f"make soak CAMPAIGNS=some SEED={SEED} ROUND={only or 0}" in violation
        draws.append(capsys.readouterr().out.partition("draws ")[2].split()[0])
    assert draws[0] != draws[1] == draws[2], "a round depends on its number, and not on those before it"


def test_wrong_bytes_in_a_segment_are_seen(ground: Ground) -> None:
    """What the campaigns look with sees one byte among millions."""
    checkpoint = ground.checkpoint(1)
    expected = expected_blocks(checkpoint)
    with ground.field() as field:
        field.serve("n0", (), checkpoint=checkpoint).wait_ready().kill()
        here = look(field.namespace, "n0")
        assert here is not None
        assert (here.published(), here.wrong(expected)) == (list(range(39)), [])
        offset, nbytes = here.place(33)
        flip(field.namespace, "n0", 8 * (offset + nbytes) - 1)
        assert here.wrong(expected) == [33]
        namespace = field.namespace
    assert not [name for name in os.listdir(SHM_DIRECTORY) if namespace in name]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing(
    number: signal.Signals, tmp_path: Path, wait_until: Callable[..., object]
) -> None:
    """No process, no segment, no file."""
    command = [sys.executable, "-m", "tests.soak", "pauses", "--seed", "3"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    running = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, start_new_session=True)
    mark = f"hotspare.soak{running.pid}x"

    def segments() -> list[str]:
        return [name for name in os.listdir(SHM_DIRECTORY) if name.startswith(mark)]

    wait_until(lambda: len(segments()) == 3, "its nodes have segments")
    running.send_signal(number)
    out, _ = running.communicate(timeout=DEADLINE_S)
    assert running.returncode == 130
    assert out.startswith(b"pauses: seed 3")
    assert segments() == []
    assert list(tmp_path.iterdir()) == []
    wait_until(lambda: not _session(running.pid), "its processes have ended")


def _session(leader: int) -> list[int]:
    """Processes of a session."""

    def session_of(pid: int) -> int | None:
        with suppress(ProcessLookupError):
            return os.getsid(pid)
        return None

    return [pid for pid in psutil.pids() if session_of(pid) == leader]


def test_the_end_of_a_round_kills_what_is_paused(ground: Ground) -> None:
    with ground.field() as field:
        daemon = field.serve("n0", (), checkpoint=ground.checkpoint(1)).wait_ready()
        daemon.pause()
    assert daemon.process.poll() == -signal.SIGKILL


@pytest.mark.skipif(bool(reason), reason=reason)
def test_a_slow_link_is_one_and_its_network_is_left_again() -> None:
    """What is sent from inside shares the rate; whoever was inside is outside again, where nothing has changed."""
    outside = os.readlink("/proc/thread-self/ns/net")
    with slow_link() as link:
        assert os.readlink("/proc/thread-self/ns/net") == os.readlink(link.path) != outside
        took_s = []
        for rate in (1, 8):
            link.slow_down(rate)
            took_s.append(_seconds_to_send(300_000))
        link.free()
    assert took_s[1] < took_s[0] / 2
    assert os.readlink("/proc/thread-self/ns/net") == outside


def _seconds_to_send(nbytes: int) -> float:
    """Over loopback, until all has arrived."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        sender = socket.create_connection(server.getsockname())
        receiver, _ = server.accept()
    started_s = time.monotonic()
    with sender, receiver:
        sending = threading.Thread(target=sender.sendall, args=[bytes(nbytes)])
        sending.start()
        while nbytes:
            nbytes -= len(receiver.recv(nbytes))
        sending.join()
    return time.monotonic() - started_s


@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
@pytest.mark.parametrize("number", [3, 33333])
def test_a_process_is_killed_at_the_system_call_that_it_was_told(number: int) -> None:
    traced = Traced("openat", number)
    with open(os.devnull, "r+b") as nothing:
        process = traced.fork(["-c", "pass"], [nothing.fileno()] * 3, dict(os.environ))
    assert process.wait(DEADLINE_S) == (-signal.SIGKILL if number == 3 else 0)

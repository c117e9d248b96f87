"""The process of `hotspare serve`: what it says, how it stops, and what keeps it from starting."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from app.cli.daemon import DESCRIPTORS_MAX
from shm.layout import SegmentName
from tests.processes import DEADLINE_S, ROOT, Child, start_anew

Hotspare = Callable[..., subprocess.CompletedProcess[str]]
Start = Callable[..., Child]
Options = Callable[..., list[str]]
Objects = Callable[[], list[str]]
StartBehind = Callable[[Sequence[str], Sequence[str]], Child]


@pytest.fixture
def start_behind(children: list[Child]) -> StartBehind:
    """`start_behind(["nohup"], options)` → a `hotspare serve` that another command starts; killed at the end."""

    def start(prefix: Sequence[str], options: Sequence[str]) -> Child:
        command = [*prefix, sys.executable, "-m", "app.cli", "serve", *options]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        children.append(Child(lambda to: start_anew(command, to, env=environment, cwd="/")))
        return children[-1]

    return start


def _listening_at(pid: int) -> str:
    """The URL that the process listens at on loopback."""
    (at,) = (
        c.laddr for c in psutil.Process(pid).net_connections() if c.status == "LISTEN" and c.laddr.ip == "127.0.0.1"
    )
    return f"http://127.0.0.1:{at.port}"


def test_it_fills_announces_and_stops_cleanly_and_the_next_one_adopts(
    start: Start, options: Options, hotspare: Hotspare, namespace: str, model: str
) -> None:
    first = start(options(), anew=True)
    announced = first.expect("node-a of")
    assert "/docs" in announced
    assert SegmentName(namespace, model, "node-a").object_name in announced
    assert "from disk" in first.expect("node-a is ready after")
    status, said, chatter = first.stop()
    assert (status, said.strip(), chatter) == (0, "node-a stopped", ""), "no chatter, of ours or the engine's"
    second = start(options(), anew=True)
    assert "14 blocks, adopted" in second.expect("node-a is ready after")
    assert second.stop(signal.SIGINT)[0] == 0
    assert hotspare("verify", "--namespace", namespace).returncode == 0


def test_debug_shows_what_the_engine_says(start: Start, options: Options) -> None:
    daemon = start([*options(), "--log-level", "debug"])
    daemon.expect("node-a is ready after")
    status, _, said = daemon.stop()
    assert status == 0
    assert "transfer_metadata" in said


def test_a_node_told_to_wait_leaves_no_unsealed_segment_when_it_stops(
    start: Start, options: Options, objects: Objects
) -> None:
    daemon = start([*options(), "--fill", "none"])
    assert "waiting" in daemon.expect("node-a of")
    assert objects()
    assert daemon.stop()[0] == 0
    assert objects() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_node_that_is_told_to_stop_while_it_opens_leaves_nothing(
    start: Start, options: Options, objects: Objects, wait_until: Callable[..., Any], number: int
) -> None:
    daemon = start([*options(), "--fill", "none"], anew=number == signal.SIGTERM)
    wait_until(objects, "its segment is there")
    assert daemon.stop(number)[0] == 0
    assert objects() == []


def test_a_hangup_that_nohup_ignores_stays_ignored(
    start_behind: StartBehind, options: Options, hotspare: Hotspare, namespace: str
) -> None:
    daemon = start_behind(["nohup"], options())
    daemon.expect("node-a is ready after")
    os.kill(daemon.pid, signal.SIGHUP)
    assert hotspare("status", "--url", _listening_at(daemon.pid)).returncode == 0, "it serves after that"
    status, said, chatter = daemon.stop()
    assert (status, said.strip()) == (0, "node-a stopped")
    assert "Traceback" not in chatter


@pytest.mark.parametrize(
    "redirection", [">&-", ">/dev/full", "2>&-", "2>/dev/full", "<&- >&- 2>&-", ">/dev/full 2>&1", "| true"]
)
def test_what_it_cannot_say_does_not_end_it(
    start_behind: StartBehind,
    options: Options,
    hotspare: Hotspare,
    free_port: Callable[[], int],
    wait_until: Callable[..., Any],
    namespace: str,
    redirection: str,
) -> None:
    port = free_port()
    behind = ["sh", "-c", f'"$@" {redirection} & wait $!; exec 2>&1; echo it ended with $?', "sh"]
    shell = start_behind(
        behind, [*options(port), "--peer", f"node-b=http://127.0.0.1:{free_port()}", "--replicas", "1"]
    )
    url = f"http://127.0.0.1:{port}"
    wait_until(lambda: hotspare("status", "--url", url).returncode == 0, "it answers")
    (info,) = [json.loads(hotspare("ls", "--namespace", namespace, "--json").stdout)["segments"]][0]
    standard = [os.readlink(f"/proc/{info['owner_pid']}/fd/{number}") for number in range(3)]
    assert not [each for each in standard if each.startswith(("socket:", "/dev/shm"))], standard
    wait_until(lambda: httpx.get(f"{url}/readyz", trust_env=False).status_code == 200, "it is ready")
    os.kill(info["owner_pid"], signal.SIGTERM)
    _, said, errors = shell.wait()
    assert "Traceback" not in errors
    assert "Exception" not in errors
    assert "it ended with 0" in said
    assert hotspare("verify", "--namespace", namespace).returncode == 0


def test_a_start_that_fails_does_not_wait_for_the_end_of_the_engine(options: Options, tmp_path: Path) -> None:
    """That takes 1.2 s, nearly twice as long as the start; without it, a hundredth."""
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 33)
    command = [sys.executable, "-m", "app.cli", "serve", *options(directory=tmp_path)]
    started_s = time.monotonic()
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, cwd=ROOT) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith(b"hotspare: ")
        said_s = time.monotonic()
        assert process.wait(DEADLINE_S) == 1
        assert process.stderr.read() == b""
    assert time.monotonic() - said_s < (said_s - started_s) / 2


def test_a_port_in_use_is_said_and_nothing_is_left(hotspare: Hotspare, options: Options, objects: Objects) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = hotspare("serve", *options(port))
    assert done.returncode == 1
    assert f"127.0.0.1:{port} is in use" in done.stderr
    assert objects() == []


def test_an_address_of_another_host_is_said(hotspare: Hotspare, options: Options) -> None:
    done = hotspare("serve", *options(), "--listen", "192.0.2.7:8470", "--insecure")
    assert done.returncode == 1
    assert "not an address of this host" in done.stderr


def test_a_host_without_an_address_is_said(hotspare: Hotspare, options: Options) -> None:
    done = hotspare("serve", *options(), "--listen", "nowhere.invalid:8470", "--insecure")
    assert done.returncode == 1
    assert "nowhere.invalid has no address here" in done.stderr


def test_a_second_daemon_of_one_segment_is_refused_by_name_and_pid(
    start: Start, options: Options, hotspare: Hotspare, model: str
) -> None:
    first = start(options())
    first.expect("node-a is ready after")
    done = hotspare("serve", *options())
    assert done.returncode == 1
    assert str(first.pid) in done.stderr
    assert model in done.stderr
    assert "Traceback" not in done.stderr
    assert first.stop()[0] == 0


def test_a_checkpoint_that_cannot_be_used_is_said_and_nothing_is_left(
    hotspare: Hotspare, options: Options, objects: Objects, tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 33)
    for directory in (tmp_path, tmp_path / "missing"):
        done = hotspare("serve", *options(directory=directory))
        assert done.returncode == 1
        assert str(directory) in done.stderr
        assert "Traceback" not in done.stderr
    assert objects() == []


@pytest.mark.parametrize("token", ["s3cret\nX-Injected: 1", "s3cr\u00e9t", "s3cret" * 200])
def test_a_token_that_no_header_can_carry_is_refused_and_not_printed(
    hotspare: Hotspare, options: Options, objects: Objects, token: str
) -> None:
    for command, given, variables in (
        (["serve", *options()], ["--token", token], {}),
        (["serve", *options()], [], {"HOTSPARE_TOKEN": token}),
        (["status"], [], {"HOTSPARE_TOKEN": token}),
        (["restore", "--node", "n"], ["--token", token], {}),
    ):
        done = hotspare(*command, *given, **variables)
        assert done.returncode != 0
        assert "visible ASCII" in " ".join((done.stdout + done.stderr).split())
        assert "s3cr" not in done.stdout + done.stderr
    assert objects() == []


def test_a_node_has_as_many_descriptors_as_the_host_allows(start: Start, options: Options) -> None:
    daemon = start([*options(), "--fill", "none"])
    daemon.expect("node-a of")
    soft, hard = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
    assert soft in (hard, DESCRIPTORS_MAX)
    assert daemon.stop()[0] == 0

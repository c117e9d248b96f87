"""The command line, as processes on real segments and real nodes."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.cli.main import main
from app.documents import RestoreRequest
from shm import attach
from shm.checksum import checksum
from shm.layout import SegmentName, SegmentState
from shm.lookup import object_names
from shm.segment import Segment
from transfer import Restorer
from transfer.checkpoint import read_checkpoint
from transfer.checkpoint.reader import BlockReader
from transfer.checkpoint.synth import write_checkpoint
from transfer.slots import Slots

DEADLINE_S = 20
MODEL = "org/cli-model"
ROOT = Path(__file__).parents[3]


def environment(**variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HOTSPARE_")}
    return kept | {"PYTHONPATH": str(ROOT)} | variables


def hotspare(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "app.cli", *arguments],
        capture_output=True, text=True, timeout=DEADLINE_S, env=environment(**variables), cwd="/", check=False,
    )  # fmt: skip


class Daemon:
    """A `hotspare serve` process, its output in files."""

    def __init__(self, directory: Path, arguments: Sequence[str]) -> None:
        self.out, self.err = directory / "out", directory / "err"
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "app.cli", "serve", *arguments],
                stdout=out,
                stderr=err,
                env=environment(),
                cwd="/",
            )

    def wait_for(self, text: str) -> str:
        deadline = time.monotonic() + DEADLINE_S
        while text not in self.out.read_text():
            assert self.process.poll() is None, self.err.read_text()
            assert time.monotonic() < deadline, self.out.read_text() + self.err.read_text()
            time.sleep(0.01)
        return self.out.read_text()

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(DEADLINE_S)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cli") / "checkpoint"
    write_checkpoint(directory, "deepseek-v3", layers=5, experts=7, scale=0.03125, seed=3)
    return directory


@pytest.fixture
def namespace() -> Iterator[str]:
    name = f"test-cli-{secrets.token_hex(4)}"
    yield name
    left = [each for each in object_names() if f".{name}." in each]
    for each in left:
        os.unlink(f"/dev/shm/{each}")


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def options(checkpoint: Path, namespace: str, port: int = 0, node: str = "node-a") -> list[str]:
    return [
        "--model", MODEL, "--checkpoint", str(checkpoint), "--namespace", namespace, "--node-id", node,
        "--listen", f"127.0.0.1:{port}",
    ]  # fmt: skip


@contextmanager
def serving(tmp_path: Path, arguments: Sequence[str]) -> Iterator[Daemon]:
    tmp_path.mkdir(exist_ok=True)
    daemon = Daemon(tmp_path, arguments)
    try:
        yield daemon
    finally:
        if daemon.process.poll() is None:
            daemon.process.kill()
            daemon.process.wait()


def make_segment(checkpoint: Path, namespace: str, node: str = "node-a", *, seal: bool = True) -> Segment:
    """A segment filled from the checkpoint, still owned by this process."""
    opened = read_checkpoint(checkpoint, MODEL)
    segment = Segment.claim(SegmentName(namespace, MODEL, node))
    rows = range(len(opened.manifest))
    segment.allocate(opened.manifest, rows)
    disk = BlockReader(opened)
    for row in rows:
        segment.publish(row, disk.read_block(row, segment.block(row)))
        assert segment.checksum(row) == checksum(segment.block(row))
    disk.close()
    if seal:
        segment.seal()
    return segment


# -- usage and errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing"],
        ["serve", "--replicas", "many"],
        ["serve"],
        ["serve", "--model", "m", "--fill", "sideways"],
        ["serve", "--model", "m", "--listen", "nowhere"],
        ["serve", "--model", "m", "--listen", "0.0.0.0:0"],
        ["serve", "--model", "m", "--replicas", "3"],
        ["serve", "--model", "x" * 300],
        ["serve", "--model", "m", "--log-level", "loud"],
        ["serve", "--model", "m", "--config", "/does/not/exist.toml"],
        ["restore"],
        ["restore", "--node", "a", "--consumer", "b"],
        ["restore", "--node", "a", "--source", "tape"],
        ["restore", "--node", "a", "--read-back"],
        ["restore", "--node", "a", "--layer", "-1"],
        ["restore", "--node", "a", "--url", "not a url"],
        ["status", "--url", "ftp://a"],
        ["rm"],
        ["rm", "--all", "model"],
        ["synth", "/tmp/never-made"],
        ["synth", "/tmp/never-made", "--like", "no-such-model"],
        ["synth", "/tmp/never-made", "--like", "deepseek-v3", "--scale", "2"],
        ["demo", "--size-gib", "0"],
    ],
)
def test_wrong_use_is_a_line_on_stderr_and_exit_code_2(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["hotspare", *arguments])
    with pytest.raises(SystemExit) as exited:
        main()
    said = capsys.readouterr()
    assert exited.value.code == 2, said
    assert said.err
    assert "Traceback" not in said.err
    assert said.out == ""


def test_wrong_use_is_exit_code_2_of_the_process_too() -> None:
    assert hotspare("serve").returncode == 2


def test_every_command_of_the_contract_has_help() -> None:
    overview = hotspare("--help")
    for command in ("serve", "status", "restore", "ls", "rm", "verify", "synth", "demo"):
        assert command in overview.stdout
        done = hotspare(command, "--help")
        assert done.returncode == 0
        assert "Usage" in done.stdout


def test_a_traceback_is_shown_only_when_asked_for() -> None:
    arguments = ["serve", "--model", "m", "--config", "/does/not/exist.toml"]
    assert "Traceback" not in hotspare(*arguments).stderr
    assert "Traceback" in hotspare(*arguments, HOTSPARE_DEBUG="1").stderr


def test_a_node_that_does_not_answer_is_a_failure_that_names_it(port: int) -> None:
    for command in (["status"], ["restore", "--node", "a"], ["restore", "--node", "a", "--layer", "3"]):
        done = hotspare(*command, HOTSPARE_URL=f"http://127.0.0.1:{port}")
        assert done.returncode == 1
        assert f"127.0.0.1:{port}" in done.stderr
        assert "Traceback" not in done.stderr


# -- ls, rm, verify ----------------------------------------------------------------------------------------------


def test_ls_shows_state_digest_owner_and_who_is_attached(checkpoint: Path, namespace: str) -> None:
    segment = make_segment(checkpoint, namespace)
    try:
        (listed,) = json.loads(hotspare("ls", "--namespace", namespace, "--json").stdout)["segments"]
        assert (listed["model"], listed["node_id"], listed["state"]) == (MODEL, "node-a", "sealed")
        assert listed["manifest_digest"] == segment.manifest.digest
        assert listed["nbytes"] == segment.nbytes
        assert (listed["owner_alive"], listed["owner_pid"], listed["attached_pids"]) == (True, os.getpid(), [])
        shown = hotspare("ls", "--namespace", namespace).stdout
        assert f"pid {os.getpid()}" in shown
        assert segment.name.object_name in shown
    finally:
        segment.close()
    code = (
        f"import sys; from shm import attach; w = attach({MODEL!r}, namespace={namespace!r}); "
        "print('attached', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(), cwd="/"
    ) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == b"attached\n"
        (listed,) = json.loads(hotspare("ls", "--namespace", namespace, "--json").stdout)["segments"]
        reader.communicate()
    assert (listed["owner_alive"], listed["attached_pids"]) == (False, [reader.pid])


def test_ls_names_what_cannot_be_read(namespace: str) -> None:
    path = Path(f"/dev/shm/hotspare.{namespace}.junk.a")
    path.write_bytes(b"junk" * 3333)
    try:
        listed = {s["object_name"]: s for s in json.loads(hotspare("ls", "--json").stdout)["segments"]}[path.name]
        assert (listed["state"], listed["model"], listed["nbytes"]) == ("unreadable", None, 13332)
        assert "not a Hotspare segment" in listed["error"]
        assert hotspare("rm", path.name).returncode == 0
        assert not path.exists()
    finally:
        path.unlink(missing_ok=True)


def test_rm_refuses_a_living_owner_by_pid_and_removes_what_nobody_owns(checkpoint: Path, namespace: str) -> None:
    make_segment(checkpoint, namespace, "node-a").close()
    owned = make_segment(checkpoint, namespace, "node-b")  # the later one: the first must not be gone by then
    try:
        refused = hotspare("rm", MODEL, "--namespace", namespace)
        assert refused.returncode == 1
        assert str(os.getpid()) in refused.stderr
        assert len([each for each in object_names() if namespace in each]) == 2, "nothing goes if one may not"
        done = hotspare("rm", "--all", "--namespace", namespace, "--json")
        assert [each["node_id"] for each in json.loads(done.stdout)["removed"]] == ["node-a"]
    finally:
        owned.close()
    assert hotspare("rm", MODEL).returncode == 1, "a model is looked for in its namespace only"
    assert hotspare("rm", MODEL, "--namespace", namespace, "--node", "node-c").returncode == 1
    done = hotspare("rm", MODEL, "--namespace", namespace, "--node", "node-b")
    assert done.returncode == 0
    assert owned.name.object_name in done.stdout
    assert not [each for each in object_names() if namespace in each]


def test_verify_finds_the_one_byte_that_differs(checkpoint: Path, namespace: str) -> None:
    segment = make_segment(checkpoint, namespace)
    segment_nbytes = int(segment.manifest.nbytes.sum())
    good = hotspare("verify", "--namespace", namespace)
    assert good.returncode == 0
    assert "blocks are right" in good.stdout
    key = segment.manifest.keys[5]
    segment.block(5)[3333] ^= 1
    segment.close()
    bad = hotspare("verify", "--model", MODEL, "--namespace", namespace)
    assert bad.returncode == 1
    assert f"layer {key.layer} expert {key.expert} differs" in bad.stdout
    document = json.loads(hotspare("verify", "--namespace", namespace, "--json").stdout)["segments"][0]
    assert document["differing"] == [{"layer": key.layer, "expert": key.expert}]
    assert (document["blocks"], document["nbytes"]) == (14, segment_nbytes)


def test_verify_of_nothing_is_no_success(checkpoint: Path, namespace: str) -> None:
    assert hotspare("verify", "--namespace", namespace).returncode == 1
    unsealed = make_segment(checkpoint, namespace, seal=False)
    try:
        assert unsealed.state is SegmentState.FILLING
        done = hotspare("verify", "--namespace", namespace)
        assert done.returncode == 1
        assert "filling: passed over" in done.stderr
    finally:
        unsealed.unlink()


# -- synth -------------------------------------------------------------------------------------------------------


def test_synth_writes_a_checkpoint_that_can_be_read(tmp_path: Path) -> None:
    arguments = ["--like", "mixtral-8x7b", "--layers", "2", "--experts", "3", "--scale", "0.02", "--json"]
    done = hotspare("synth", str(tmp_path / "m"), *arguments)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["files"][0]["tensors"] > 18
    assert len(read_checkpoint(tmp_path / "m", "m").manifest) == 6
    again = hotspare("synth", str(tmp_path / "m"), *arguments)
    assert again.returncode == 2
    assert "not an empty directory" in again.stderr


# -- serve -------------------------------------------------------------------------------------------------------


def test_serve_fills_announces_and_stops_cleanly_and_the_next_one_adopts(
    checkpoint: Path, namespace: str, tmp_path: Path
) -> None:
    with serving(tmp_path / "first", options(checkpoint, namespace)) as first:
        said = first.wait_for("is ready after")
        assert "/docs" in said
        assert "from disk" in said
        assert SegmentName(namespace, MODEL, "node-a").object_name in said
        assert first.stop() == 0
        assert first.err.read_text() == "", "no chatter, of ours or the engine's"
    with serving(tmp_path / "second", options(checkpoint, namespace)) as second:
        said = second.wait_for("is ready after")
        assert "14 blocks, adopted" in said
        assert second.stop(signal.SIGINT) == 0
    assert hotspare("verify", "--namespace", namespace).returncode == 0


def test_debug_shows_what_the_engine_says(checkpoint: Path, namespace: str, tmp_path: Path) -> None:
    with serving(tmp_path, [*options(checkpoint, namespace), "--log-level", "debug"]) as daemon:
        daemon.wait_for("is ready after")
        assert daemon.stop() == 0
        assert "transfer_metadata" in daemon.err.read_text()


def test_a_node_told_to_wait_leaves_no_unsealed_segment_when_it_stops(
    checkpoint: Path, namespace: str, tmp_path: Path
) -> None:
    with serving(tmp_path, [*options(checkpoint, namespace), "--fill", "none"]) as daemon:
        daemon.wait_for("waiting")
        assert [each for each in object_names() if namespace in each]
        assert daemon.stop() == 0
    assert not [each for each in object_names() if namespace in each]


def test_a_node_that_is_told_to_stop_while_it_opens_leaves_nothing(
    checkpoint: Path, namespace: str, tmp_path: Path
) -> None:
    with serving(tmp_path, [*options(checkpoint, namespace), "--fill", "none"]) as daemon:
        deadline = time.monotonic() + DEADLINE_S
        while not [each for each in object_names() if namespace in each]:
            assert time.monotonic() < deadline, daemon.err.read_text()
        assert daemon.stop() == 0
    assert not [each for each in object_names() if namespace in each]


def test_a_port_in_use_is_said_and_nothing_is_left(checkpoint: Path, namespace: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        done = hotspare("serve", *options(checkpoint, namespace, taken.getsockname()[1]))
    assert done.returncode == 1
    assert f"{where} is in use" in done.stderr
    assert not [each for each in object_names() if namespace in each]


def test_an_address_of_another_host_is_said(checkpoint: Path, namespace: str) -> None:
    done = hotspare("serve", *options(checkpoint, namespace), "--listen", "192.0.2.7:8470", "--insecure")
    assert done.returncode == 1
    assert "not an address of this host" in done.stderr


def test_a_second_daemon_of_one_segment_is_refused_by_name_and_pid(
    checkpoint: Path, namespace: str, tmp_path: Path
) -> None:
    with serving(tmp_path, options(checkpoint, namespace)) as first:
        first.wait_for("is ready after")
        done = hotspare("serve", *options(checkpoint, namespace))
        assert done.returncode == 1
        assert str(first.process.pid) in done.stderr
        assert MODEL in done.stderr
        assert "Traceback" not in done.stderr
        assert first.stop() == 0


def test_a_checkpoint_that_cannot_be_used_is_said_and_nothing_is_left(namespace: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 33)
    for directory in (tmp_path, tmp_path / "missing"):
        done = hotspare("serve", *options(directory, namespace))
        assert done.returncode == 1
        assert str(directory) in done.stderr
        assert "Traceback" not in done.stderr
    assert not [each for each in object_names() if namespace in each]


# -- status and restore ------------------------------------------------------------------------------------------


def test_status_and_restore_talk_to_a_node(checkpoint: Path, namespace: str, port: int, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{port}"
    with serving(tmp_path, [*options(checkpoint, namespace, port), "--fill", "none"]) as daemon:
        daemon.wait_for("waiting")
        before = json.loads(hotspare("status", "--json", HOTSPARE_URL=url).stdout)
        assert (before["node"]["state"], before["readiness"]["ready"], before["restores"]) == ("waiting", False, [])
        part = hotspare("restore", "--node", "node-a", "--layer", "3", "--wait", "--json", "--url", url)
        assert part.returncode == 0, part.stderr
        document = json.loads(part.stdout)
        assert (document["state"], document["blocks_total"]) == ("succeeded", 7)
        one = hotspare("restore", "--node", "node-a", "--layer", "4", "--expert", "2", "--expert", "6", "--wait",
                       "--source", "disk", "--url", url)  # fmt: skip
        assert one.returncode == 0
        assert "2 of 2 blocks" in one.stdout
        every = hotspare("restore", "--node", "node-a", "--expert", "0", "--wait", "--json", "--url", url)
        assert json.loads(every.stdout)["blocks_total"] == 2
        rest = hotspare("restore", "--node", "node-a", "--wait", "--url", url)
        assert rest.returncode == 0
        assert "14 of 14 blocks" in rest.stdout
        daemon.wait_for("is ready after")
        shown = hotspare("status", "--url", url).stdout
        assert "ready" in shown
        assert "14 of 14 blocks" in shown
        assert "Consumers" not in shown
        with attach(MODEL, namespace=namespace) as weights, Restorer(url) as restorer:
            tensors = {name: tensor.clone() for name, tensor in weights.expert(3, 5).items()}
            restorer.bind(Slots.plain(tensors))
            restorer.register("rank-3")
            (consumer,) = json.loads(hotspare("status", "--json", "--url", url).stdout)["consumers"]
            assert (consumer["id"], consumer["session_id"]) == ("rank-3", restorer.session_id)
            assert "rank-3" in hotspare("status", "--url", url).stdout
        assert daemon.stop() == 0


def test_a_restore_that_cannot_be_is_a_failure(checkpoint: Path, namespace: str, port: int, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{port}"
    with serving(tmp_path, [*options(checkpoint, namespace, port), "--fill", "none"]) as daemon:
        daemon.wait_for("waiting")
        for arguments, said in (
            (["--node", "node-x"], "node-x"),
            (["--node", "node-a", "--layer", "0"], "nothing of layer 0"),
            (["--node", "node-a", "--layer", "3", "--expert", "99"], "no expert 99 in layer 3"),
            (["--consumer", "rank-0"], "rank-0"),
            (["--node", "node-a", "--source", "peer", "--wait"], "could not be had"),
        ):
            done = hotspare("restore", *arguments, "--url", url)
            assert done.returncode == 1, arguments
            assert said in done.stderr
        assert daemon.stop() == 0


def test_read_back_reaches_the_node_for_a_consumer_and_only_when_asked_for(odd_peer: Callable[[], Any]) -> None:
    peer = odd_peer()
    for flags in (["--read-back"], []):
        hotspare("restore", "--consumer", "rank-3", *flags, "--url", peer.url)
    asked = [RestoreRequest.model_validate_json(body) for body in peer.bodies]
    assert peer.asked == ["POST /v1/restores"] * 2
    assert [(request.target.consumer_id, request.read_back) for request in asked] == [
        ("rank-3", True),
        ("rank-3", False),
    ]


def test_read_back_of_a_node_is_wrong_use_and_says_whose_it_is() -> None:
    done = hotspare("restore", "--node", "node-a", "--read-back")
    assert done.returncode == 2
    assert "--read-back" in done.stderr
    assert "for --consumer" in done.stderr


def test_a_token_is_asked_for_and_shown(checkpoint: Path, namespace: str, port: int, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{port}"
    with serving(tmp_path, [*options(checkpoint, namespace, port), "--token", "t0ken"]) as daemon:
        daemon.wait_for("is ready after")
        assert httpx.get(f"{url}/v1/node").status_code == 401
        refused = hotspare("status", "--url", url)
        assert refused.returncode == 1
        assert "token" in refused.stderr
        assert hotspare("status", "--url", url, HOTSPARE_TOKEN="t0ken").returncode == 0
        assert daemon.stop() == 0

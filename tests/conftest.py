"""What tests of every folder share: namespaces, ports, a checkpoint, child processes and daemons, all of which end."""

from __future__ import annotations

import ctypes
import itertools
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from shm import attach, inventory, posix
from shm.block import ExpertKey, TensorEntry
from shm.checksum import checksum
from shm.layout import SHM_DIRECTORY, BlockState, SegmentName
from shm.manifest import FileSpec, Manifest
from shm.segment import Segment
from transfer.checkpoint import Checkpoint, read_checkpoint
from transfer.checkpoint.synth import write_checkpoint

ROOT = Path(__file__).parent.parent
OURS = f"t{os.getpid()}x"  # every namespace of this run begins so
DEADLINE_S = 40.0
POLL_S = 0.01
PR_SET_PDEATHSIG = 1

_numbers = itertools.count()
_libc = ctypes.CDLL(None)


def _die_with_parent() -> None:
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait_until(condition: Callable[[], Any], what: str = "", deadline_s: float = DEADLINE_S) -> Any:
    end = time.monotonic() + deadline_s
    while not (answer := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"not within {deadline_s} s: {what or condition}")
        time.sleep(POLL_S)
    return answer


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., Any]:
    """`wait_until(condition, what)` → the condition's first true answer; fails after a deadline."""
    return _wait_until


# -- what must not be left -----------------------------------------------------------------------------------------


def _objects(namespace: str) -> list[str]:
    return [name for name in os.listdir(SHM_DIRECTORY) if name.startswith(f"hotspare.{namespace}")]


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left() -> Iterator[None]:
    """At the end of the run: no object of its namespaces in /dev/shm, and no child process."""
    before = set(psutil.Process().children(recursive=True))
    yield
    assert _objects(OURS) == []

    def ours() -> list[psutil.Process]:
        children = set(psutil.Process().children(recursive=True)) - before
        return [c for c in children if c.is_running() and c.status() != psutil.STATUS_ZOMBIE]

    _wait_until(lambda: not ours(), f"end of {ours()}", 5)


@contextmanager
def _own_namespace() -> Iterator[str]:
    name = f"{OURS}{next(_numbers)}"
    try:
        yield name
    finally:
        for object_name in _objects(name):
            posix.unlink(object_name)
    assert _objects(name) == []


@pytest.fixture(scope="session")
def own_namespace() -> Callable[[], AbstractContextManager[str]]:
    """`own_namespace()` → a namespace for what outlives one test; its segments are removed when the context ends."""
    return _own_namespace


@pytest.fixture
def namespace() -> Iterator[str]:
    """A namespace of the test's own; its segments are removed when it ends."""
    with _own_namespace() as name:
        yield name


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """`free_port()` → a TCP port of 127.0.0.1 that nobody listens on, another one each time."""
    given: set[int] = set()

    def find() -> int:
        while True:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = int(probe.getsockname()[1])
            if port not in given:
                given.add(port)
                return port

    return find


# -- manifests, segments, checkpoints ------------------------------------------------------------------------------


def _make_manifest(
    layers: int = 2, experts: int = 5, *, model: str = "tiny", rows: int = 11, cols: int = 13
) -> Manifest:
    names = ("down_proj.weight", "gate_proj.weight", "up_proj.weight")
    blocks, at = {}, 8
    for layer, expert in itertools.product(range(layers), range(experts)):
        entries = []
        for name in names:
            template = f"model.layers.{{layer}}.mlp.experts.{{expert}}.{name}"
            entries.append(TensorEntry(template, "BF16", (rows, cols), 0, at))
            at += 2 * rows * cols
        blocks[ExpertKey(layer, expert)] = entries
    return Manifest.build(model, "gate_up_down", "experts", [FileSpec("a.safetensors", at, "0" * 32)], blocks)


@pytest.fixture(scope="session")
def make_manifest() -> Callable[..., Manifest]:
    """`make_manifest(layers, experts, model=…, rows=…, cols=…)`: three BF16 matrices an expert."""
    return _make_manifest


def _content(row: int, nbytes: int, seed: int = 0) -> bytes:
    return np.random.Generator(np.random.SFC64([seed, row])).bytes(nbytes)


@pytest.fixture(scope="session")
def content() -> Callable[..., bytes]:
    """`content(row, nbytes, seed)`: the bytes that `fill` puts into a block."""
    return _content


def _fill(segment: Segment, seed: int = 0) -> None:
    for row in segment.rows(BlockState.RESERVED, BlockState.QUARANTINED).tolist():
        block = segment.block(row)
        block[:] = _content(row, block.nbytes, seed)
        segment.publish(row, checksum(block))


@pytest.fixture(scope="session")
def fill() -> Callable[..., None]:
    """`fill(segment, seed)`: put seeded bytes into every block that waits for some, and publish it."""
    return _fill


@pytest.fixture
def sealed(namespace: str) -> Iterator[Callable[..., Segment]]:
    """`sealed(node, manifest=…, rows=…, seed=…)` → a sealed segment, owned by this process."""
    owned: list[Segment] = []

    def make(node: str = "n0", manifest: Manifest | None = None, rows: Any = None, seed: int = 0) -> Segment:
        manifest = manifest or _make_manifest()
        segment = Segment.claim(SegmentName(namespace, manifest.model, node))
        owned.append(segment)
        segment.allocate(manifest, range(len(manifest)) if rows is None else rows)
        _fill(segment, seed)
        segment.seal()
        return segment

    yield make
    for segment in owned:
        segment.close()


@pytest.fixture(scope="session")
def held() -> Callable[..., dict[ExpertKey, bytes]]:
    """`held(namespace, node, model)` → the bytes of every block that a node's segment has published."""

    def read(namespace: str, node: str = "n0", model: str = "moe") -> dict[ExpertKey, bytes]:
        with attach(model, namespace=namespace, node=node) as weights:
            return {weights.manifest.keys[row]: bytes(weights.block(row)) for row in weights.rows().tolist()}

    return read


def _segment_path(namespace: str, node: str = "n0", model: str = "moe") -> Path:
    return Path(SHM_DIRECTORY, SegmentName(namespace, model, node).object_name)


@pytest.fixture(scope="session")
def segment_path() -> Callable[..., Path]:
    """`segment_path(namespace, node, model)` → where a node's segment is in /dev/shm."""
    return _segment_path


def _write_moe(directory: Path, *, experts: int = 13, seed: int = 3) -> Path:
    write_checkpoint(
        directory, "deepseek-v3", layers=6, experts=experts, scale=0.06, seed=seed, file_nbytes=3333333
    )  # fmt: skip
    return directory


@pytest.fixture(scope="session")
def write_moe() -> Callable[..., Path]:
    """`write_moe(directory, experts=…, seed=…)`: a checkpoint like `moe_checkpoint`; another seed, only other bytes."""
    return _write_moe


@pytest.fixture(scope="session")
def moe_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 dense layers, then 3 of 13 experts each, block fp8, in several files: 39 blocks of about 0.2 MB. Read only."""
    return _write_moe(tmp_path_factory.mktemp("checkpoint") / "moe")


@pytest.fixture(scope="session")
def expected_blocks() -> Callable[..., dict[ExpertKey, bytes]]:
    """`expected_blocks(directory)` → every block's bytes, read from the files one tensor at a time."""

    def read(directory: Path, model: str = "moe", include: Any = "experts") -> dict[ExpertKey, bytes]:
        checkpoint: Checkpoint = read_checkpoint(directory, model, include)
        blocks = {}
        for row, key in enumerate(checkpoint.manifest.keys):
            block = bytearray(int(checkpoint.manifest.nbytes[row]))
            for tensor in checkpoint.manifest.block(row).tensors:
                with checkpoint.path(tensor.file).open("rb") as file:
                    file.seek(tensor.file_offset)
                    block[tensor.offset : tensor.offset + tensor.nbytes] = file.read(tensor.nbytes)
            blocks[key] = bytes(block)
        return blocks

    return read


# -- processes -----------------------------------------------------------------------------------------------------


class Child:
    """A process that says on stdout how far it is, and goes on when it is told to."""

    def __init__(self, command: Sequence[str], **options: Any) -> None:
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            preexec_fn=_die_with_parent, **options,
        )  # fmt: skip
        self._said = b""

    @property
    def pid(self) -> int:
        return self._process.pid

    def expect(self, word: str, deadline_s: float = DEADLINE_S) -> str:
        """Wait for a line that begins with `word`; the rest of that line."""
        assert self._process.stdout is not None
        end = time.monotonic() + deadline_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while True:
                line, newline, rest = self._said.partition(b"\n")
                if newline:
                    self._said = rest
                    if line.startswith(word.encode()):
                        return line.decode()[len(word) :].strip()
                    continue
                assert selector.select(max(0.0, end - time.monotonic())), f"no {word!r} within {deadline_s} s"
                more = os.read(self._process.stdout.fileno(), 65536)
                assert more, (
                    f"it ended before {word!r}: {self._process.stderr and self._process.stderr.read().decode()}"
                )
                self._said += more

    def tell(self, word: str = "") -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(word.encode() + b"\n")
        self._process.stdin.flush()

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self._process.kill()
        self._process.wait(DEADLINE_S)

    def wait(self) -> tuple[int, str, str]:
        """Wait for its end: exit status, and what it said on stdout and stderr."""
        out, err = self._process.communicate(timeout=DEADLINE_S)
        return self._process.returncode, (self._said + out).decode(), err.decode()

    def close(self) -> None:
        self.kill()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:
                    continue


@pytest.fixture
def python(namespace: str) -> Iterator[Callable[..., Child]]:
    """`python(code, *arguments)` → a `Child` that runs the code; killed at the end of the test."""
    children: list[Child] = []

    def start(code: str, *arguments: object, prefix: Sequence[str] = (), **options: Any) -> Child:
        child = Child([*prefix, sys.executable, "-c", code, *map(str, arguments)], **options)
        children.append(child)
        return child

    yield start
    for child in children:
        child.close()


class Daemon:
    """A `hotspare serve` of its own process."""

    def __init__(
        self, node_id: str, port: int, options: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> None:
        self.node_id = node_id
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        self._http = httpx.Client(trust_env=False, timeout=DEADLINE_S, verify=False)
        command = [sys.executable, "-m", "app.cli", "serve", "--node-id", node_id, "--listen", f"127.0.0.1:{port}"]
        own = {name: value for name, value in os.environ.items() if not name.startswith(("HOTSPARE_", "MC_"))}
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [*command, *options], cwd=ROOT, env={**own, **environment}, stdin=subprocess.DEVNULL,
                stdout=output, stderr=output, preexec_fn=_die_with_parent,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        return self.process.pid

    def said(self) -> str:
        """Everything on its stdout and stderr so far."""
        return self._log.read_text(errors="replace")

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self._http.request(method, self.url + path, **options)

    def get(self, path: str) -> Any:
        answer = self.ask("GET", path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def _answers(self, path: str) -> bool:
        assert self.process.poll() is None, f"{self.node_id} ended with {self.process.returncode}:\n{self.said()}"
        try:
            return self.ask("GET", path).status_code == 200
        except httpx.HTTPError:
            return False

    def wait_live(self) -> Daemon:
        _wait_until(lambda: self._answers("/livez"), f"{self.node_id} live:\n{self.said()}")
        return self

    def wait_ready(self) -> Daemon:
        try:
            _wait_until(lambda: self._answers("/readyz"))
        except AssertionError as error:
            raise AssertionError(f"{self.node_id} is not ready: {error}\n{self.said()}") from error
        return self

    def wait_alive(self, *peers: str) -> Daemon:
        """Until it sees these peers alive."""

        def seen() -> bool:
            alive = {n["node_id"] for n in self.get("/v1/nodes")["nodes"] if n["state"] == "alive"}
            return alive >= set(peers)

        _wait_until(seen, f"{self.node_id} sees {peers}")
        return self

    def restore(self, target: str | None = None, **body: Any) -> str:
        """Start a restore; its id."""
        answer = self.ask("POST", "/v1/restores", json={"target": {"node_id": target or self.node_id}, **body})
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def wait_restore(self, restore_id: str) -> dict[str, Any]:
        """Until it has ended; its document."""

        def ended() -> Any:
            document = self.get(f"/v1/restores/{restore_id}")
            return document if document["state"] in ("succeeded", "failed", "cancelled") else None

        document: dict[str, Any] = _wait_until(ended, f"end of restore {restore_id}:\n{self.said()}")
        return document

    def bytes_by_source(self) -> dict[str, int]:
        """What all its restores together brought."""
        total = {"local": 0, "peer": 0, "disk": 0}
        for restore in self.get("/v1/restores")["restores"]:
            for source, nbytes in restore["bytes_by_source"].items():
                total[source] += nbytes
        return total

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.wait(DEADLINE_S)

    def close(self) -> None:
        self.kill()
        self._http.close()

    def stop(self) -> int:
        """SIGTERM; its exit status."""
        self.process.terminate()
        return self.wait()

    def wait(self) -> int:
        return self.process.wait(DEADLINE_S)


@contextmanager
def _serving(namespace: str, directory: Path) -> Iterator[Callable[..., Daemon]]:
    daemons: list[Daemon] = []

    def start(
        node_id: str,
        ports: Mapping[str, int],
        *more: str,
        checkpoint: Path | None = None,
        model: str = "moe",
        env: Mapping[str, str] | None = None,
        **options: object,
    ) -> Daemon:
        arguments = ["--model", model, "--namespace", namespace, *more]
        for peer, port in ports.items():
            if peer != node_id:
                arguments += ["--peer", f"{peer}=http://127.0.0.1:{port}"]
        if checkpoint is not None:
            arguments += ["--checkpoint", str(checkpoint)]
        for name, value in options.items():
            arguments += [f"--{name.replace('_', '-')}", str(value)]
        daemon = Daemon(node_id, ports[node_id], arguments, env or {}, directory / f"{node_id}.log")
        daemons.append(daemon)
        return daemon

    try:
        yield start
    finally:
        for daemon in daemons:
            daemon.close()


@pytest.fixture(scope="session")
def serving() -> Callable[..., AbstractContextManager[Callable[..., Daemon]]]:
    """`serving(namespace, directory)` → a `serve` for nodes that outlive one test; they are killed when it ends."""
    return _serving


@pytest.fixture
def serve(namespace: str, tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    """`serve(node_id, ports, checkpoint=…, fill=…, env=…, **options)` → a `Daemon`, killed at the end of the test.

    `ports` are those of every node of its cluster, by node id.
    """
    with _serving(namespace, tmp_path) as start:
        yield start


@pytest.fixture(scope="session")
def list_segments_of() -> Callable[[str], list[inventory.SegmentInfo]]:
    """`list_segments_of(namespace)` → what `hotspare ls` would say of it."""

    def find(namespace: str) -> list[inventory.SegmentInfo]:
        return [i for i in inventory.list_segments() if i.object_name.startswith(f"hotspare.{namespace}")]

    return find

"""What tests of every folder share: namespaces, ports, a checkpoint, child processes and daemons, all of which end."""

from __future__ import annotations

import ctypes
import itertools
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import psutil
import pytest

from shm import attach, inventory, posix
from shm.block import ExpertKey, TensorEntry
from shm.checksum import checksum
from shm.layout import SHM_DIRECTORY, BlockState, SegmentName
from shm.manifest import FileSpec, Manifest
from shm.segment import Segment
from tests import processes
from tests.processes import NODE_MODULES, ROOT, Child, Daemon, Zygote, start_anew
from transfer.checkpoint import Checkpoint, read_checkpoint
from transfer.checkpoint.synth import write_checkpoint
from transfer.engine import MooncakeEngine

hypothesis.settings.register_profile("hotspare", deadline=None)  # of a busy machine's seconds nothing follows
hypothesis.settings.load_profile("hotspare")

OURS = f"t{os.getpid()}x"  # every namespace of this run begins so
PORTS = range(18_000, 32_000)  # above Mooncake's, below those that the kernel hands out to whoever connects

_numbers = itertools.count()


def pytest_configure() -> None:
    """Whoever runs the tests may have signals ignored, under nohup or in the background; what they start is not to."""
    for number, handler in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., Any]:
    """`wait_until(condition, what)` → the condition's first true answer; fails after a deadline."""
    return processes.wait_until


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

    processes.wait_until(lambda: not ours(), f"end of {ours()}")


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
def free_port() -> Iterator[Callable[[], int]]:
    """`free_port()` → a TCP port of 127.0.0.1 that nobody listens on, another one each time.

    No other run on this machine is given it until this one ends: whoever binds its name in the abstract socket space
    has it. Nobody has it by chance either: it is none that the kernel picks for connections, or Mooncake at random.
    """
    ports = iter(PORTS)
    with ExitStack() as ours:

        def find() -> int:
            for port in ports:
                claim = ours.enter_context(socket.socket(socket.AF_UNIX))
                with suppress(OSError), socket.socket() as probe:
                    claim.bind(f"\0hotspare-tests.{port}")
                    probe.bind(("127.0.0.1", port))
                    return port
            raise AssertionError(f"no port left of {PORTS}")

        yield find


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


@pytest.fixture(scope="session")
def node_zygote() -> Iterator[Zygote]:
    """What nodes are forked from: it has imported what they import."""
    yield (zygote := Zygote(*NODE_MODULES))
    zygote.close()


@pytest.fixture(scope="session")
def torch_zygote() -> Iterator[Zygote]:
    """What engines are forked from: it has imported torch."""
    yield (zygote := Zygote("torch", "safetensors.torch", "transfer.slots", "transfer.checkpoint", "transfer.push"))
    zygote.close()


@pytest.fixture
def children(namespace: str) -> Iterator[list[Child]]:
    """Processes that are killed at the end of the test, before its namespace is looked through."""
    started: list[Child] = []
    yield started
    for child in started:
        child.close()


@pytest.fixture
def python(children: list[Child], node_zygote: Zygote) -> Callable[..., Child]:
    """`python(code, *arguments, environment=…, network=…)` → a `Child` that runs it, killed at the end of the test.

    It has imported from the start what nodes import. Behind another command, `prefix`, it has not.
    """

    def start(code: str, *arguments: object, prefix: Sequence[str] = (), **options: Any) -> Child:
        command = ["-c", code, *map(str, arguments)]
        if prefix:
            children.append(Child(lambda to: start_anew([*prefix, sys.executable, *command], to, cwd=ROOT, **options)))
        else:
            children.append(Child(lambda to: node_zygote.fork(command, to, **options)))
        return children[-1]

    return start


@pytest.fixture
def python_with_torch(children: list[Child], torch_zygote: Zygote) -> Callable[..., Child]:
    """`python_with_torch(code, *arguments, environment=…, network=…)`: it has torch, whose import takes seconds."""

    def start(code: str, *arguments: object, **options: Any) -> Child:
        children.append(Child(lambda to: torch_zygote.fork(["-c", code, *map(str, arguments)], to, **options)))
        return children[-1]

    return start


@contextmanager
def _serving(zygote: Zygote, namespace: str, directory: Path) -> Iterator[Callable[..., Daemon]]:
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
        daemon = Daemon(node_id, ports[node_id], arguments, env or {}, directory / f"{node_id}.log", zygote)
        daemons.append(daemon)
        return daemon

    try:
        yield start
    finally:
        for daemon in daemons:
            daemon.close()


@pytest.fixture(scope="session")
def serving(node_zygote: Zygote) -> Callable[..., AbstractContextManager[Callable[..., Daemon]]]:
    """`serving(namespace, directory)` → a `serve` for nodes that outlive one test; they are killed when it ends."""
    return partial(_serving, node_zygote)


@pytest.fixture
def serve(node_zygote: Zygote, namespace: str, tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    """`serve(node_id, ports, checkpoint=…, fill=…, env=…, **options)` → a `Daemon`, killed at the end of the test.

    `ports` are those of every node of its cluster, by node id.
    """
    with _serving(node_zygote, namespace, tmp_path) as start:
        yield start


@pytest.fixture
def kept_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Mooncake's engines live until this process exits: destroying one holds the GIL for a second."""
    start = MooncakeEngine.__init__

    def start_for_good(self: MooncakeEngine, *arguments: Any, **options: Any) -> None:
        start(self, *arguments, **options)
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._engine))

    monkeypatch.setattr(MooncakeEngine, "__init__", start_for_good)


@pytest.fixture(scope="session")
def list_segments_of() -> Callable[[str], list[inventory.SegmentInfo]]:
    """`list_segments_of(namespace)` → what `hotspare ls` would say of it."""

    def find(namespace: str) -> list[inventory.SegmentInfo]:
        return [i for i in inventory.list_segments() if i.object_name.startswith(f"hotspare.{namespace}")]

    return find

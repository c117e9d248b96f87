"""The command line as processes; most of them are forked, since starting Python anew takes longer than what they do."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from shm.checksum import checksum
from shm.layout import SegmentName
from shm.segment import Segment
from tests.processes import DEADLINE_S, ROOT, Child, Zygote, start_anew
from transfer.checkpoint import read_checkpoint
from transfer.checkpoint.reader import BlockReader
from transfer.checkpoint.synth import write_checkpoint

MODEL = "org/cli-model"
Ran = subprocess.CompletedProcess[str]


def _environment(variables: Mapping[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HOTSPARE_")}
    return kept | {"PYTHONPATH": str(ROOT)} | dict(variables)


@pytest.fixture(scope="session")
def model() -> str:
    """The model's name; with a slash, which names of objects cannot have."""
    return MODEL


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """14 blocks: layers 3 and 4 with 7 experts each. Read only."""
    directory = tmp_path_factory.mktemp("cli") / "checkpoint"
    write_checkpoint(directory, "deepseek-v3", layers=5, experts=7, scale=0.03125, seed=3)
    return directory


@pytest.fixture
def hotspare(node_zygote: Zygote) -> Callable[..., Ran]:
    """`hotspare("ls", "--json", HOTSPARE_URL=…)` → how the command ended, and what it said."""

    def run(*arguments: str, **variables: str) -> Ran:
        command = ["-m", "app.cli", *arguments]
        child = Child(lambda streams: node_zygote.fork(command, streams, _environment(variables), Path("/")))
        try:
            return subprocess.CompletedProcess(command, *child.wait())
        finally:
            child.close()

    return run


@pytest.fixture(scope="session")
def hotspare_anew() -> Callable[..., Ran]:
    """As `hotspare`, by a new interpreter."""

    def run(*arguments: str, **variables: str) -> Ran:
        command = [sys.executable, "-m", "app.cli", *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=DEADLINE_S, env=_environment(variables), cwd="/",
            check=False,
        )  # fmt: skip

    return run


@pytest.fixture
def options(checkpoint: Path, namespace: str) -> Callable[..., list[str]]:
    """`options(port, node)` → options of a `serve` of the checkpoint."""

    def make(port: int = 0, node: str = "node-a", directory: Path = checkpoint) -> list[str]:
        return [
            "--model", MODEL, "--checkpoint", str(directory), "--namespace", namespace, "--node-id", node,
            "--listen", f"127.0.0.1:{port}",
        ]  # fmt: skip

    return make


@pytest.fixture
def start(children: list[Child], node_zygote: Zygote) -> Callable[..., Child]:
    """`start(options)` → a `hotspare serve`, killed at the end of the test; `anew`, by a new interpreter."""

    def serve(options: Sequence[str], *, anew: bool = False) -> Child:
        command, environment = ["-m", "app.cli", "serve", *options], _environment({})
        if anew:
            children.append(Child(lambda to: start_anew([sys.executable, *command], to, env=environment, cwd="/")))
        else:
            children.append(Child(lambda to: node_zygote.fork(command, to, environment, Path("/"))))
        return children[-1]

    return serve


@pytest.fixture
def serving(start: Callable[..., Child], options: Callable[..., list[str]]) -> Callable[..., tuple[str, Child]]:
    """`serving("--fill", "none")` → the URL of a node that listens, as it says, and its process."""

    def make(*more: str) -> tuple[str, Child]:
        child = start([*options(), *more])
        said = child.expect("node-a of")
        return said.split(" at ")[1].split()[0], child

    return make


@pytest.fixture
def make_segment(checkpoint: Path, namespace: str) -> Iterator[Callable[..., Segment]]:
    """`make_segment(node, seal=…)` → a segment filled from the checkpoint, owned by this process."""
    owned: list[Segment] = []

    def make(node: str = "node-a", *, seal: bool = True) -> Segment:
        opened = read_checkpoint(checkpoint, MODEL)
        owned.append(segment := Segment.claim(SegmentName(namespace, MODEL, node)))
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

    yield make
    for segment in owned:
        segment.close()


@pytest.fixture
def objects(namespace: str) -> Callable[[], list[str]]:
    """`objects()` → the names in /dev/shm that are of the test's namespace."""
    return lambda: [name for name in os.listdir("/dev/shm") if namespace in name]

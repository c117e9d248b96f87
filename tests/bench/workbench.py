"""What the benchmarks share: a place that is cleaned up, checkpoints, real nodes, paired runs, and the printing.

The scripts beside it import it by name; run them from anywhere: `python tests/bench/fill_figures.py`.
"""

# ruff: noqa: T201 - what it prints is what it is for
from __future__ import annotations

import argparse
import contextlib
import ctypes
import http.client
import json
import os
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from app.cluster.placement import Placement  # noqa: E402
from app.node.holding import Holding  # noqa: E402
from app.node.proofs import Proofs  # noqa: E402
from shm import posix  # noqa: E402
from shm.layout import PREFIX, SHM_DIRECTORY, SegmentName  # noqa: E402
from shm.segment import Segment  # noqa: E402
from transfer.checkpoint.synth import SynthPlan, plan_checkpoint, write_checkpoint  # noqa: E402

MODEL = "bench"
FAMILY = "deepseek-v3"  # block fp8 with scales: six tensors a block, scales apart from weights in the file
SCALE = 0.25  # blocks of 2.7 MB
DENSE_LAYERS = 3  # the model's first ones, and it has 256 experts in each of the others
EXPERTS_MAX = 256
WHOLE_MODEL: Mapping[str, Any] = {"layers": 61, "experts": EXPERTS_MAX, "scale": 1 / 32}  # every block, but small
GIB = 1 << 30
MIB = 1 << 20
READY_TIMEOUT_S = 300.0
POLL_S = 0.002
PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None)


# -- a place ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """A directory and a namespace in /dev/shm that are gone at the end, whatever ends it but SIGKILL."""

    directory: Path
    namespace: str

    def name(self, node: str) -> SegmentName:
        return SegmentName(self.namespace, MODEL, node)

    def holding(self, segment: Segment) -> Holding:
        """The segment as a node alone has it, its content not looked at."""
        manifest, node = segment.manifest, segment.name.node
        placement = Placement.compute(manifest, (node,), 1)
        return Holding(node, segment, manifest, placement, bytes(16), None, Proofs(len(manifest)), ())

    def checkpoint(self, name: str, shape: Mapping[str, Any], *, sparse: bool = False) -> Path:
        """A checkpoint of that shape; `sparse`: real headers over files that are otherwise one hole."""
        directory = self.directory / name
        if not sparse:
            write_checkpoint(directory, FAMILY, **shape)
            return directory
        directory.mkdir()
        plan = plan_checkpoint(FAMILY, **shape)
        for file in plan.files:
            (directory / file.name).write_bytes(file.header)
            os.truncate(directory / file.name, file.nbytes)
        self._write_documents(directory, plan)
        return directory

    @staticmethod
    def _write_documents(directory: Path, plan: SynthPlan) -> None:
        (directory / "config.json").write_text(json.dumps(plan.config))
        if plan.index is not None:
            (directory / "model.safetensors.index.json").write_text(json.dumps(plan.index))

    def sweep(self) -> None:
        """Remove every object of the namespace."""
        for name in os.listdir(SHM_DIRECTORY):
            if name.startswith(f"{PREFIX}.{self.namespace}."):
                posix.unlink(name)


def shape_of(nbytes: int) -> dict[str, Any]:
    """Arguments of `write_checkpoint` for experts of about so many bytes in all."""
    one, two = (plan_checkpoint(FAMILY, layers=DENSE_LAYERS + 1, experts=n, scale=SCALE).nbytes for n in (1, 2))
    blocks = -(-nbytes // (two - one))
    layers = -(-blocks // EXPERTS_MAX)
    return {"layers": DENSE_LAYERS + layers, "experts": -(-blocks // layers), "scale": SCALE}


def namespace() -> str:
    """One of this process's own, which says whose it is."""
    return f"bench-{os.getpid()}-{secrets.token_hex(4)}"


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def bench() -> Iterator[Bench]:
    signal.signal(signal.SIGTERM, _interrupt)
    with tempfile.TemporaryDirectory(prefix="hotspare-bench-") as directory:
        made = Bench(Path(directory), namespace())
        try:
            yield made
        finally:
            made.sweep()


# -- nodes -----------------------------------------------------------------------------------------------------


def _die_with_parent() -> None:
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Daemon:
    """A process of `hotspare serve`."""

    def __init__(self, made: Bench, node: str, *options: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HOTSPARE_")}
        command = [sys.executable, "-m", "app.cli", "serve", "--model", MODEL, "--namespace", made.namespace]
        self._log = (made.directory / f"{node}.log").open("ab")
        self.started_s = time.monotonic()
        self.process = subprocess.Popen(
            [*command, "--node-id", node, "--listen", f"127.0.0.1:{self.port}", *options],
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, cwd=made.directory,
            env=kept | {"PYTHONPATH": str(ROOT)}, preexec_fn=_die_with_parent,
        )  # fmt: skip

    def is_ready(self) -> bool:
        """Whether /readyz says so. The port listens before it is served: a request that comes early waits there."""
        asking = http.client.HTTPConnection("127.0.0.1", self.port, timeout=READY_TIMEOUT_S)
        try:
            asking.request("GET", "/readyz")
            return asking.getresponse().status == 200
        except ConnectionError:
            return False
        finally:
            asking.close()

    def wait_until_ready(self, meanwhile: Callable[[], None] = lambda: None) -> float:
        """Seconds from just before the process was started to the first 200."""
        while not self.is_ready():
            if self.process.poll() is not None:
                raise SystemExit(f"the node ended with {self.process.returncode}:\n{self.last_words()}")
            if time.monotonic() - self.started_s > READY_TIMEOUT_S:
                raise SystemExit(f"the node is not ready after {READY_TIMEOUT_S:.0f} s:\n{self.last_words()}")
            meanwhile()
            time.sleep(POLL_S)
        return time.monotonic() - self.started_s

    def last_words(self) -> str:
        return Path(self._log.name).read_text(errors="replace")[-2000:]

    def end(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)
        self.process.wait()
        self._log.close()

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.end()


# -- pairs -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """Seconds of two ways to do the same, one after the other in every round."""

    ours_s: Sequence[float]
    bare_s: Sequence[float]
    nbytes: int

    @property
    def ratios(self) -> list[float]:
        """Our speed as a share of the bare one's, by round."""
        return [bare / ours for ours, bare in zip(self.ours_s, self.bare_s, strict=True)]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def spread(self) -> str:
        return f"{min(self.ratios):.2f} to {max(self.ratios):.2f}"

    def rate(self, seconds: Sequence[float]) -> str:
        return f"{self.nbytes / statistics.median(seconds) / 1e9:.2f} GB/s"

    def document(self) -> dict[str, Any]:
        return {"ours_s": self.ours_s, "bare_s": self.bare_s, "nbytes": self.nbytes, "ratio": self.ratio}


def paired(ours: Callable[[], float], bare: Callable[[], float], rounds: int, nbytes: int) -> Pairs:
    """Run both in turn, the first of a round being second in the next. The first round is not counted: it makes the
    machine fetch the memory that later rounds reuse."""
    ours_s: list[float] = []
    bare_s: list[float] = []
    for number in range(rounds + 1):
        pair = [(ours, ours_s), (bare, bare_s)]
        for run, seconds in pair if number % 2 else reversed(pair):
            took = run()
            if number:
                seconds.append(took)
    return Pairs(ours_s, bare_s, nbytes)


# -- telling ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """One row: what was measured, the figure, its target and whether that was met (None: it has none)."""

    what: str
    value: str
    target: str = "-"
    met: bool | None = None
    note: str = ""


def arguments(description: str | None, **sizes: tuple[int | float | str, str]) -> argparse.Namespace:
    """`--json`, and one option for each size: its default and what it means."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    for name, (default, meaning) in sizes.items():
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=type(default), default=default, help=f"{meaning} [default: {default}]")
    return parser.parse_args()


def tell(figures: Sequence[Figure], document: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"figures": [vars(figure) for figure in figures], **document}, indent=2))
        return
    verdict = {None: "", True: "met", False: "MISSED"}
    rows = [("", "figure", "target", "", "")] + [(f.what, f.value, f.target, verdict[f.met], f.note) for f in figures]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]).rstrip())

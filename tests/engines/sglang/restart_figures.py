"""What a start of a whole SGLang takes from memory, from a warm and from a cold page cache, in one run.

    PYTHONPATH=build/sglang .venv/bin/python -m tests.engines.sglang.restart_figures --gb 1

Everything else that SGLang does at a start is the same in all three, and most of it on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx

from tests.engines.sglang import tiny
from tests.engines.sglang.server import CPU, PROMPTS, Answer, Device, Server
from tests.processes import ROOT, die_with_parent, wait_until

EXPERTS = 64
PORT, NODE_PORT = 18731, 18732
WEIGHTS = r"Load weight end\. elapsed=([\d.]+) s"


def width_of(gigabytes: float) -> int:
    """Of experts, so that all of them take so many bytes in bf16."""
    return max(64, int(gigabytes * 1e9 / (tiny.LAYERS * EXPERTS * 3 * tiny.HIDDEN * 2)) // 64 * 64)


def drop_from_cache(directory: Path) -> None:
    for file in directory.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_into_cache(directory: Path) -> None:
    for file in directory.glob("*.safetensors"):
        with file.open("rb", buffering=0) as opened:
            while opened.read(1 << 24):
                continue


class Node(NamedTuple):
    url: str
    process: subprocess.Popen[bytes]


@contextmanager
def node(model: Path) -> Iterator[Node]:
    """One that has every tensor of the model; its segment is gone at the end."""
    url = f"http://127.0.0.1:{NODE_PORT}"
    namespace = f"restart-{os.getpid()}"
    options = ("--model", "tiny", "--namespace", namespace, "--node-id", "n0", "--fill", "disk")
    command = [sys.executable, "-m", "app.cli", "serve", *options, "--include", "all", "--checkpoint", str(model)]
    process = subprocess.Popen(
        [*command, "--listen", f"127.0.0.1:{NODE_PORT}"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=die_with_parent,
    )

    def is_ready() -> bool:
        try:
            return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    try:
        wait_until(is_ready, "the node has everything", 600)
        yield Node(url, process)
    finally:
        process.terminate()
        process.wait()
        for segment in Path("/dev/shm").glob(f"hotspare.{namespace}*"):
            segment.unlink()


def start(model: Path, log: Path, environment: Mapping[str, str], device: Device = CPU) -> tuple[float, float, Answer]:
    """Seconds from the start to the first answer, of these for weights, and the answer; the server is killed then."""
    began_s = time.monotonic()
    server = Server(model, PORT, log, environment=environment, device=device)
    try:
        server.wait_ready()
        answer = server.ask(PROMPTS[0])
        first_s = time.monotonic() - began_s
        return first_s, float(server.lines(WEIGHTS)[0][1]), answer
    finally:
        server.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gb", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as scratch:
        model = tiny.write(Path(scratch) / "model", "qwen3", experts=EXPERTS, width=width_of(options.gb))
        log = Path(scratch) / "sglang.log"
        taken: dict[str, list[tuple[float, float]]] = {}
        with node(model) as kept:
            ways: dict[str, tuple[Callable[[Path], None], dict[str, str]]] = {
                "memory": (drop_from_cache, {"HOTSPARE_URL": kept.url}),
                "disk, warm": (read_into_cache, {}),
                "disk, cold": (drop_from_cache, {}),
            }
            answers = [start(model, log, {})[2]]  # not counted: it brings SGLang's own files into the page cache
            for _ in range(options.rounds):
                for name, (prepare, environment) in ways.items():
                    prepare(model)
                    first_s, weights_s, answer = start(model, log, environment)
                    taken.setdefault(name, []).append((first_s, weights_s))
                    answers.append(answer)
        assert all(answer == answers[0] for answer in answers)
    for name, both in taken.items():
        first_s, weights_s = (statistics.median(column) for column in zip(*both, strict=True))
        sys.stdout.write(f"{name:12} first answer {first_s:6.1f} s, of which weights {weights_s:6.2f} s\n")


if __name__ == "__main__":
    main()

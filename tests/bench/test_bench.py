"""Benchmarks run, at a tiny size: a script that nobody runs for weeks breaks unnoticed.

Each is started as a person starts it, from another directory and with a place of its own for temporary files; its
figures are read as they are printed, and no value of theirs is judged here. What it made must be gone with it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from tests.processes import ROOT

BENCH = ROOT / "tests" / "bench"
DEADLINE_S = 280.0
NUMBER = r"\d+(\.\d+)?"
# script → a tiny size, and the lines that it must print, as patterns
FIGURES: dict[str, tuple[str, Sequence[str]]] = {
    "adopt": ("--gib 0.01 --large-gib 0 --layers 0 --rounds 1", ["restart to ready", "without checkpoint", "imports"]),
    "attach": (
        "--layers 2 --experts 3 --readers 1 --rounds 1",
        ["first tensor, 6 blocks", "fresh process", r"and 1 processes, of one copy +1\.\d+ "],
    ),
    "expert": ("--layers 5 --experts 2 --rounds 2", [r"one expert from a peer, of 4 blocks", "whole map takes"]),
    "fill": ("--gib 0.01 --large-gib 0 --rounds 1", ["of bare preadv", "memory beyond the segment"]),
    "peer_restore": ("--gib 0.01 --rounds 1", ["of a bare read loop", "page cache warm", "files dropped from it"]),
    "placement": ("--layers 2 --experts 8 --clusters 1", [r"\| 3 → 4 \| 2 \|", r"\| 63 → 64 \| 3 \|"]),
    "plan": ("--blocks 33 --runs 1", ["the ledger, 33 blocks"]),
    "push": ("--gib 0.01 --rounds 1", ["of a bare read loop", "read back"]),
    "slot_restore": (
        "--gb 0.001 --experts 1 --layers 1",
        ["into slots / memcpy", "restore / memcpy then checksums", "proof of slots / checksums", "the ledger"],
    ),
}
ON_GPUS = sorted(path.name for path in BENCH.glob("gpu_*.py"))


def run(script: str, options: str, place: Path) -> str:
    """What the script prints on its standard output. Everything that is left of it afterwards is a failure."""
    environment = {**os.environ, "TMPDIR": str(place), "PYTHONWARNINGS": "ignore"}
    with subprocess.Popen(
        [sys.executable, str(BENCH / script), *options.split()],
        cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            printed, errors = process.communicate(timeout=DEADLINE_S)
        finally:
            process.kill()
    assert process.returncode == 0, errors[-2000:]
    assert leftovers(process.pid, place) == []
    return printed


def leftovers(pid: int, place: Path) -> list[str]:
    """Files, segments and processes of a script that had that process id and that place for temporary files."""
    segments = [name for name in os.listdir("/dev/shm") if f".bench-{pid}-" in name]
    return [*(str(path) for path in place.iterdir()), *segments, *map(str, processes_of(place))]


def processes_of(place: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TMPDIR") == str(place) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:  # it has just ended, or is another user's
            continue
    return found


@pytest.mark.parametrize("script", FIGURES)
def test_a_benchmark_prints_its_figures_and_leaves_nothing(script: str, tmp_path: Path) -> None:
    options, lines = FIGURES[script]
    printed = run(f"{script}_figures.py", options, tmp_path)
    for line in lines:
        assert re.search(rf"^.*{line}.*{NUMBER}", printed, re.MULTILINE), f"no {line!r} in:\n{printed}"


def test_every_benchmark_is_run_here() -> None:
    assert {f"{name}_figures.py" for name in FIGURES} == {path.name for path in BENCH.glob("*_figures.py")}


@pytest.mark.parametrize("script", ON_GPUS)
def test_a_benchmark_for_gpus_can_be_imported_where_there_is_none_and_says_what_it_takes(
    script: str, tmp_path: Path
) -> None:
    assert "--gb" in run(script, "--help", tmp_path)

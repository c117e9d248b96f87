"""A restart that adopts a sealed segment: from the start of the process to ready.

    python tests/bench/adopt_figures.py [--gib 1] [--large-gib 8] [--layers 61] [--rounds 5]

A real `hotspare serve` fills itself from a checkpoint, is killed with SIGKILL, and is started again on the segment it
left; then killed and started again, and so on. Counted is from just before the process is started to the 200 of
/readyz, so the interpreter's own start is in it. With the checkpoint there, its headers are read and compared; the
last row of each size is a restart whose checkpoint directory is gone, and which names a peer that takes connections and
never answers. The baseline is a Python that only imports the web framework and the transfer engine.

The checkpoints have real headers, and holes for content: no byte of it is read when the segment is adopted. The last
one has all 14,848 blocks of DeepSeek-V3, each of them small: what it costs to look at that many tensors.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from workbench import GIB, WHOLE_MODEL, Bench, Daemon, Figure, arguments, bench, shape_of, tell

from shm import posix

READY_S_MAX = 1.0
NODE = "adopter"
FLOOR = "import fastapi, uvicorn, httpx, mooncake.engine"


def fill(made: Bench, directory: Path) -> int:
    """Fill a node from the checkpoint and kill it; the segment's size in bytes."""
    with Daemon(made, NODE, "--checkpoint", str(directory), "--fill", "disk") as daemon:
        daemon.wait_until_ready()
        daemon.end(signal.SIGKILL)
    return os.stat(f"/dev/shm/{made.name(NODE).object_name}").st_size


def restarts(made: Bench, rounds: int, *options: str) -> list[float]:
    """Seconds of each restart to ready."""
    seconds = []
    for _ in range(rounds):
        with Daemon(made, NODE, *options) as daemon:
            seconds.append(daemon.wait_until_ready())
            daemon.end(signal.SIGKILL)
    return seconds


@contextlib.contextmanager
def silent_peer() -> Iterator[str]:
    """The URL of a peer that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def floor(rounds: int) -> list[float]:
    seconds = []
    for _ in range(rounds):
        started = time.monotonic()
        subprocess.run([sys.executable, "-c", FLOOR], check=True, capture_output=True)
        seconds.append(time.monotonic() - started)
    return seconds


def figure(what: str, seconds: list[float], target_s: float | None = READY_S_MAX) -> Figure:
    median_s = statistics.median(seconds)
    return Figure(
        what, f"{median_s:.2f} s", "-" if target_s is None else f"at most {target_s:.0f} s",
        None if target_s is None else median_s <= target_s, f"{min(seconds):.2f} to {max(seconds):.2f}",
    )  # fmt: skip


def main() -> None:
    options = arguments(
        __doc__,
        gib=(1.0, "GiB of experts in the first segment"),
        large_gib=(8.0, "GiB of experts in the second; 0 leaves it out"),
        layers=(WHOLE_MODEL["layers"], "DeepSeek-V3's layers, of which the first 3 have no experts; 0 leaves it out"),
        rounds=(5, "restarts of each kind"),
    )
    figures, document = [], {}
    with bench() as made:
        shapes = {f"{size:g} GiB": shape_of(int(size * GIB)) for size in (options.gib, options.large_gib) if size}
        if options.layers:
            shapes["DeepSeek-V3's blocks"] = {**WHOLE_MODEL, "layers": options.layers}
        for size, shape in shapes.items():
            directory = made.checkpoint("checkpoint", shape, sparse=True)
            nbytes = fill(made, directory)
            document[size] = taken = restarts(made, options.rounds, "--checkpoint", str(directory))
            figures.append(figure(f"restart to ready, {size}, {nbytes / GIB:.1f} GiB", taken))
            shutil.rmtree(directory)
            with silent_peer() as url:
                alone = ("--checkpoint", str(directory), "--peer", f"elsewhere={url}", "--replicas", "2")
                document[f"{size}, alone"] = taken = restarts(made, options.rounds, *alone)
            figures.append(figure("  the same without checkpoint and peer", taken))
            posix.unlink(made.name(NODE).object_name)
        document["floor_s"] = floor(options.rounds)
    figures.append(figure("a Python that imports as much", document["floor_s"], None))
    tell(figures, document, as_json=options.json)


if __name__ == "__main__":
    main()

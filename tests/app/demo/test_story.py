"""The demo as a process: it tells the truth, and leaves nothing behind however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from app.demo.story import checkpoint_shape, fitted_shape, shm_nbytes
from shm.errors import SharedMemoryFull
from shm.lookup import object_names
from tests.processes import ROOT, wait_until
from transfer.checkpoint.synth import plan_checkpoint

DEADLINE_S = 240.0  # for the whole story, with processes that are started anew, on a busy machine
TINY = "0.02"


class Demo:
    """A `hotspare demo` process with a temporary directory of its own."""

    def __init__(self, directory: Path, *options: str, prefix: Sequence[str] = ()) -> None:
        self.temporary = directory / "tmp"
        self.temporary.mkdir()
        self.out, self.err = directory / "out", directory / "err"
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HOTSPARE_")}
        # A node's own settings in the environment are not for the demo's nodes.
        hostile = {"HOTSPARE_TOKEN": "t0ken", "HOTSPARE_PEERS": "x=http://127.0.0.1:1", "HOTSPARE_FILL": "peer"}
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "app.cli", "demo", "--size-gib", TINY, *options],
                stdout=out, stderr=err, cwd="/",
                env=kept | hostile | {"PYTHONPATH": str(ROOT), "TMPDIR": str(self.temporary)},
            )  # fmt: skip

    @property
    def objects(self) -> list[str]:
        return [name for name in object_names() if name.startswith(f"hotspare.demo-{self.process.pid}.")]

    def processes(self) -> list[psutil.Process]:
        """Every living process that this demo started, by its temporary directory."""
        found = []
        for process in psutil.process_iter():
            try:
                started_here = process.environ().get("TMPDIR") == str(self.temporary)
                if started_here and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        wait_until(condition, f"{what}:\n{self.err.read_text()}", DEADLINE_S)

    def wait(self) -> int:
        return self.process.wait(DEADLINE_S)

    def left(self) -> list[object]:
        return [*self.objects, *self.processes(), *self.temporary.iterdir()]

    def wait_until_clean(self) -> None:
        self.wait_until(lambda: not self.left(), "clean")


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Callable[..., Demo]]:
    started: list[Demo] = []

    def start(*options: str, prefix: Sequence[str] = ()) -> Demo:
        started.append(Demo(tmp_path, *options, prefix=prefix))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.wait()
        each.wait_until_clean()


def test_it_brings_a_lost_node_back_from_memory_and_from_disk_and_every_byte_is_right(
    demo: Callable[..., Demo],
) -> None:
    ran = demo("--json")
    assert ran.wait() == 0, ran.err.read_text()
    assert ran.left() == []
    shown = ran.err.read_text()  # what people see goes where it does not disturb the document
    assert "every byte was identical" in shown
    assert "node-b refilled from its peers" in shown
    assert "transfer_metadata" not in shown, "the engine's chatter"
    facts = json.loads(ran.out.read_text())
    assert facts["ok"]
    assert facts["checkpoint"]["files"] > 1
    of_segments = [each for each in facts["comparisons"] if "replicas_min" in each]
    of_slots = [each for each in facts["comparisons"] if "replicas_min" not in each]
    assert (len(of_segments), len(of_slots)) == (5, 3)
    for comparison in of_slots:
        assert comparison["ok"], comparison
        assert comparison["tensors"] > 0
    for comparison in of_segments:
        assert (comparison["differing"], comparison["unexpected"], comparison["replicas_min"]) == ([], [], 2)
        assert comparison["compared"] == 2 * comparison["tensors"] > 0
    moving = [act for act in facts["acts"] if act["blocks"]]
    filled, from_peers, from_warm_disk, from_cold_disk, refilled, refilled_alone, adopted, pushed = moving
    assert from_peers["bytes_by_source"]["peer"] > 0
    assert from_peers["bytes_by_source"]["disk"] == 0
    for from_disk in (from_warm_disk, from_cold_disk):
        assert from_disk["bytes_by_source"]["disk"] == from_peers["bytes_by_source"]["peer"]
        assert from_disk["bytes_by_source"]["peer"] == 0
        assert from_disk["gb_per_s"] > 0
    assert adopted["gb_per_s"] is None
    for into_slots in (refilled, refilled_alone, pushed):
        assert into_slots["bytes_by_source"] == refilled["bytes_by_source"]
        assert into_slots["bytes_by_source"]["local"] > into_slots["bytes_by_source"]["peer"] > 0
        assert into_slots["gb_per_s"] > 0
    assert filled["blocks"] == 2 * 6 * facts["comparisons"][0]["tensors"] // 36


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_half_way_it_leaves_nothing(demo: Callable[..., Demo], number: int) -> None:
    ran = demo()
    ran.wait_until(lambda: len(ran.objects) == 3, "three segments")
    ran.process.send_signal(number)
    ran.process.send_signal(number)  # the impatient press twice
    assert ran.wait() == 1
    assert ran.left() == []
    assert "interrupted" in ran.out.read_text()


def test_killed_half_way_it_leaves_nothing(demo: Callable[..., Demo]) -> None:
    ran = demo()
    ran.wait_until(lambda: len(ran.objects) == 3, "three segments")
    ran.process.kill()
    ran.process.wait()
    ran.wait_until_clean()


def test_a_node_that_cannot_start_ends_it_with_the_nodes_own_words(demo: Callable[..., Demo]) -> None:
    ran = demo()
    ran.wait_until(lambda: any("node-c" in name for name in ran.objects), "node-c is there")
    for process in ran.processes():
        if "node-c" in process.cmdline():
            process.kill()
    assert ran.wait() == 1
    assert "node-c ended before it was ready" in ran.err.read_text()
    assert "Traceback" not in ran.err.read_text()
    assert ran.left() == []


def test_interrupted_while_it_writes_the_checkpoint_it_leaves_nothing(demo: Callable[..., Demo]) -> None:
    ran = demo("--size-gib", "0.4")
    ran.wait_until(lambda: any(ran.temporary.glob("*/checkpoint/.*.part")), "writing")
    ran.process.send_signal(signal.SIGINT)
    assert ran.wait() == 1
    assert ran.left() == []


@pytest.mark.parametrize("gib", [0.01, 0.05, 0.333, 1, 7])
def test_the_checkpoint_has_about_the_size_asked_for(gib: float) -> None:
    shape = checkpoint_shape(round(gib * 2**30))
    plan = plan_checkpoint("deepseek-v3", **shape)
    assert 0.75 < plan.nbytes / (gib * 2**30) < 1.5
    assert len(plan.files) >= 4
    assert any(".shared_experts." in tensor.name for file in plan.files for tensor in file.tensors)


@pytest.mark.parametrize("shm_free", [33_333_333, 111_111_111, 1 << 31])
@pytest.mark.parametrize("disk_free", [22_222_222, 333_333_333, 1 << 40])
def test_the_checkpoint_fits_into_what_is_free(shm_free: int, disk_free: int) -> None:
    plan = plan_checkpoint("deepseek-v3", **fitted_shape(1 << 30, shm_free, disk_free))
    assert shm_nbytes(plan) < shm_free
    assert plan.nbytes < disk_free
    grown = checkpoint_shape(int(1.5 * plan.nbytes))
    room = plan_checkpoint("deepseek-v3", **grown)
    assert plan.nbytes > 0.7 * (1 << 30) or shm_nbytes(room) > 0.9 * shm_free or room.nbytes > 0.9 * disk_free


def test_no_room_for_the_smallest_one_is_said() -> None:
    with pytest.raises(SharedMemoryFull):
        fitted_shape(1 << 30, 3_333_333, 1 << 40)


def test_with_little_shared_memory_it_takes_a_smaller_checkpoint_and_says_so(demo: Callable[..., Demo]) -> None:
    in_little = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=30m tmpfs /dev/shm && exec "$@"', "sh"]
    if subprocess.run([*in_little, "true"], capture_output=True, check=False).returncode:
        pytest.skip("a small /dev/shm needs a mount namespace, and so root")
    ran = demo("--size-gib", "0.05", prefix=in_little)
    assert ran.wait() == 0, ran.err.read_text()
    shown = ran.out.read_text()
    assert "31.46 MB free in /dev/shm" in shown
    assert "every byte was identical" in shown

"""The demo as a process: it tells the truth, and leaves nothing behind however it ends."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from app.demo import page_cache
from app.demo.comparison import compare
from app.demo.fleet import free_ports
from app.demo.interruption import Interrupted, Interruption
from app.demo.janitor import sweep
from app.demo.rank import Checkpoint, Rank
from app.demo.story import checkpoint_shape
from shm.attachment import attach
from shm.layout import SegmentName
from shm.lookup import object_names
from shm.segment import Segment
from transfer.checkpoint import read_checkpoint
from transfer.checkpoint.reader import BlockReader
from transfer.checkpoint.synth import plan_checkpoint, write_checkpoint

DEADLINE_S = 60
TINY = "0.02"
ROOT = Path(__file__).parents[3]


class Demo:
    """A `hotspare demo` process with a temporary directory of its own."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.temporary = directory / "tmp"
        self.temporary.mkdir()
        self.out, self.err = directory / "out", directory / "err"
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HOTSPARE_")}
        # A node's own settings in the environment are not for the demo's nodes.
        hostile = {"HOTSPARE_TOKEN": "t0ken", "HOTSPARE_PEERS": "x=http://127.0.0.1:1", "HOTSPARE_FILL": "peer"}
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "app.cli", "demo", "--size-gib", TINY, *options],
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
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline, f"never {what}: {self.out.read_text()} {self.err.read_text()}"
            time.sleep(0.01)

    def wait(self) -> int:
        return self.process.wait(DEADLINE_S)

    def left(self) -> list[object]:
        return [*self.objects, *self.processes(), *self.temporary.iterdir()]

    def wait_until_clean(self) -> None:
        self.wait_until(lambda: not self.left(), "clean")


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Callable[..., Demo]]:
    started: list[Demo] = []

    def start(*options: str) -> Demo:
        started.append(Demo(tmp_path, *options))
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
    ran = demo("--size-gib", "2")
    ran.wait_until(lambda: any(ran.temporary.glob("*/checkpoint/.*.part")), "writing")
    ran.process.send_signal(signal.SIGINT)
    assert ran.wait() == 1
    assert ran.left() == []


# -- its parts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gib", [0.01, 0.05, 0.333, 1, 7])
def test_the_checkpoint_has_about_the_size_asked_for(gib: float) -> None:
    shape = checkpoint_shape(round(gib * 2**30))
    plan = plan_checkpoint("deepseek-v3", **shape)
    assert 0.75 < plan.nbytes / (gib * 2**30) < 1.5
    assert len(plan.files) >= 4
    assert any(".shared_experts." in tensor.name for file in plan.files for tensor in file.tensors)


def test_the_comparison_sees_one_byte_a_lost_tensor_and_one_that_is_no_experts(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoint"
    write_checkpoint(directory, "deepseek-v3", layers=4, experts=5, scale=0.03125, file_nbytes=333_333)
    opened = read_checkpoint(directory, "m", "all")
    name = SegmentName(f"test-demo-{os.getpid()}", "m", "a")
    segment = Segment.claim(name)
    try:
        segment.allocate(opened.manifest, range(len(opened.manifest)))
        disk = BlockReader(opened)
        for row in range(len(opened.manifest)):
            segment.publish(row, disk.read_block(row, segment.block(row)))
        disk.close()
        segment.seal()
        with attach("m", namespace=name.namespace) as weights:
            found = compare(directory, {"a": weights})
            assert (found.tensors, found.compared, found.replicas_min, found.differing) == (30, 30, 1, [])
            assert any("shared_experts" in each for each in found.unexpected), "the dense ones are none of experts"
            assert not found.ok
            row = opened.manifest.index(3, 4)
            segment.block(row)[-1] ^= 0x80
            (difference,) = compare(directory, {"a": weights}).differing
            assert difference == f"{opened.manifest.block(row).tensors[-1].name} on a"
            segment.quarantine(row)
            lacking = compare(directory, {"a": weights})
            assert (lacking.tensors, lacking.compared, lacking.replicas_min, lacking.ok) == (30, 24, 0, False)
    finally:
        segment.unlink()


def test_the_page_cache_can_be_dropped_warmed_and_looked_at(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_bytes(os.urandom(3_333_333))
    page_cache.drop(paths[:1])
    dropped = page_cache.resident_share(paths[:1])
    assert page_cache.resident_share(paths) == pytest.approx((dropped + 1) / 2, abs=0.01)
    page_cache.warm(paths)
    assert page_cache.resident_share(paths) == 1
    page_cache.drop(paths)
    assert page_cache.resident_share(paths) in (0, 1), "1 on a file system that lives in memory"


def test_the_janitor_removes_its_own_and_nothing_else(tmp_path: Path) -> None:
    prefix = f"hotspare.test-demo-{os.getpid()}."
    ours, others = Path(f"/dev/shm/{prefix}m.a"), Path(f"/dev/shm/{prefix[:-1]}0.m.a")
    directory = tmp_path / "d"
    (directory / "deep").mkdir(parents=True)
    try:
        for path in (ours, others):
            path.write_bytes(b"x" * 333)
        assert sweep(prefix, str(directory))
        assert (ours.exists(), others.exists(), directory.exists()) == (False, True, False)
        assert not sweep(prefix, str(directory))
    finally:
        for path in (ours, others):
            path.unlink(missing_ok=True)


def test_an_interruption_waits_for_a_safe_point_or_comes_at_once_where_allowed() -> None:
    with Interruption() as interruption:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted):
            interruption.check()
        with pytest.raises(Interrupted), interruption.at_once():
            pytest.fail("it had come before")
    with Interruption() as interruption, pytest.raises(Interrupted), interruption.at_once():
        signal.raise_signal(signal.SIGHUP)


def test_free_ports_are_distinct() -> None:
    assert len(set(free_ports(33))) == 33


def test_noise_in_an_engines_slots_is_seen(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", "deepseek-v3", layers=5, experts=3, scale=1 / 32)
    with ExitStack() as stack:
        rank = Rank(Checkpoint(tmp_path / "c", stack))
        rank.spoil()
        found = rank.compare()
    assert not found["ok"]
    assert found["tensors"] == 2 * 3 * 6, "two layers; half of three experts and three redundant ones; six tensors each"
    assert len(found["differing"]) == found["tensors"]

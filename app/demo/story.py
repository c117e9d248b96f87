"""The demo's story, step by step."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson

from app.demo import page_cache
from app.demo.comparison import EXPERT_MARK
from app.demo.fleet import MODEL, REPLICAS, DemoFailed, Fleet, die_with_parent, environment
from app.demo.interruption import Interrupted, Interruption
from app.demo.rank_process import RankProcess, rank_beside
from app.demo.stage import Act, Stage
from app.terminal.restore_bar import Show, bar, came_from, seconds_of, watch
from app.terminal.units import rate, size
from shm.block import tensor_nbytes
from shm.errors import SharedMemoryFull
from shm.layout import PREFIX
from shm.posix import free_nbytes
from transfer.checkpoint.synth import FILE_NBYTES, SynthPlan, plan_checkpoint, write_checkpoint

FAMILY = "deepseek-v3"
LAYERS = 9  # three of them dense, as the model has them
EXPERTS_MIN = 7
EXPERTS_MAX = 256  # the model's own
SCALES = (1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125)
FILES_MIN = 4  # a real checkpoint has several
LOST_NODE = "node-b"
ASKED_NODE = "node-a"  # the restore of one node is asked of another
JANITOR_TIMEOUT_S = 30.0
POLL_S = 0.05
DIFFERENCES_SHOWN = 5
SEGMENT_OVERHEAD_NBYTES = 1 << 20  # of each node: header, manifest, block table, and what alignment costs
FIT_MARGIN = 0.95  # of what is free: somebody else may want some of it meanwhile
FIT_TRIES_MAX = 20


def checkpoint_shape(nbytes: int) -> dict[str, Any]:
    """Arguments of `write_checkpoint` for about so many bytes, with matrices as large as they can be."""

    def total(scale: float, experts: int) -> int:
        return plan_checkpoint(FAMILY, layers=LAYERS, experts=experts, scale=scale).nbytes

    scale = next((s for s in SCALES if total(s, EXPERTS_MIN) <= nbytes), SCALES[-1])
    fixed = total(scale, EXPERTS_MIN)
    each = (total(scale, 2 * EXPERTS_MIN) - fixed) / EXPERTS_MIN
    experts = min(EXPERTS_MAX, max(EXPERTS_MIN, EXPERTS_MIN + round((nbytes - fixed) / each)))
    return {
        "layers": LAYERS, "experts": experts, "scale": scale,
        "file_nbytes": min(FILE_NBYTES, total(scale, experts) // FILES_MIN),
    }  # fmt: skip


def shm_nbytes(plan: SynthPlan) -> int:
    """What the nodes need in /dev/shm together: every expert as often as there are replicas."""
    tensors = (tensor for file in plan.files for tensor in file.tensors)
    experts = sum(tensor_nbytes(each.dtype, each.shape) for each in tensors if EXPERT_MARK in each.name)
    return experts * REPLICAS + len(Fleet.NODE_IDS) * SEGMENT_OVERHEAD_NBYTES


def fitted_shape(nbytes: int, shm_free: int, disk_free: int) -> dict[str, Any]:
    """`checkpoint_shape` of so many bytes, or of as many as there is room for.

    Raises SharedMemoryFull where not even the smallest fits into /dev/shm; of the disk, writing tells.
    """
    for _ in range(FIT_TRIES_MAX):
        shape = checkpoint_shape(nbytes)
        plan = plan_checkpoint(FAMILY, **shape)
        room = FIT_MARGIN * min(shm_free / shm_nbytes(plan), disk_free / plan.nbytes)
        if room >= 1:
            return shape
        nbytes = int(min(nbytes, plan.nbytes) * room)
    if shm_nbytes(plan) > FIT_MARGIN * shm_free:
        raise SharedMemoryFull(shm_nbytes(plan), shm_free)
    return shape


@contextmanager
def workplace(namespace: str) -> Iterator[Path]:
    """A directory for the demo. It and every segment of the namespace are removed at the end, whatever the end is."""
    directory = Path(tempfile.gettempdir(), f"hotspare-{namespace}-{secrets.token_hex(4)}")
    janitor = subprocess.Popen(
        [sys.executable, "-m", "app.demo.janitor", f"{PREFIX}.{namespace}.", str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        cwd="/",
        env=environment(),
        start_new_session=True,  # it outlives the demo, and a signal to its process group
    )
    try:
        directory.mkdir(mode=0o700)
        yield directory
    finally:
        janitor.communicate(timeout=JANITOR_TIMEOUT_S)


@contextmanager
def fleet_of(namespace: str, checkpoint: Path, logs: Path, interruption: Interruption) -> Iterator[Fleet]:
    fleet = Fleet(namespace, checkpoint, logs, interruption)
    try:
        yield fleet
    finally:
        fleet.stop()


def run(nbytes: int, *, as_json: bool) -> bool:
    """Tell the story with a checkpoint of about `nbytes`; whether every byte was right. Leaves nothing behind."""
    from rich.console import Console

    from app.terminal.console import stdout, write_json

    console = Console(stderr=True, highlight=False) if as_json else stdout()
    namespace = f"demo-{os.getpid()}"
    try:
        with Interruption() as interruption, workplace(namespace) as directory:
            checkpoint, logs = directory / "checkpoint", directory / "logs"
            logs.mkdir()
            with fleet_of(namespace, checkpoint, logs, interruption) as fleet:
                story = Story(Stage(console, interruption), fleet, checkpoint, interruption)
                story.tell(nbytes)
    except Interrupted:
        console.print("interrupted: the nodes are stopped, their segments and the checkpoint are removed")
        return False
    story.show()
    if as_json:
        write_json(story.facts())
    return story.ok


class Story:
    """The steps, in order, and what came of them."""

    def __init__(self, stage: Stage, fleet: Fleet, checkpoint: Path, interruption: Interruption) -> None:
        self.interruption = interruption
        self.stage = stage
        self.fleet = fleet
        self.checkpoint = checkpoint
        self.plan: SynthPlan | None = None
        self.comparisons: list[dict[str, Any]] = []

    @property
    def ok(self) -> bool:
        return bool(self.comparisons) and all(comparison["ok"] for comparison in self.comparisons)

    def tell(self, nbytes: int) -> None:
        self.write_checkpoint(nbytes)
        self.fill_nodes()
        self.compare()
        self.lose_node()
        self.restore("peer")
        self.compare()
        for prepare in (page_cache.warm, page_cache.drop):
            self.lose_node()
            self.restore("disk", prepare)
            self.compare()
        node = self.fleet.nodes[LOST_NODE]
        log = self.fleet.logs / "rank.log"
        with rank_beside(node, self.checkpoint, self.fleet.namespace, log, self.interruption) as rank:
            self.refill_slots(rank, f"an engine's slots beside {LOST_NODE} refilled")
            node.kill()
            self.refill_slots(rank, f"the same while {LOST_NODE} is dead")
            self.adopt()
            self.compare()
            self.push(rank)

    # -- steps -----------------------------------------------------------------------------------------------

    def write_checkpoint(self, nbytes: int) -> None:
        shape = self._shape(nbytes)
        with self.stage.act("write a checkpoint like DeepSeek-V3's") as act:
            with self.interruption.at_once():
                self.plan = write_checkpoint(self.checkpoint, FAMILY, **shape)
            tensors = sum(len(file.tensors) for file in self.plan.files)
            act.note = f"{size(self.plan.nbytes)}, {tensors} tensors in {len(self.plan.files)} files"

    def _shape(self, nbytes: int) -> dict[str, Any]:
        """That of the checkpoint; says so where there is no room for what was asked."""
        shm_free, disk_free = free_nbytes(), shutil.disk_usage(self.checkpoint.parent).free
        shape = fitted_shape(nbytes, shm_free, disk_free)
        if shape != checkpoint_shape(nbytes):
            self.stage.console.print(
                f"{size(shm_free)} free in /dev/shm and {size(disk_free)} in {tempfile.gettempdir()}: the checkpoint "
                f"has {size(plan_checkpoint(FAMILY, **shape).nbytes)} and not {size(nbytes)}",
                markup=False,
            )
        return shape

    def fill_nodes(self) -> None:
        with self.stage.act("three nodes filled", spin=False) as act:
            for node_id in self.fleet.nodes:
                self.fleet.start(node_id, "auto")
            with bar(self.stage.console, "filling three nodes") as show:
                for node in self.fleet.nodes.values():
                    node.wait_until_ready(lambda: show(self.fleet.filling()))
            self._record(act, self.fleet.filling())
            act.note = f"{came_from(self.fleet.filling())}, all ready, from the start of the processes"

    def compare(self) -> None:
        """Attach from another process, and compare every tensor with the checkpoint."""
        compared = self.stage.acts[-1]
        with self.stage.act("  attach from another process, compare with the checkpoint") as act:
            found = self._compare()
            act.note = self._conclude(compared, found)
        self._show_differences(found)

    def _show_differences(self, found: Mapping[str, Any]) -> None:
        for difference in (found["differing"] + found.get("unexpected", []))[:DIFFERENCES_SHOWN]:
            self.stage.console.print(f"           {difference}", markup=False)

    def _conclude(self, compared: Act, found: Mapping[str, Any]) -> str:
        """Note what a comparison found after an act; in a line."""
        self.comparisons.append({"after": compared.what, **found})
        verdict = "identical" if found["ok"] else "DIFFERENT"
        compared.verified = f"{found['tensors']} {verdict}"
        replicas = f", {found['replicas_min']} replicas" if "replicas_min" in found else ""
        return f"{found['tensors']} tensors{replicas}, {size(found['nbytes'])}: {verdict}"

    def _compare(self) -> dict[str, Any]:
        command = [sys.executable, "-m", "app.demo.comparison", str(self.checkpoint), MODEL, self.fleet.namespace]
        with subprocess.Popen(
            [*command, *self.fleet.nodes],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=self.checkpoint,
            env=environment() | {"OMP_NUM_THREADS": "1"},  # comparing is no work for threads that spin
            start_new_session=True,
            preexec_fn=die_with_parent,
        ) as process:
            try:
                out, err = self._outcome(process)
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            raise DemoFailed(f"the comparison failed:\n{err.decode(errors='replace')}")
        found: dict[str, Any] = orjson.loads(out)
        return found

    def _outcome(self, process: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
        while True:
            self.interruption.check()
            try:
                return process.communicate(timeout=POLL_S)
            except subprocess.TimeoutExpired:
                continue

    def lose_node(self) -> None:
        with self.stage.act(f"{LOST_NODE} killed (SIGKILL), its segment removed, started again empty") as act:
            lost = self.fleet.kill_and_forget(LOST_NODE)
            self.fleet.start(LOST_NODE, "none").wait_until_answering()
            act.note = f"{size(lost)} lost, it is {self.fleet.nodes[LOST_NODE].get('/v1/node')['state']}"

    def restore(self, source: str, prepare: Callable[[Sequence[Path]], None] | None = None) -> None:
        """Ask another node, over REST, to restore the lost one, and watch until it is ready."""
        what = f"{LOST_NODE} refilled from {'its peers' if source == 'peer' else source}"
        if prepare is not None:
            files = sorted(self.checkpoint.glob("*.safetensors"))
            prepare(files)
            what += f", {page_cache.resident_share(files):.0%} cached"
        with self.stage.act(what, spin=False) as act, bar(self.stage.console, what) as show:
            ended = self._ask_for({"target": {"node_id": LOST_NODE}, "sources": [source]}, show)
            self.fleet.nodes[LOST_NODE].wait_until_ready()
            self._record(act, ended)
            act.seconds = seconds_of(ended)
            act.note = f"{came_from(ended)}, {rate(act.moved_nbytes, act.seconds)}"

    def _ask_for(self, body: Mapping[str, Any], show: Show) -> Mapping[str, Any]:
        """Have ASKED_NODE start a restore, and watch it to its end."""
        asked = self.fleet.nodes[ASKED_NODE]
        started = asked.post("/v1/restores", body)

        def fetch() -> Mapping[str, Any]:
            self.interruption.check()
            return asked.get(f"/v1/restores/{started['id']}")

        ended = watch(fetch, show)
        if ended["state"] != "succeeded":
            raise DemoFailed(f"the restore of {body['target']} {ended['state']}: {ended['error']}")
        return ended

    def refill_slots(self, rank: RankProcess, what: str) -> None:
        """An engine fills its own slots: from the segment that it attached, and from other nodes' memory."""
        with self.stage.act(what) as act:
            answer = rank.ask("restore")
            if answer["failed"]:
                raise DemoFailed(f"{len(answer['failed'])} experts could not be had, first {answer['failed'][0]}")
            self._record(act, answer)
            act.is_copied = True
            act.seconds = answer["seconds"]
            act.note = f"{came_from(answer)}, {rate(act.moved_nbytes, act.seconds)}"
        self._compare_slots(rank)

    def push(self, rank: RankProcess) -> None:
        """Nodes fill the engine's slots, and no code of its own runs: any node may be asked for that."""
        consumer = rank.ask("wait")["consumer_id"]
        with self.stage.act(f"the engine's slots written by the nodes, asked of {ASKED_NODE}") as act:
            ended = self._ask_for({"target": {"consumer_id": consumer}, "sources": ["peer"]}, lambda _: None)
            self._record(act, ended)
            act.is_copied = True
            act.seconds = seconds_of(ended)
            act.note = f"{came_from(ended)}, {rate(act.moved_nbytes, act.seconds)}"
        self._compare_slots(rank)

    def _compare_slots(self, rank: RankProcess) -> None:
        compared = self.stage.acts[-1]
        with self.stage.act("  compare the slots, in the engine, with the checkpoint") as act:
            found = rank.ask("compare")
            act.note = self._conclude(compared, found)
        self._show_differences(found)

    def adopt(self) -> None:
        """A killed daemon loses nothing: the next one takes the segment over."""
        node = self.fleet.nodes[LOST_NODE]
        with self.stage.act(f"{LOST_NODE} started again, its segment adopted") as act:
            self.fleet.start(LOST_NODE, "auto")
            node.wait_until_ready()
            document = node.get("/v1/node")
            self._record(act, {"blocks_done": document["blocks"], "bytes_by_source": {"local": document["bytes"]}})
            act.note = f"{size(document['bytes'])} were there; ready, from the start of the process"

    @staticmethod
    def _record(act: Act, document: Mapping[str, Any]) -> None:
        act.blocks = document["blocks_done"]
        act.bytes_by_source = dict(document["bytes_by_source"])

    # -- the end ---------------------------------------------------------------------------------------------

    def show(self) -> None:
        self.stage.show_table("Three nodes, two replicas of each block. `cached`: in the page cache before")
        nbytes = sum(comparison["nbytes"] for comparison in self.comparisons)
        verdict = "every byte was identical" if self.ok else "NOT EVERY BYTE WAS IDENTICAL"
        self.stage.console.print(
            f"{len(self.comparisons)} comparisons with the checkpoint, {size(nbytes)}: {verdict}", markup=False
        )

    def facts(self) -> dict[str, Any]:
        """What was done and found, for programs."""
        assert self.plan is not None
        return {
            "ok": self.ok,
            "checkpoint": {"like": FAMILY, "nbytes": self.plan.nbytes, "files": len(self.plan.files)},
            "acts": [asdict(act) | {"gb_per_s": act.gb_per_s} for act in self.stage.acts],
            "comparisons": self.comparisons,
        }

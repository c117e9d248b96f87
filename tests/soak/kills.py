"""A node is killed at any moment of a fill, an adoption, a mending or a growth: by the clock, or at a system call.

After it, its segment is right as far as anybody may attach to it, and nothing else is left; the node that is started
again has everything, and all of it is right.
"""

from __future__ import annotations

import random
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import httpx

from shm import attach
from shm.errors import HotspareError
from tests.processes import Daemon, wait_until
from tests.soak.ground import MODEL, Field, Ground, Traced
from tests.soak.images import expected_blocks, flip, look
from tests.soak.tally import Tally

SUBJECT, HELPER = "n0", "n1"
SCALE = 0.12
KILLS = 8  # of a round
TRACED_SHARE = 0.3  # of the starts: starting under strace takes seconds
CALLS = {  # by which system call it may be killed, and at most at which one of them
    "fallocate": 5, "ftruncate": 2, "pwrite64": 30, "unlink": 3, "mmap": 900, "preadv": 60, "fcntl": 30, "madvise": 40,
    "close": 400, "openat": 800, "sendmsg": 20, "futex": 400, "munmap": 60,
}  # fmt: skip
KILLED_WITHIN_S = 2.5  # of its start: it is filled after 1
TRACED_WITHIN_S = 45.0
READY_WITHIN_S = 120.0


class Scene:
    """A node that is killed again and again, and another that has everything."""

    def __init__(self, ground: Ground, field: Field, chance: random.Random, tally: Tally) -> None:
        self._field, self._chance, self._tally = field, chance, tally
        self._checkpoint = ground.checkpoint(chance.randrange(5), scale=SCALE)
        self._expected = expected_blocks(self._checkpoint)
        self._helper = field.serve(HELPER, (SUBJECT,), checkpoint=self._checkpoint, replicas=2).wait_ready()

    def run(self) -> None:
        for _ in range(KILLS):
            self._chance.choice((self._empty, self._spoil, self._shrink, lambda: None))()
            self._kill_once()
            self._look("after a kill")
            if self._chance.random() < 0.5:  # otherwise the next one is killed over what is left
                self._bring_back()
        self._bring_back()

    # -- what a life begins with -----------------------------------------------------------------------------

    def _empty(self) -> None:
        self._field.segment(SUBJECT).unlink(missing_ok=True)
        self._tally.note("empties the segment")

    def _spoil(self) -> None:
        """Flip a bit in some blocks: there is something to mend."""
        here = look(self._field.namespace, SUBJECT)
        if here is None or not here.is_sealed:
            return
        for row in self._chance.sample(here.published(), min(9, len(here.published()))):
            offset, nbytes = here.place(row)
            flip(self._field.namespace, SUBJECT, 8 * offset + self._chance.randrange(8 * nbytes))
        self._tally.note("spoils blocks")

    def _shrink(self) -> None:
        """Have a life among more nodes leave a segment of half of the blocks, which the next one extends."""
        self._empty()
        daemon = self._start(replicas=1)
        self._wait_ready(daemon)
        daemon.stop()
        self._tally.note("shrinks the segment to half")

    def _start(self, traced: Traced | None = None, replicas: int = 2) -> Daemon:
        fill = self._chance.choice(("auto", "disk", "peer"))
        return self._field.serve(
            SUBJECT, (HELPER,), checkpoint=self._checkpoint, traced=traced, replicas=replicas, fill=fill,
            scrub_rate="200MB",
        )  # fmt: skip

    # -- killing ---------------------------------------------------------------------------------------------

    def _kill_once(self) -> None:
        if shutil.which("strace") and self._chance.random() < TRACED_SHARE:
            self._kill_at_a_call()
        else:
            self._kill_by_the_clock()

    def _kill_by_the_clock(self) -> None:
        daemon, seconds = self._start(), self._chance.uniform(0, KILLED_WITHIN_S)
        with suppress(subprocess.TimeoutExpired):
            daemon.process.wait(seconds)
            self._tally.violation(f"a node ended by itself: {daemon.said()[-300:]}")
        if self._chance.random() < 0.3:
            with suppress(httpx.HTTPError):  # a restore of all, which is to be killed in the middle
                daemon.ask("POST", "/v1/restores", json={"target": {"node_id": SUBJECT}}, timeout=1)
        if self._chance.random() < 0.2:
            daemon.process.terminate()  # it is killed while it stops
            with suppress(subprocess.TimeoutExpired):
                daemon.process.wait(self._chance.uniform(0, 0.2))
        daemon.kill()
        self._tally.note(f"kills after {seconds:.2f} s")

    def _kill_at_a_call(self) -> None:
        call = self._chance.choice(sorted(CALLS))
        number = self._chance.randint(1, CALLS[call])
        daemon = self._start(Traced(call, number))
        wait_until(lambda: daemon.process.poll() is not None or self._is_ready(daemon), "its end", TRACED_WITHIN_S)
        is_ready = daemon.process.poll() is None
        daemon.kill()
        self._tally.note(f"kills {'after' if is_ready else 'at'} {call} number {number}")
        self._tally.did("kills at system calls" if not is_ready else "traced lives that outlived their call")

    def _is_ready(self, daemon: Daemon) -> bool:
        with suppress(httpx.HTTPError):
            return daemon.ask("GET", "/readyz", timeout=1).status_code == 200
        return False

    def _wait_ready(self, daemon: Daemon) -> None:
        def is_ready() -> bool:
            assert daemon.process.poll() is None, f"it ended with {daemon.process.returncode}: {daemon.said()[-300:]}"
            return self._is_ready(daemon)

        wait_until(is_ready, "it is ready", READY_WITHIN_S)

    # -- what is left ----------------------------------------------------------------------------------------

    def _look(self, when: str) -> None:
        """Whoever attaches gets right bytes, or is told, or refused."""
        names = {self._field.segment(node).name for node in (SUBJECT, HELPER)}
        if strangers := set(self._field.objects()) - names:
            self._tally.violation(f"{when}: {sorted(strangers)} are left in /dev/shm")
        try:
            with attach(MODEL, namespace=self._field.namespace, node=SUBJECT) as weights:
                told = {weights.manifest.index(*key) for key in weights.verify()}
                rows = weights.rows().tolist()
                wrong = {row for row in rows if bytes(weights.block(row)) != self._expected[row]}
        except HotspareError as error:
            self._tally.did(f"refusals: {type(error).__name__}")
            return
        self._tally.compare("blocks", len(rows))
        if wrong - told:
            self._tally.violation(f"{when}: blocks {sorted(wrong - told)} are wrong and untold")

    def _bring_back(self) -> None:
        daemon = self._start()
        self._wait_ready(daemon)
        wait_until(self._is_whole, "all is there and right", READY_WITHIN_S)
        if daemon.stop() != 0:
            self._tally.violation(f"it stopped with {daemon.process.returncode}")
        self._look("after a stop")
        self._tally.note("brings the node back")

    def _is_whole(self) -> bool:
        here = look(self._field.namespace, SUBJECT)
        if here is None or not here.is_sealed:
            return False
        return here.published() == list(range(len(self._expected))) and not here.wrong(self._expected)


def run_round(ground: Ground, chance: random.Random, tally: Tally, seconds: float, keep: Path | None) -> None:
    with ground.field(keep) as field:
        Scene(ground, field, chance, tally).run()

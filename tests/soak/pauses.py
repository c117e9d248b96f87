"""Any process pauses at any moment for any time, while blocks rot and are restored, and nodes die and come back.

Three nodes, two replicas of each block, a rank of an engine that is registered as a consumer. Looked at all the time:
what is published is right, or a bit of it was flipped by us; what a restore reported good is right; nobody finds a
block wrong that nobody spoiled. At the end all are awake, and everything is mended.

With a `word`, the rank takes its registration back at any moment and uses the memory for something else: from that word
on no byte of it may change. The word is the library's own (`Restorer.unregister`), or `DELETE` alone.

Over a slow link much of what is asked for is given up on, and goes on arriving: then the same must hold.
"""

from __future__ import annotations

import random
import re
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from tests.processes import Daemon, wait_until
from tests.soak.ground import Field, Ground
from tests.soak.images import expected_blocks, flip, look, manifest_of
from tests.soak.pauser import Pauser
from tests.soak.rank import RankProcess
from tests.soak.slots_scene import Key, SlotsScene, some_of
from tests.soak.slow_link import SlowLink, slow_link
from tests.soak.tally import Tally

NODES = ("n0", "n1", "n2")
HOME = NODES[0]  # the rank's own node
SCALE = 0.12  # blocks of 0.8 MB: a restore of a node takes a moment
SLOW_SCALE = 0.06  # and of 0.2 MB
SLOW_MBIT_PER_S = (
    1,
    3,
    10,
    10,
    30,
    100,
)  # with 10, a restore of all takes six seconds, and a transfer is given up after two
SETTLE_WITHIN_S = 180.0  # of a stopped process the engine waits a minute for the first word
ANSWER_WITHIN_S = 3.0
STOP_WITHIN_S = 15.0
KILL_SHARE, LOSE_SHARE = 0.5, 0.3
HIDDEN = re.compile(r"expert (\d+) of layer (\d+) does not match its checksum: it is hidden")


class Scene:
    """One round."""

    def __init__(
        self,
        ground: Ground,
        field: Field,
        chance: random.Random,
        tally: Tally,
        word: str | None,
        link: SlowLink | None = None,
    ) -> None:
        self._field, self._chance, self._tally, self._word, self._link = field, chance, tally, word, link
        self._checkpoint = ground.checkpoint(chance.randrange(5), scale=SCALE if link is None else SLOW_SCALE)
        self._expected = expected_blocks(self._checkpoint)
        self._keys: list[Key] = [(key.layer, key.expert) for key in manifest_of(self._checkpoint).keys]
        self._poor = chance.choice([None, *NODES[1:]])  # a node without a checkpoint
        self._nodes: dict[str, Daemon] = {}
        self._flipped: set[tuple[str, int]] = set()
        """(node, manifest row) of blocks that may be wrong, since we made them so."""
        self._flips: Counter[tuple[str, Key]] = Counter()
        for node in NODES:
            self._start(node)
        for daemon in self._nodes.values():
            daemon.wait_ready()
        rank = RankProcess(field.python("tests.soak.rank", self._checkpoint, self._nodes[HOME].url))
        self._slots = SlotsScene(rank, self._keys, word, tally)
        self._slots.register(self._nodes[HOME])
        # A node that is stopped in the middle of a write goes on with it, whatever DELETE said: over a slow link that
        # is the rule, and only ending the engine that takes the writes helps, as `unregister` does.
        is_calm = link is not None and word == "DELETE"
        pids: Callable[[], dict[str, int]] = dict if is_calm else self._pids
        self._pauser = Pauser(random.Random(chance.random()), pids, self._paused)

    # -- who is there ----------------------------------------------------------------------------------------

    def _start(self, node: str) -> None:
        checkpoint = None if node == self._poor else self._checkpoint
        self._nodes[node] = self._field.serve(node, NODES, checkpoint=checkpoint, replicas=2, scrub_rate="200MB")

    def _pids(self) -> dict[str, int]:
        return {name: self._nodes[name].pid for name in self._living()} | {"rank": self._slots.rank.pid}

    def _paused(self, name: str, seconds: float) -> None:
        self._tally.note(f"pauses {name} for {seconds:.2f} s")

    def _living(self) -> list[str]:
        return [name for name, daemon in self._nodes.items() if daemon.process.poll() is None]

    @property
    def _is_rank_asleep(self) -> bool:
        return self._pauser.is_asleep("rank")

    # -- what happens ----------------------------------------------------------------------------------------

    def run(self, seconds: float) -> None:
        acts: dict[Callable[[], None], int] = {
            self._restore: 4, self._spoil: 3, self._push: 6, self._wipe: 1, self._restart: 1, self._look: 3,
            self._restore_itself: 1,
        }  # fmt: skip
        if self._word is not None:
            acts |= {self._give_back: 5, self._take: 3}
        if self._link is not None:
            acts |= {self._slow_down: 4}
            self._slow_down()
        end = time.monotonic() + seconds
        try:
            while time.monotonic() < end:
                self._chance.choices(list(acts), list(acts.values()))[0]()
                time.sleep(self._chance.choice((0, 0, self._chance.uniform(0, 1))))
        finally:
            self._pauser.close()
            if self._link is not None:
                self._link.free()
        self._settle()

    def _body(self) -> dict[str, Any]:
        sources = self._chance.choice((None, ["peer"], ["disk"], ["peer", "disk"]))
        return {} if sources is None else {"sources": sources}

    def _restore(self) -> None:
        """Of a node's own segment."""
        node, asked = self._chance.choice(NODES), self._chance.choice(self._living())
        body = self._body() | {"target": {"node_id": node}}
        here = look(self._field.namespace, node)
        if here is not None and self._chance.random() < 0.3:
            rows = here.published()
            body["experts"] = _named([self._keys[row] for row in self._chance.sample(rows, min(len(rows), 3))])
        self._pauser.soon()
        try:
            status: object = (
                self._nodes[asked].ask("POST", "/v1/restores", json=body, timeout=ANSWER_WITHIN_S).status_code
            )
        except httpx.HTTPError as error:
            status = type(error).__name__
        self._tally.note(f"restores {node} by {asked}: {status}")

    def _spoil(self) -> None:
        """Flip a bit of one, some or all blocks of a node; rather of one that sleeps, maybe with answers under way."""
        asleep = [node for node in NODES if self._pauser.is_asleep(node)]
        node = self._chance.choice(asleep if asleep and self._chance.random() < 0.5 else NODES)
        here = look(self._field.namespace, node)
        rows = here.published() if here is not None and here.is_sealed else []
        if here is None or not rows:
            return
        for row in self._chance.sample(rows, min(len(rows), self._chance.choice((1, 5, len(rows))))):
            offset, nbytes = here.place(row)
            self._flipped.add((node, row))
            self._flips[node, self._keys[row]] += 1
            flip(self._field.namespace, node, 8 * offset + self._chance.randrange(8 * nbytes))
            self._tally.did("bits flipped")
        self._tally.note(f"spoils {node}")

    def _restart(self) -> None:
        """Stop or kill a node, maybe lose its memory too, and start it again."""
        node = self._chance.choice(self._living())
        is_killed = self._chance.random() < KILL_SHARE
        with self._pauser.spare(node, wake=not is_killed):
            if is_killed or not self._stop(node):
                self._nodes[node].kill()
            is_lost = self._chance.random() < LOSE_SHARE
            if is_lost:
                self._field.segment(node).unlink(missing_ok=True)
                self._flipped = {each for each in self._flipped if each[0] != node}
            self._tally.note(f"{'kills' if is_killed else 'stops'} {node}{' and loses its memory' if is_lost else ''}")
            self._start(node)
            if node == HOME:
                self._slots.home_is_restarted()

    def _stop(self, node: str) -> bool:
        self._nodes[node].process.terminate()
        try:
            self._nodes[node].process.wait(STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            self._tally.did(f"stops that took over {STOP_WITHIN_S:.0f} s")
            return False
        return True

    def _slow_down(self) -> None:
        """Give the link another rate."""
        assert self._link is not None
        rate = self._chance.choice(SLOW_MBIT_PER_S)
        self._link.slow_down(rate)
        self._tally.note(f"slows the link to {rate} Mbit/s")

    # -- the rank's slots ------------------------------------------------------------------------------------

    def _push(self) -> None:
        if self._slots.pattern is not None:
            return
        if not self._slots.is_registered:
            if self._is_rank_asleep:
                return
            self._slots.register(self._nodes[HOME])
        experts = some_of(self._keys, self._chance)
        body = self._body() | {"read_back": self._chance.random() < 0.3, "experts": _named(sorted(experts))}
        at = self._nodes[self._chance.choice([HOME, HOME, *self._living()])]
        self._pauser.soon()
        self._slots.push(at, body, experts, ANSWER_WITHIN_S)

    def _wipe(self) -> None:
        if self._slots.pattern is None and not self._is_rank_asleep:
            self._slots.wipe()

    def _restore_itself(self) -> None:
        if self._slots.pattern is None and not self._is_rank_asleep:
            self._pauser.soon()
            self._slots.restore()

    def _give_back(self) -> None:
        if self._slots.pattern is None and self._slots.is_registered and not self._is_rank_asleep:
            self._slots.give_back(self._nodes[HOME], self._chance.randrange(1, 256))

    def _take(self) -> None:
        if self._slots.pattern is not None and not self._is_rank_asleep:
            self._slots.take(self._nodes[HOME])

    # -- what is seen ----------------------------------------------------------------------------------------

    def _look(self) -> None:
        self._look_at_segments()
        self._look_at_logs()
        if not self._is_rank_asleep:
            self._slots.look_at_pattern()
            self._slots.look(self._nodes[HOME])

    def _look_at_segments(self) -> None:
        for node in NODES:
            here = look(self._field.namespace, node)
            if here is None:
                continue
            wrong, published = set(here.wrong(self._expected)), set(here.published())
            for row in wrong:
                if (node, row) not in self._flipped:
                    self._tally.violation(f"{node} publishes wrong bytes of {self._keys[row]}, which nobody flipped")
            self._flipped = {(n, row) for n, row in self._flipped if n != node or row in wrong or row not in published}
            self._tally.compare("blocks of segments", len(published))
            self._tally.compare("bytes of segments", sum(len(self._expected[row]) for row in published))

    def _look_at_logs(self) -> None:
        """Nobody may have found a block wrong more often than we made it so."""
        for node in NODES:
            found = HIDDEN.findall(self._field.log(node).read_text(errors="replace"))
            for key, count in Counter((int(layer), int(expert)) for expert, layer in found).items():
                if count > self._flips[node, key]:
                    self._tally.violation(f"{node} found {key} wrong {count} times, of {self._flips[node, key]} flips")
                    self._flips[node, key] = count

    # -- the end ---------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """All are awake: within a while everything is there and right."""
        self._slots.look_at_pattern()
        for node in NODES:
            try:
                wait_until(lambda node=node: self._is_settled(node), f"{node} settles", SETTLE_WITHIN_S)
            except AssertionError as error:
                raise AssertionError(f"{error}: {self._state(node)}") from error
        wait_until(self._is_mended, "what was flipped is mended", SETTLE_WITHIN_S)
        self._look()

    def _is_settled(self, node: str) -> bool:
        daemon = self._nodes[node]
        assert daemon.process.poll() is None, f"{node} ended with {daemon.process.returncode}"
        with suppress(httpx.HTTPError):
            restores = daemon.get("/v1/restores")["restores"]
            is_busy = any(restore["state"] in ("pending", "running") for restore in restores)
            return not is_busy and daemon.ask("GET", "/readyz").status_code == 200
        return False

    def _state(self, node: str) -> str:
        """What a node says of itself, for a violation."""
        daemon = self._nodes[node]
        restores = [
            {name: each[name] for name in ("state", "target", "blocks_done", "blocks_total", "error", "started_at")}
            for each in daemon.get("/v1/restores")["restores"]
            if each["state"] in ("pending", "running")
        ]
        return f"readyz {daemon.ask('GET', '/readyz').text}, unfinished restores {restores}"

    def _is_mended(self) -> bool:
        self._look_at_segments()
        return not self._flipped


def _named(keys: list[Key]) -> list[dict[str, int]]:
    return [{"layer": layer, "expert": expert} for layer, expert in keys]


def run_round(
    ground: Ground, chance: random.Random, tally: Tally, seconds: float, keep: Path | None, word: str | None = None
) -> None:
    with ground.field(keep) as field:
        Scene(ground, field, chance, tally, word).run(seconds)


def run_slow_round(ground: Ground, chance: random.Random, tally: Tally, seconds: float, keep: Path | None) -> None:
    """Over a slow link; the word is drawn, too."""
    ground.prepare()
    with slow_link() as link, ground.field(keep, link.path) as field:
        Scene(ground, field, chance, tally, chance.choice((None, "unregister", "DELETE")), link).run(seconds)

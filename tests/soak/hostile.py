"""Peers that lie, drip, go on without end, or name wrong digests, addresses and sessions, beside one that is honest.

Two nodes with all blocks, a rank of an engine, and three peers that are none (`tests/soak/impostor.py`), whose moods
change at any moment; at times all goes over a slow link. Whatever they say: what is published is right, and so is what
a restore reports good; a restore of what is on record succeeds; the nodes answer, stay small, and stop when they are
told to. Once the peers are true again, everything is there and right.
"""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.processes import Daemon, wait_until
from tests.soak.ground import Field, Ground
from tests.soak.images import expected_blocks, flip, look, manifest_of
from tests.soak.impostor import MOODS, TRUE, Impostor
from tests.soak.rank import RankProcess
from tests.soak.slots_scene import Key, SlotsScene, some_of
from tests.soak.slow_link import SlowLink, slow_link, why_not
from tests.soak.tally import Tally

SUBJECT, HELPER = "n0", "n1"
IMPOSTORS = ("p0", "p1", "p2")
EVERYBODY = (SUBJECT, HELPER, *IMPOSTORS)
SLOW_SHARE = 0.3  # of the rounds
MBIT_PER_S = (10, 30, 100)
# Generous: of a machine that has ten times as much to do as it can. What is promised is 2.5 s for a stop.
ANSWER_WITHIN_S, STOP_WITHIN_S = 20.0, 20.0
RESTORED_WITHIN_S, SETTLE_WITHIN_S = 120.0, 180.0
PRIVATE_NBYTES_MAX = 600 << 20  # of a node, without the segment: it has 120 MB when nobody lies


class Scene:
    """One round."""

    def __init__(
        self, ground: Ground, field: Field, chance: random.Random, tally: Tally, link: SlowLink | None
    ) -> None:
        self._field, self._chance, self._tally, self._link = field, chance, tally, link
        self._checkpoint = ground.checkpoint(chance.randrange(5))
        self._expected = expected_blocks(self._checkpoint)
        self._keys: list[Key] = [(key.layer, key.expert) for key in manifest_of(self._checkpoint).keys]
        self._is_poor = chance.random() < 0.5
        """Whether the subject has no checkpoint: then all that it has is from peers."""
        self._flipped: set[int] = set()
        """Rows of the subject's blocks that may be wrong, since we made them so."""
        self._nodes: dict[str, Daemon] = {}
        self._impostors: list[Impostor] = []

    @contextmanager
    def peers(self) -> Iterator[None]:
        """Nodes, impostors and a rank, all of them true."""
        with ExitStack() as stack:
            for name in (HELPER, SUBJECT):
                self._start(name)
            for name in IMPOSTORS:
                impostor = Impostor(name, self._field.port(name), lambda: self._nodes[HELPER])
                self._impostors.append(stack.enter_context(closing(impostor)))
            for node in self._nodes.values():
                node.wait_ready()
            rank = RankProcess(self._field.python("tests.soak.rank", self._checkpoint, self._nodes[SUBJECT].url))
            self._slots = SlotsScene(rank, self._keys, None, self._tally)
            self._slots.register(self._nodes[SUBJECT])
            yield

    def _start(self, name: str) -> None:
        checkpoint = None if name == SUBJECT and self._is_poor else self._checkpoint
        self._nodes[name] = self._field.serve(
            name, EVERYBODY, checkpoint=checkpoint, replicas=len(EVERYBODY), scrub_rate="200MB"
        )

    @property
    def _subject(self) -> Daemon:
        return self._nodes[SUBJECT]

    # -- what happens ----------------------------------------------------------------------------------------

    def run(self, acts: int) -> None:
        chosen: dict[Callable[[], None], int] = {
            self._change_mood: 6, self._mend: 4, self._restore: 2, self._restart: 1, self._push: 2,
            self._restore_itself: 2, self._look: 2,
        }  # fmt: skip
        for impostor in self._impostors[:2]:
            self._let_lie(impostor)
        for _ in range(acts):
            self._chance.choices(list(chosen), list(chosen.values()))[0]()
            self._look_at_nodes()
            if self._link is not None and self._chance.random() < 0.2:
                self._slow_down(self._link)
        self._settle()

    def _slow_down(self, link: SlowLink) -> None:
        rate = self._chance.choice(MBIT_PER_S)
        link.slow_down(rate)
        self._tally.note(f"slows the link to {rate} Mbit/s")

    def _change_mood(self) -> None:
        self._let_lie(self._chance.choice(self._impostors))

    def _let_lie(self, impostor: Impostor) -> None:
        mood = self._chance.choice(MOODS)
        impostor.feel(mood, self._chance.random())
        self._tally.note(f"turns {impostor.node}: {mood}")

    def _mend(self) -> None:
        """Spoil blocks of the subject that are on record: the honest peer has them, so a restore brings them back."""
        here = look(self._field.namespace, SUBJECT)
        if here is None or not here.is_sealed or not (rows := here.published()):
            return
        spoiled = self._chance.sample(rows, min(len(rows), self._chance.choice((1, 5, len(rows)))))
        for row in spoiled:
            offset, nbytes = here.place(row)
            self._flipped.add(row)
            flip(self._field.namespace, SUBJECT, 8 * offset + self._chance.randrange(8 * nbytes))
        self._tally.note(f"spoils {len(spoiled)} blocks of {SUBJECT}")
        self._wait_for_restore({"experts": _named([self._keys[row] for row in spoiled])}, must_succeed=True)

    def _restore(self) -> None:
        self._wait_for_restore({}, must_succeed=False)

    def _wait_for_restore(self, body: dict[str, Any], *, must_succeed: bool) -> None:
        sources = self._chance.choice((["peer"], ["peer", "disk"]))
        asked = body | {"target": {"node_id": SUBJECT}, "sources": sources}
        answer = self._subject.ask("POST", "/v1/restores", json=asked, timeout=ANSWER_WITHIN_S)
        if answer.status_code != 202:  # it has no manifest yet, say
            self._tally.note(f"refused with {answer.status_code}: {answer.text[:200]}")
            return
        restore_id = answer.json()["id"]
        document = wait_until(lambda: self._ended(restore_id), f"end of restore {restore_id}", RESTORED_WITHIN_S)
        self._tally.note(f"restores from {sources}: {document['state']}")
        # Who sends without end has a slow link to himself, and others time out: that they are tried again is enough.
        if must_succeed and self._link is None and document["state"] != "succeeded":
            self._tally.violation(f"a restore beside an honest peer {document['state']}: {document['error']}")

    def _ended(self, restore_id: str) -> Any:
        document = self._subject.ask("GET", f"/v1/restores/{restore_id}", timeout=ANSWER_WITHIN_S).json()
        return document if document["state"] in ("succeeded", "failed", "cancelled") else None

    def _restart(self) -> None:
        """Stop the subject or kill it, maybe lose its memory too, and start it again among those that lie."""
        is_killed, is_lost = self._chance.random() < 0.3, self._chance.random() < 0.5
        if is_killed:
            self._subject.kill()
        else:
            self._stop()
        if is_lost:
            self._field.segment(SUBJECT).unlink(missing_ok=True)
            self._flipped.clear()
        self._tally.note(f"{'kills' if is_killed else 'stops'} {SUBJECT}{' and loses its memory' if is_lost else ''}")
        self._start(SUBJECT)
        self._subject.wait_live()
        self._slots.home_is_restarted()

    def _stop(self) -> None:
        self._subject.process.terminate()
        try:
            status = self._subject.process.wait(STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            self._tally.violation(f"{SUBJECT} did not stop within {STOP_WITHIN_S:.0f} s")
            self._subject.kill()
            return
        if status != 0:
            self._tally.violation(f"{SUBJECT} stopped with {status}: {self._subject.said()[-300:]}")

    # -- the rank's slots ------------------------------------------------------------------------------------

    def _push(self) -> None:
        if not self._slots.is_registered:
            self._slots.register(self._subject)
        experts = some_of(self._keys, self._chance)
        body = {"read_back": self._chance.random() < 0.3, "experts": _named(sorted(experts))}
        self._slots.push(self._subject, body, experts, ANSWER_WITHIN_S)

    def _restore_itself(self) -> None:
        if self._chance.random() < 0.5:
            self._slots.wipe()
        self._slots.restore()

    # -- what is seen ----------------------------------------------------------------------------------------

    def _look(self) -> None:
        self._look_at_segments()
        self._slots.look(self._subject)

    def _look_at_segments(self) -> None:
        for name in self._nodes:
            here = look(self._field.namespace, name)
            if here is None:
                continue
            wrong, published = set(here.wrong(self._expected)), set(here.published())
            known = self._flipped if name == SUBJECT else set()
            for row in wrong - known:
                self._tally.violation(f"{name} publishes wrong bytes of {self._keys[row]}, which nobody flipped")
            if name == SUBJECT:
                self._flipped &= wrong | (set(range(len(self._keys))) - published)
            self._tally.compare("blocks of segments", len(published))

    def _look_at_nodes(self) -> None:
        """They answer, and are as small as nodes are that nobody lies to."""
        for name, node in self._nodes.items():
            for path in ("/livez", "/v1/nodes"):
                answer = node.ask("GET", path, timeout=ANSWER_WITHIN_S)
                if answer.status_code != 200:
                    self._tally.violation(f"{name} answers {path} with {answer.status_code}: {answer.text[:200]}")
            memory = psutil.Process(node.pid).memory_info()
            if (private := memory.rss - memory.shared) > PRIVATE_NBYTES_MAX:
                self._tally.violation(f"{name} takes {private:,} bytes besides its segment")
            self._tally.compare("answers")

    # -- the end ---------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """All are true: within a while everything is there and right."""
        if self._link is not None:
            self._link.free()
        for impostor in self._impostors:
            impostor.feel(TRUE)
        wait_until(self._is_settled, f"{SUBJECT} settles", SETTLE_WITHIN_S)
        self._restore_itself()
        self._look()
        self._stop()

    def _is_settled(self) -> bool:
        with suppress(httpx.HTTPError):
            if self._subject.ask("GET", "/readyz", timeout=ANSWER_WITHIN_S).status_code != 200:
                return False
            self._look_at_segments()
            return not self._flipped
        return False


def _named(keys: list[Key]) -> list[dict[str, int]]:
    return [{"layer": layer, "expert": expert} for layer, expert in keys]


def run_round(ground: Ground, chance: random.Random, tally: Tally, seconds: float, keep: Path | None) -> None:
    """As many acts as there are seconds: what they wait for is not the same on every machine."""
    with ExitStack() as stack:
        link = None
        if chance.random() < SLOW_SHARE and not why_not():
            ground.prepare()
            link = stack.enter_context(slow_link())
        field = stack.enter_context(ground.field(keep, "" if link is None else link.path))
        scene = Scene(ground, field, chance, tally, link)
        stack.enter_context(scene.peers())
        scene.run(int(seconds))

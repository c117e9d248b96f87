"""A node among peers that die, pause, wake and come back, without a process, a socket or a second of real time.

What decides is the real thing: `app.cluster.membership`, `app.node.upkeep` and `transfer.ledger`. What they are told is
made up here from a seed, by a clock that stands still until something happens; so an interleaving of three events that
a real cluster meets once a year is met here every few seeds, and the seed that met it meets it again.

A peer has every block of the one content that is right. A transfer with a peer that is paused times out, and its bytes
arrive when the peer wakes, whenever that is, unless the engine that issued it was dropped meanwhile: as it was measured
of the real one. By then the paused peer's memory may have been given to something else, so what arrives late is wrong.
A peer may also be slow, for as long as it likes. A transfer that is recalled ends at once, or else times out.

Three promises are looked after at every step:

- a published block has the right bytes;
- a block is published within PATIENCE_S of a time from which a good replica could be reached;
- a peer is not called unreachable unless it failed for as long as FAILURES_MAX probes take.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from app.cluster.membership import FAILURES_MAX, Membership, NodeReport, PeerState
from app.cluster.prober import PROBE_INTERVAL_S
from app.node.upkeep import RETRY_INTERVAL_S, Seen, Task, Upkeep
from shm.block import ExpertKey
from transfer.errors import TransferFailed
from transfer.ledger import Arrived, Ledger
from transfer.plan import Batch, Limits, Offer, Want
from transfer.standing import Party

PEERS = 3
ROWS = 17
NBYTES = 3333
RIGHT, WRONG, NOTHING = b"right", b"wrong", b"nothing"
TRANSFER_S = 1.0  # of a batch at most: slow, so that a restore is still under way when something happens
SLOW_S = 100.0
TIMEOUT_S = 10.0
LOOK_S = 0.5
UNREACHABLE_S_MIN = (FAILURES_MAX - 1) * PROBE_INTERVAL_S * 0.85  # a prober may be a little early
PATIENCE_S = RETRY_INTERVAL_S + 2 * TIMEOUT_S + 20.0
LENGTH_S = 500.0


class PromiseBroken(AssertionError):
    """What must never be seen was seen."""


@dataclass
class Fellow:
    """A peer. `paused_until` None: it runs."""

    name: str
    is_dead: bool = False
    is_slow: bool = False
    paused_until: float | None = None
    revision: int = 1
    failing_since: float | None = None
    answering_since: float = 0.0

    def answers(self) -> bool:
        return not self.is_dead and self.paused_until is None


@dataclass(order=True)
class Planned:
    at: float
    number: int
    do: Callable[[], None] = field(compare=False)


class World:
    """One run from one seed. `run` raises PromiseBroken, with the seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.now = 1003.5
        self._random = random.Random(seed)
        self._numbers = itertools.count()
        self._planned: list[Planned] = []
        self.peers = {f"p{number}": Fellow(f"p{number}") for number in range(PEERS)}
        urls = {name: f"http://{name}:8470" for name in self.peers}
        self.membership = Membership(urls, model="moe", namespace="sim")
        self.membership.use_manifest("d" * 64)
        self.upkeep = Upkeep("auto")
        self.memory = dict.fromkeys(range(ROWS), NOTHING)
        self.published: set[int] = set()
        self.ledger: Ledger | None = None
        self._late: list[tuple[str, Batch]] = []
        self._asked: set[str] = set()
        """Whom the restore under way asks."""
        self._over: set[Batch] = set()
        """Those that were recalled."""
        self._lacking_since: dict[int, float] = {}
        self.events = 0

    # -- time ------------------------------------------------------------------------------------------------

    def later(self, seconds: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._planned, Planned(self.now + seconds, next(self._numbers), do))

    def run(self) -> None:
        end = self.now + LENGTH_S
        self.later(0.0, self._probe)
        self.later(0.1, self._keep_up)
        self.later(self._random.uniform(0.0, 5.0), self._fate)
        while self._planned and self._planned[0].at <= end:
            planned = heapq.heappop(self._planned)
            self.now = planned.at
            planned.do()
            self.events += 1
            self._check()

    # -- what the world does ---------------------------------------------------------------------------------

    def _fate(self) -> None:
        """Something happens to a peer, or to a block of ours; soon something else does."""
        peer = self._random.choice(list(self.peers.values()))
        what = self._random.choice(
            [self._die, self._come_back, self._pause, self._pause, self._rot, self._look, self._slow, self._hurry]
        )
        what(peer)
        is_calm = self._random.random() < 0.1
        self.later(2 * PATIENCE_S if is_calm else self._random.expovariate(1 / 4.0), self._fate)

    def _die(self, peer: Fellow) -> None:
        if sum(not other.is_dead for other in self.peers.values()) > 1:
            peer.is_dead, peer.paused_until = True, None
            self._late = [(name, batch) for name, batch in self._late if name != peer.name]

    def _come_back(self, peer: Fellow) -> None:
        if peer.is_dead:
            peer.is_dead, peer.revision, peer.answering_since = False, peer.revision + 1, self.now

    def _slow(self, peer: Fellow) -> None:
        peer.is_slow = True

    def _hurry(self, peer: Fellow) -> None:
        if peer.is_slow:  # what it has under way goes on as slowly as it began
            peer.is_slow, peer.answering_since = False, self.now + SLOW_S

    def _pause(self, peer: Fellow) -> None:
        if peer.answers():
            seconds = self._random.choice([0.3, 2.0, 3.0, 4.0, 5.0, 11.0, 13.0, 60.0])
            peer.paused_until = self.now + seconds
            self.later(seconds, lambda: self._wake(peer))

    def _wake(self, peer: Fellow) -> None:
        if peer.paused_until is not None and peer.paused_until <= self.now:
            peer.paused_until, peer.answering_since = None, self.now
            arrived = [batch for name, batch in self._late if name == peer.name]
            self._late = [(name, batch) for name, batch in self._late if name != peer.name]
            for want in (want for batch in arrived for want in batch.wants):
                self.memory[want.row] = WRONG

    def _rot(self, peer: Fellow) -> None:
        """A bit flips in a published block; the scrubber finds it, and hides it."""
        if self.published and self.ledger is None:
            row = self._random.choice(sorted(self.published))
            self.published.discard(row)
            self.memory[row] = WRONG

    def _look(self, peer: Fellow) -> None:
        """Several parties want news at once."""
        for _ in range(self._random.randint(1, 4)):
            self._probe_once()

    # -- asking ----------------------------------------------------------------------------------------------

    def _probe(self) -> None:
        self._probe_once()
        self.later(PROBE_INTERVAL_S, self._probe)

    def _probe_once(self) -> None:
        for peer in self.peers.values():
            asked_at = self.now
            if peer.answers():
                peer.failing_since = None
                report = self._report(peer)
                delay = self._random.choice([0.0, 0.001, 0.7])
                self.later(delay, lambda p=peer, r=report, a=asked_at: self._answered(p, r, a))
            else:
                delay = 0.001 if peer.is_dead else 2.0
                self.later(delay, lambda p=peer, a=asked_at: self._failed(p, a))

    def _report(self, peer: Fellow) -> NodeReport:
        return NodeReport(
            peer.name, "moe", "sim", "ready", manifest_digest="d" * 64,
            session_id=f"{peer.name}:{peer.revision}", revision=str(peer.revision),
        )  # fmt: skip

    def _answered(self, peer: Fellow, report: NodeReport, asked_at: float) -> None:
        self.membership.answered(peer.name, report, asked_at=asked_at, now=self.now)

    def _failed(self, peer: Fellow, asked_at: float) -> None:
        if peer.failing_since is None:
            peer.failing_since = asked_at
        self.membership.failed(peer.name, "no answer", asked_at=asked_at, now=self.now)

    # -- bringing --------------------------------------------------------------------------------------------

    def _keep_up(self) -> None:
        if self.ledger is None:
            task = self.upkeep.next(self._seen(), self.now)
            if task is not None:
                self._restore(task)
        self.later(LOOK_S, self._keep_up)

    def _seen(self) -> Seen:
        missing = tuple(ExpertKey(0, row) for row in range(ROWS) if row not in self.published)
        return Seen(has_manifest=True, can_begin=True, missing=missing, damaged=(), sources=self._sources())

    def _sources(self) -> str:
        known = (p for p in self.membership.peers(self.now) if p.state is not PeerState.UNREACHABLE and p.report)
        return ";".join(f"{p.node_id}@{p.session_id}" for p in known)

    def _restore(self, task: Task) -> None:
        """Plan it as a node does: alive peers are nearer than suspect ones, and given-up ones offer nothing."""
        assert task.experts is not None
        tiers = {PeerState.ALIVE: 0, PeerState.SUSPECT: 1}
        usable = [p for p in self.membership.peers(self.now) if p.state in tiers and p.report is not None]
        parties = {p.node_id: Party(p.node_id, tiers[p.state], 1, Limits(nbytes=2 * NBYTES)) for p in usable}
        wants = [Want(key.expert, NBYTES, RIGHT) for key in task.experts]
        offers = {want.row: [Offer(name, want.row * NBYTES) for name in parties] for want in wants}
        self.ledger, self._asked = Ledger(wants, offers, parties), set(parties)
        self._obey()

    def _obey(self) -> None:
        ledger = self.ledger
        if ledger is None:
            return
        if ledger.waits_for:
            self._fence()
        orders = ledger.next(self.now)
        for batch in orders.recall:
            self._recall(ledger, batch)
        for batch in orders.move:
            self._move(ledger, batch)
        for block in orders.verify:
            self.later(0.001, lambda b=block: self._verify(ledger, b))
        for block in orders.publish:
            self.published.add(block.want.row)
            ledger.published(block.want.row)
        if orders.wait_s is not None:
            self.later(orders.wait_s, self._obey)
        if ledger.is_over:
            self._fence()
            if not self._good():  # it had nobody to bring anything: what is missing is so from now on
                self._lacking_since.clear()
            self.ledger = None
        elif orders.publish or ledger.waits_for:
            self.later(0.0, self._obey)

    def _fence(self) -> None:
        """Drop the engine that issued what is outstanding: none of it can arrive any more."""
        assert self.ledger is not None
        self._late.clear()
        for batch in self.ledger.outstanding:
            self.ledger.ended(batch)

    def _move(self, ledger: Ledger, batch: Batch) -> None:
        peer = self.peers[str(batch.source)]
        for want in batch.wants:
            self.published.discard(want.row)
            self.memory[want.row] = NOTHING
        if peer.is_dead:
            self.later(0.3, lambda: self._lose(ledger, batch, timed_out=False))
        elif peer.paused_until is not None:
            self._late.append((peer.name, batch))
            self.later(TIMEOUT_S, lambda: self._lose(ledger, batch, timed_out=True))
        else:
            takes_s = SLOW_S if peer.is_slow else TRANSFER_S * self._random.random()
            self.later(takes_s, lambda: self._arrive(ledger, batch, peer))

    def _recall(self, ledger: Ledger, batch: Batch) -> None:
        """Its connections are cut, and nothing of it arrives any more; or nobody knows, and it may."""
        is_cut = self._random.random() < 0.5
        self._late = [each for each in self._late if each[1] is not batch]
        if not is_cut:
            self._late.append((str(batch.source), batch))
            self.later(TRANSFER_S * self._random.random(), lambda: self._straggle(batch))
        self._lose(ledger, batch, timed_out=not is_cut)
        self._over.add(batch)

    def _straggle(self, batch: Batch) -> None:
        """What was recalled in vain arrives, unless its engine is gone."""
        if any(late is batch for _, late in self._late):
            self._late = [each for each in self._late if each[1] is not batch]
            for want in batch.wants:
                self.memory[want.row] = WRONG

    def _lose(self, ledger: Ledger, batch: Batch, *, timed_out: bool) -> None:
        if batch in self._over:
            return
        ledger.failed(batch, TransferFailed("no answer", timed_out=timed_out), self.now)
        self._obey()

    def _arrive(self, ledger: Ledger, batch: Batch, peer: Fellow) -> None:
        if batch in self._over:
            return
        if not peer.answers():  # it went in the middle
            self._move(ledger, batch)
            return
        for want in batch.wants:
            self.memory[want.row] = RIGHT
        ledger.moved(batch, {}, self.now)
        self._obey()

    def _verify(self, ledger: Ledger, block: Arrived) -> None:
        ledger.verified(block.want.row, self.memory[block.want.row])
        self._obey()

    def _good(self) -> list[Fellow]:
        """Those that a restore can be had from now; one that is under way knows no peer that came later."""
        asked = self.peers if self.ledger is None else self._asked
        return [p for p in self.peers.values() if p.answers() and not p.is_slow and p.name in asked]

    # -- what must hold --------------------------------------------------------------------------------------

    def _check(self) -> None:
        for row in self.published:
            if self.memory[row] != RIGHT:
                raise PromiseBroken(f"seed {self.seed}: block {row} is published with {self.memory[row]!r}")
        self._check_liveness()
        for peer in self.membership.peers(self.now):
            fellow = self.peers[peer.node_id]
            if peer.state is PeerState.UNREACHABLE and peer.failing_since is not None and fellow.failing_since:
                failed_for = self.now - fellow.failing_since
                if failed_for < UNREACHABLE_S_MIN:
                    raise PromiseBroken(f"seed {self.seed}: {peer.node_id} was given up after {failed_for:.2f} s")

    def _check_liveness(self) -> None:
        """While one and the same peer answers and is not slow, all that is missing comes, whatever others do."""
        good = self._good()
        calm_since = min((p.answering_since for p in good), default=self.now)
        for row in range(ROWS):
            if row in self.published:
                self._lacking_since.pop(row, None)
            elif self.now - max(self._lacking_since.setdefault(row, self.now), calm_since) > PATIENCE_S:
                raise PromiseBroken(f"seed {self.seed}: block {row} is missing beside good replicas")

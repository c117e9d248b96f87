"""The simulation keeps every promise, and notices when a mend is taken out."""

from __future__ import annotations

import os

import pytest

from app.cluster import membership
from app.node import upkeep
from tests.simulation.world import PromiseBroken, World
from transfer.ledger import STEPS, Event, Ledger, Stage

FIRST_SEED = int(os.environ.get("SEED", "0"))
SEEDS = range(FIRST_SEED, FIRST_SEED + 30)


def first_broken(seeds: range = SEEDS) -> str:
    """What the first seed that breaks a promise says; empty if none does."""
    for seed in seeds:
        try:
            World(seed).run()
        except PromiseBroken as broken:
            return str(broken)
    return ""


def test_no_seed_breaks_a_promise() -> None:
    assert first_broken() == ""


def test_one_seed_gives_one_history() -> None:
    first, second = World(3), World(3)
    first.run(), second.run()
    assert first.events == second.events > 1000
    assert first.membership.peers(first.now) == second.membership.peers(second.now)


def test_it_finds_a_timed_out_batch_that_is_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken out: that a block is held back while a transfer that was given up on may still write to it."""
    monkeypatch.setattr("transfer.ledger.STEPS", {**STEPS, (Stage.UNVERIFIED, Event.EARLY): Stage.RIGHT})
    assert "is published with" in first_broken()


def test_it_finds_a_fence_that_is_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken out: that the engine is dropped before blocks that were held back are looked at once more."""

    def without(self: World) -> None:
        assert self.ledger is not None
        for batch in self.ledger.outstanding:
            self.ledger.ended(batch)

    monkeypatch.setattr(World, "_fence", without)
    assert "is published with" in first_broken()


def test_it_finds_a_slow_peer_that_nobody_takes_over_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken out: that what is late at one source is brought by another which is idle."""
    monkeypatch.setattr(Ledger, "_recall", lambda self, now: ())
    assert "missing beside good replicas" in first_broken()


def test_it_finds_a_block_that_is_lost_beside_a_good_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken out: that what failed is tried again although nothing new was seen."""
    monkeypatch.setattr(upkeep, "RETRY_INTERVAL_S", float("inf"))
    assert "missing beside good replicas" in first_broken()


def test_it_finds_a_caretaker_that_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken out: that a node which was complete once is still cared for."""
    real = upkeep.Upkeep.next

    def once(self: upkeep.Upkeep, seen: upkeep.Seen, now: float) -> upkeep.Task | None:
        if not seen.missing:
            self._due_at = float("inf")
        return None if self._due_at == float("inf") else real(self, seen, now)

    monkeypatch.setattr(upkeep.Upkeep, "next", once)
    assert "missing beside good replicas" in first_broken()


def test_it_finds_a_peer_that_is_called_unreachable_by_several_askers_in_one_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Taken out: that failures count by the second and not by the asker."""
    monkeypatch.setattr(membership, "FAILURE_SPACING_S", 0.0)
    assert "was given up after" in first_broken()


def test_it_finds_a_source_that_is_forgotten_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken out: that a block whose transfer failed is wanted again."""

    def never(self: Ledger, block: object, event: Event) -> None:
        self._step(block, event)  # type: ignore[arg-type]

    monkeypatch.setattr(Ledger, "_want_again", never)
    assert "missing beside good replicas" in first_broken()

"""Leases: what may be written under them, and what waits for them. Registrations are real, time is not."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from app.errors import Conflict, NotFound
from app.restores.consumers import ConsumerStore
from app.restores.lease import LEASE_S, MARGIN_S, WITHDRAWN_MAX, Grants, Lease, LeaseEnded, boot_time
from shm.manifest import Manifest
from tests.clocks import Clock
from transfer.push.table import FormCopy, PushTable, SlotBases

START = 1003.5


@pytest.fixture
def store(clock: Clock) -> ConsumerStore:
    return ConsumerStore(clock, earlier_leases_s=0)


@pytest.fixture
def table(make_manifest: Callable[..., Manifest]) -> PushTable:
    nbytes = int(make_manifest().nbytes[0])
    form = [FormCopy(0, 0, 0, 1, nbytes, nbytes, nbytes)]
    return PushTable.build(make_manifest(), "e:1", [(4096, nbytes)], [form], [SlotBases(0, 0, 0, (4096,))])


# -- who writes ----------------------------------------------------------------------------------------------------


def test_a_lease_runs_out(clock: Clock) -> None:
    lease = Lease(START + 3, clock)
    lease.check()
    clock.now_s += 2.5
    assert lease.remaining_s == 0.5
    clock.now_s += 0.5
    with pytest.raises(LeaseEnded, match="nothing more is written"):
        lease.check()


def test_its_clock_is_one_that_runs_on_while_a_machine_sleeps() -> None:
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    assert before <= boot_time() <= time.clock_gettime(time.CLOCK_BOOTTIME)
    assert Lease(before).remaining_s == 0


# -- who grants ----------------------------------------------------------------------------------------------------


def test_grants_are_left_until_the_last_has_ended_or_run_out() -> None:
    grants = Grants()
    assert grants.left_s(START) == 0
    grants.give("a", 3, START)
    grants.give("b", 5, START)
    assert grants.left_s(START) == 5 + MARGIN_S
    grants.end("b")
    assert grants.left_s(START) == 3 + MARGIN_S
    assert grants.left_s(START + 3 + MARGIN_S) == 0
    grants.end("a"), grants.end("never given")
    assert grants.left_s(START) == 0


def test_a_lease_that_is_asked_for_again_is_longer_and_never_shorter() -> None:
    grants = Grants()
    grants.give("a", 5, START)
    grants.give("a", 1, START + 1)
    assert grants.left_s(START) == 5 + MARGIN_S
    grants.give("a", 5, START + 2)
    assert grants.left_s(START) == 7 + MARGIN_S


def test_a_push_that_was_recalled_gets_no_more_time_and_keeps_what_it_has() -> None:
    grants = Grants()
    grants.give("a", 5, START)
    grants.withdraw("a")
    assert grants.left_s(START) == 5 + MARGIN_S
    with pytest.raises(Conflict, match="recalled"):
        grants.give("a", 5, START)
    grants.end("a")
    assert grants.left_s(START) == 0
    with pytest.raises(Conflict, match="recalled"):
        grants.give("a", 5, START)
    for number in range(2 * WITHDRAWN_MAX):
        grants.withdraw(str(number))
    assert len(grants._withdrawn) == WITHDRAWN_MAX


def test_only_the_registration_that_was_meant_gives_leases(store: ConsumerStore, table: PushTable) -> None:
    first, _ = store.put("a", table, "d", "c", 300)
    assert store.lease("a", first.epoch, "push") == LEASE_S
    store.end_lease(first, "push")
    second, _ = store.put("a", table, "d", "c", 300)
    assert second.epoch > first.epoch
    with pytest.raises(Conflict, match="registered anew"):
        store.lease("a", first.epoch, "push")
    store.remove("a")
    with pytest.raises(NotFound):
        store.lease("a", second.epoch, "push")
    assert ConsumerStore().put("a", table, "d", "c", 300)[0].epoch > second.epoch, "in the node's next life too"


def test_no_lease_is_longer_than_the_registration(store: ConsumerStore, table: PushTable) -> None:
    consumer, _ = store.put("a", table, "d", "c", 2.5)
    assert store.lease("a", consumer.epoch, "push") == 2.5


def test_an_expired_registration_is_kept_until_its_leases_have_run_out(
    store: ConsumerStore, table: PushTable, clock: Clock
) -> None:
    consumer, _ = store.put("a", table, "d", "c", 1.0)
    store.lease("a", consumer.epoch, "push")
    clock.now_s += 1.0
    assert store.all() == [consumer]
    clock.now_s += MARGIN_S
    assert store.all() == []


@pytest.mark.parametrize("how", ["ended", "run out"])
def test_taking_a_registration_back_waits_for_leases(table: PushTable, how: str) -> None:
    """A push whose answer never came may still be writing: it was forgotten when the answer was given up on."""
    store = ConsumerStore(earlier_leases_s=0)
    consumer, _ = store.put("a", table, "d", "c", 0.05 if how == "run out" else 300)
    store.lease("a", consumer.epoch, "push")
    left_s = consumer.grants.left_s(boot_time())
    removed = threading.Event()

    def remove() -> None:
        store.remove("a")
        removed.set()

    thread = threading.Thread(target=remove)
    before = boot_time()
    thread.start()
    try:
        if how == "ended":
            while not consumer.is_over:
                assert not removed.is_set()
            with pytest.raises(NotFound):
                store.lease("a", consumer.epoch, "another")
            assert not removed.is_set()
            store.end_lease(consumer, "push")
        assert removed.wait(33)
        if how == "run out":
            assert boot_time() >= before + left_s - 0.1
    finally:
        thread.join(33)


def test_taking_a_registration_back_waits_for_leases_that_an_earlier_life_of_the_node_gave(table: PushTable) -> None:
    """It was killed with pushes of its peers under way, and the engine has registered with its successor."""
    before = boot_time()
    store = ConsumerStore(earlier_leases_s=0.5)
    store.put("a", table, "d", "c", 300)
    store.remove("a")
    assert boot_time() >= before + 0.5
    assert ConsumerStore()._earlier_until_s >= boot_time() + LEASE_S

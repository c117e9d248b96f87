"""Upkeep: one test a thing seen. The state is what was tried, and when it is due again."""

from __future__ import annotations

from dataclasses import replace

import pytest

from app.node.upkeep import KINDS, RETRY_INTERVAL_S, Seen, Task, Upkeep
from shm.block import ExpertKey

A, B = ExpertKey(3, 7), ExpertKey(4, 0)
START = 1003.5
EMPTY = Seen(has_manifest=False, can_begin=False, missing=(), damaged=(), sources="")
COMPLETE = replace(EMPTY, has_manifest=True, can_begin=True)
LACKING = replace(COMPLETE, missing=(A, B))


@pytest.fixture
def upkeep() -> Upkeep:
    return Upkeep("auto")


def test_complete_rests(upkeep: Upkeep) -> None:
    assert upkeep.next(COMPLETE, START) is None


def test_missing_is_brought_at_once(upkeep: Upkeep) -> None:
    assert upkeep.next(LACKING, START) == Task((A, B), KINDS["auto"])


def test_missing_after_a_try_rests_until_it_is_due(upkeep: Upkeep) -> None:
    upkeep.next(LACKING, START)
    assert upkeep.next(LACKING, START + RETRY_INTERVAL_S - 0.01) is None
    assert upkeep.next(LACKING, START + RETRY_INTERVAL_S) == Task((A, B), KINDS["auto"])


def test_missing_after_a_try_is_brought_when_peers_have_something_new(upkeep: Upkeep) -> None:
    upkeep.next(LACKING, START)
    assert upkeep.next(replace(LACKING, sources="p@2"), START + 0.5) is not None
    assert upkeep.next(replace(LACKING, sources="p@2"), START + 1.0) is None


def test_what_goes_missing_long_after_it_was_complete_is_brought(upkeep: Upkeep) -> None:
    upkeep.next(LACKING, START)
    assert upkeep.next(COMPLETE, START + 1) is None
    assert upkeep.next(replace(LACKING, missing=(B,)), START + 333) == Task((B,), KINDS["auto"])


def test_no_manifest_waits_for_a_peer_that_has_one(upkeep: Upkeep) -> None:
    assert upkeep.next(EMPTY, START) is None
    assert upkeep.next(replace(EMPTY, can_begin=True), START + 0.5) == Task(None, KINDS["auto"])


def test_what_is_lost_anew_is_brought_at_once_however_soon(upkeep: Upkeep) -> None:
    """An object that was cut to nothing a second time stayed so for half a minute."""
    upkeep.next(LACKING, START)
    assert upkeep.next(replace(LACKING, missing=(A,)), START + 1) is None, "that could not be had just now"
    assert upkeep.next(LACKING, START + 2) == Task((A, B), KINDS["auto"]), "and this was here meanwhile"
    assert upkeep.next(LACKING, START + 3) is None
    upkeep.brought()
    assert upkeep.next(LACKING, START + 4) == Task((A, B), KINDS["auto"])
    upkeep.next(COMPLETE, START + 5)
    assert upkeep.next(LACKING, START + 6) == Task((A, B), KINDS["auto"])


def test_what_waits_for_room_does_not_spin_though_its_task_does_all_that_it_can(upkeep: Upkeep) -> None:
    displaced = replace(COMPLETE, is_displaced=True)
    assert upkeep.next(displaced, START) == Task((), KINDS["auto"])
    upkeep.brought()
    assert upkeep.next(displaced, START + 1) is None


@pytest.mark.parametrize("fill", ["auto", "disk", "peer"])
def test_it_brings_from_where_it_was_told(fill: str) -> None:
    task = Upkeep(fill).next(LACKING, START)
    assert task is not None
    assert task.kinds == KINDS[fill]


def test_none_brings_nothing_that_was_never_here() -> None:
    upkeep = Upkeep("none")
    assert upkeep.next(replace(EMPTY, can_begin=True), START) is None
    assert upkeep.next(LACKING, START) is None


def test_none_brings_back_what_was_found_wrong_and_tries_again() -> None:
    upkeep = Upkeep("none")
    rotten = replace(LACKING, damaged=(B,))
    assert upkeep.next(rotten, START) == Task((B,), KINDS["none"])
    assert upkeep.next(rotten, START + 1) is None
    assert upkeep.next(replace(rotten, sources="p@2"), START + 2) == Task((B,), KINDS["none"])


@pytest.mark.parametrize("fill", ["auto", "none"])
def test_what_waits_for_room_or_a_name_is_looked_at_at_once_and_again_when_it_is_due(fill: str) -> None:
    upkeep, displaced = Upkeep(fill), replace(COMPLETE, is_displaced=True)
    assert upkeep.next(COMPLETE, START) is None
    assert upkeep.next(displaced, START) == Task((), KINDS[fill])
    assert upkeep.next(displaced, START + 1) is None
    assert upkeep.next(displaced, START + RETRY_INTERVAL_S) == Task((), KINDS[fill])


def test_none_brings_what_was_left_behind_in_a_segment_without_a_name() -> None:
    upkeep, left = Upkeep("none"), replace(LACKING, left_behind=(B,))
    upkeep.next(replace(COMPLETE, is_displaced=True), START)
    assert upkeep.next(left, START + 0.5) == Task((B,), KINDS["none"])

"""The ring of host buffers: who waits for one, and what becomes of those that a peer may still write to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from tests.processes import wait_until
from transfer.errors import EngineRefused, TransferFailed
from transfer.slots import staging
from transfer.slots.staging import BUFFERS_MIN, PAGE_NBYTES, SLACK_NBYTES, Staging

BLOCK_NBYTES = 3333


class Registrar:
    """The part of an engine that a ring uses."""

    session_id = "127.0.0.1:15333"

    def __init__(self) -> None:
        self.open: list[tuple[int, int]] = []
        self.is_broken = False

    def register(self, ranges: Iterable[tuple[int, int]]) -> None:
        self.open.extend(ranges)

    def unregister(self, ranges: Iterable[tuple[int, int]]) -> None:
        if self.is_broken:
            raise EngineRefused("3333 ranges")
        for each in ranges:
            self.open.remove(each)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Memory that is never given back."""
    monkeypatch.setattr(staging, "_never_freed", forever := [])
    return forever


@pytest.fixture
def ring() -> Iterator[Staging]:
    """Two buffers, each for one block or many."""
    made = Staging(BLOCK_NBYTES, 2 * BLOCK_NBYTES)
    yield made
    made.close(is_engine_gone=True)


def test_buffers_are_large_enough_lie_on_pages_and_do_not_overlap(ring: Staging) -> None:
    with ring.take() as one, ring.take() as other:
        assert one.nbytes >= BLOCK_NBYTES + SLACK_NBYTES
        assert one.address % PAGE_NBYTES == other.address % PAGE_NBYTES == 0
        assert abs(one.address - other.address) >= one.nbytes == other.nbytes


@pytest.mark.parametrize(
    ("block", "total", "count"),
    [
        (3333, 3333, BUFFERS_MIN),
        (staging.BUFFER_NBYTES, 1 << 40, staging.STAGING_NBYTES // (staging.BUFFER_NBYTES + SLACK_NBYTES)),
        (staging.STAGING_NBYTES, 1 << 40, BUFFERS_MIN),
    ],
    ids=["a small model", "many blocks", "blocks larger than the ring"],
)
def test_the_ring_is_bounded_and_always_has_two(block: int, total: int, count: int) -> None:
    ring = Staging(block, total, allocate=lambda nbytes: (PAGE_NBYTES, None))
    assert ring.capacity >= min(block, total)
    assert ring.count == count


def test_who_finds_none_free_waits_for_one(ring: Staging) -> None:
    got = threading.Event()

    def take() -> None:
        with ring.take():
            got.set()

    with ring.take():
        with ring.take():
            waiting = threading.Thread(target=take)
            waiting.start()
            assert not got.is_set()
        wait_until(got.is_set, "a buffer came free")
    waiting.join()


def test_a_buffer_that_may_still_be_written_to_is_never_used_again(ring: Staging) -> None:
    with ring.take() as late:
        late.is_retired = True
    assert ring.is_spent
    for _ in range(3):
        with ring.take() as another:
            assert another.address != late.address


def test_a_ring_whose_buffers_are_all_lost_says_so_at_once(ring: Staging, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(ring.count):
        with ring.take() as late:
            late.is_retired = True
    monkeypatch.setattr(ring._free, "get", lambda **_: pytest.fail("it waited"))
    with pytest.raises(TransferFailed, match="every staging buffer was lost"), ring.take():
        pass


def test_who_waits_in_vain_is_told(ring: Staging, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "WAIT_S_MAX", 0.033)
    with ring.take(), ring.take(), pytest.raises(TransferFailed, match="no staging buffer"), ring.take():
        pass


def test_a_buffer_is_given_back_also_by_who_fails(ring: Staging) -> None:
    for _ in range(2 * ring.count):
        with pytest.raises(ZeroDivisionError), ring.take():
            raise ZeroDivisionError


def test_an_engine_may_write_to_all_of_it_until_it_is_closed(ring: Staging, kept: list[Any]) -> None:
    engine = Registrar()
    ring.prepare(engine)  # type: ignore[arg-type]
    ring.prepare(engine)  # type: ignore[arg-type]
    ((address, nbytes),) = engine.open
    with ring.take() as one, ring.take() as other:
        assert {address} <= {one.address, other.address}
        assert max(one.address, other.address) + one.nbytes == address + nbytes
    ring.close(is_engine_gone=False)
    assert engine.open == kept == []


def lose_one(ring: Staging) -> None:
    with ring.take() as late:
        late.is_retired = True


@pytest.mark.parametrize(
    ("harm", "is_engine_gone", "is_kept"),
    [
        (lambda ring, engine: None, False, False),
        (lambda ring, engine: lose_one(ring), False, True),
        (lambda ring, engine: lose_one(ring), True, False),
        (lambda ring, engine: setattr(engine, "is_broken", True), False, True),
    ],
    ids=["quiet", "late bytes", "late bytes, but the engine is gone", "the engine keeps it open"],
)
def test_memory_that_may_still_be_written_to_is_kept_to_the_end(
    kept: list[Any], harm: Callable[[Staging, Registrar], None], is_engine_gone: bool, is_kept: bool
) -> None:
    ring, engine = Staging(BLOCK_NBYTES, 2 * BLOCK_NBYTES), Registrar()
    ring.prepare(engine)  # type: ignore[arg-type]
    harm(ring, engine)
    ring.close(is_engine_gone=is_engine_gone)
    assert bool(kept) == is_kept

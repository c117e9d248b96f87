"""A transfer engine that is thrown away: what it had under way never arrives, and the next one takes its place."""

from __future__ import annotations

import mmap
import threading
import time

import numpy as np
import pytest

from transfer.engine import Copy, DisposableEngine, TransferEngine
from transfer.engine import disposable as disposable_module
from transfer.engine.double import EngineDouble, Network
from transfer.errors import TransferFailed

NBYTES = 3333


class Memory:
    """A buffer, and where it lies."""

    def __init__(self, value: int) -> None:
        self.array = np.frombuffer(mmap.mmap(-1, NBYTES), np.uint8)
        self.array[:] = value
        self.address = int(self.array.ctypes.data)

    @property
    def range(self) -> tuple[int, int]:
        return self.address, NBYTES


class Started:
    """Starts engines of a network, and counts them; holds none."""

    def __init__(self, network: Network) -> None:
        self.count = 0
        self._network = network

    def __call__(self) -> TransferEngine:
        self.count += 1
        return self._network.engine()


@pytest.fixture
def network() -> Network:
    return Network()


@pytest.fixture
def started(network: Network) -> Started:
    return Started(network)


@pytest.fixture
def theirs() -> Memory:
    return Memory(5)


@pytest.fixture
def peer(network: Network, theirs: Memory) -> EngineDouble:
    engine = network.engine()
    engine.register([theirs.range])
    return engine


def test_it_starts_when_it_is_needed_and_again_after_it_was_dropped(
    started: Started, peer: EngineDouble, theirs: Memory
) -> None:
    engine, ours = DisposableEngine(started), Memory(7)
    assert (started.count, engine.is_running) == (0, False)
    for count in (1, 2):
        ours.array[:] = 7
        engine.read(peer.session_id, [Copy(ours.address, theirs.address, NBYTES)])
        assert (ours.array == 5).all()
        assert (started.count, engine.is_running) == (count, True)
        engine.drop()
        assert not engine.is_running


def read_in_vain(engine: DisposableEngine, peer: EngineDouble, ours: Memory, theirs: Memory) -> None:
    """As a restore does it: what it makes of the error is a text."""
    with pytest.raises(TransferFailed) as failed:
        engine.read(peer.session_id, [Copy(ours.address, theirs.address, NBYTES)])
    assert failed.value.timed_out


def test_what_it_had_under_way_never_arrives(
    started: Started, network: Network, peer: EngineDouble, theirs: Memory
) -> None:
    engine, ours = DisposableEngine(started), Memory(7)
    network.stop(peer.session_id)
    read_in_vain(engine, peer, ours, theirs)
    engine.drop()
    network.wake(peer.session_id)
    assert (ours.array == 7).all()


def test_a_fence_is_drawn_only_where_something_may_still_arrive(
    started: Started, network: Network, peer: EngineDouble, theirs: Memory
) -> None:
    engine, ours = DisposableEngine(started), Memory(7)
    engine.read(peer.session_id, [Copy(ours.address, theirs.address, NBYTES)])
    network.fail(peer.session_id)
    with pytest.raises(TransferFailed):
        engine.read(peer.session_id, [Copy(ours.address, theirs.address, NBYTES)])
    engine.fence()
    assert engine.is_running, "a transfer that failed has ended"
    network.stop(peer.session_id)
    read_in_vain(engine, peer, ours, theirs)
    engine.fence()
    assert not engine.is_running
    assert engine.session_id
    engine.fence()
    assert engine.is_running


def test_without_being_dropped_it_arrives(
    started: Started, network: Network, peer: EngineDouble, theirs: Memory
) -> None:
    engine, ours = DisposableEngine(started), Memory(7)
    network.stop(peer.session_id)
    read_in_vain(engine, peer, ours, theirs)
    network.wake(peer.session_id)
    assert (ours.array == 5).all(), "else the test before this one proves nothing"


def test_what_was_registered_is_open_to_the_next_one_too(started: Started, network: Network) -> None:
    engine, ours, other = DisposableEngine(started), Memory(7), Memory(9)
    engine.register([ours.range, other.range])
    engine.unregister([other.range])
    engine.drop()
    source = Memory(3)
    writer = network.engine()
    writer.write(engine.session_id, [Copy(ours.address, source.address, NBYTES)])
    assert (ours.array == 3).all()
    with pytest.raises(TransferFailed):
        writer.write(engine.session_id, [Copy(other.address, source.address, NBYTES)])


def test_one_that_somebody_holds_is_said_to_be_there_as_long_as_it_is(network: Network) -> None:
    held = [network.engine()]
    engine = DisposableEngine(lambda: held[0])
    assert engine.session_id
    for _ in range(2):
        with pytest.raises(TransferFailed, match="held by somebody"):
            engine.drop()
    held.clear()
    engine.drop()


def test_one_in_a_circle_is_collected(network: Network) -> None:
    def start() -> TransferEngine:
        engine = network.engine()
        engine.circle = engine  # type: ignore[attr-defined]
        return engine

    engine = DisposableEngine(start)
    assert engine.session_id
    engine.drop()


def test_a_call_under_way_is_waited_for_but_not_for_ever(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disposable_module, "DROP_WAIT_S", 0.01)
    engine = DisposableEngine(started)
    with engine._use(), pytest.raises(TransferFailed, match="has not ended"):
        engine.drop()
    engine.drop()


def test_calls_that_come_one_after_the_other_do_not_keep_it_from_being_dropped(
    started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when many consumers are written to at once: those that come later wait, and have the next engine."""
    monkeypatch.setattr(disposable_module, "DROP_WAIT_S", 3.0)
    engine, is_over = DisposableEngine(started), threading.Event()

    def use_until_another_does() -> None:
        while not is_over.is_set():
            with engine._use():
                time.sleep(0.01)

    users = [threading.Thread(target=use_until_another_does) for _ in range(4)]
    for user in users:
        user.start()
    try:
        engine.drop()
    finally:
        is_over.set()
        for user in users:
            user.join(30)
    assert not any(user.is_alive() for user in users)

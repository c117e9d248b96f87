"""What is the double's own: faults that happen when they are told to."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest

from transfer.engine import Copy
from transfer.engine.double import EngineDouble, Network
from transfer.engine.protocol import TRANSFER_TIMEOUT_S
from transfer.errors import TransferFailed

NBYTES = 3333


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Scene:
    """Two engines, and memory of each that both have opened."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.network = Network(self.clock.sleep)
        self.ours, self.theirs = self.network.engine(), self.network.engine()
        self.here, self.there = np.zeros(NBYTES, np.uint8), np.full(NBYTES, 7, np.uint8)
        for engine, memory in ((self.ours, self.here), (self.theirs, self.there)):
            engine.register([(memory.ctypes.data, NBYTES)])

    def read(self, engine: EngineDouble | None = None) -> None:
        (engine or self.ours).read(self.theirs.session_id, [Copy(self._at(self.here), self._at(self.there), NBYTES)])

    def write(self) -> None:
        self.ours.write(self.theirs.session_id, [Copy(self._at(self.there), self._at(self.here), NBYTES)])

    @staticmethod
    def _at(memory: np.ndarray[Any, np.dtype[np.uint8]]) -> int:
        return int(memory.ctypes.data)


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_a_session_fails_as_often_as_it_is_told_to(scene: Scene) -> None:
    scene.network.fail(scene.theirs.session_id, 2)
    for _ in range(2):
        with pytest.raises(TransferFailed, match="3,333 bytes") as failed:
            scene.read()
        assert not failed.value.timed_out
        assert not scene.here.any()
    scene.read()
    assert (scene.here == 7).all()


def test_a_stopped_session_times_out_by_the_clock_and_answers_with_the_bytes_of_when_it_wakes(scene: Scene) -> None:
    scene.network.stop(scene.theirs.session_id)
    with pytest.raises(TransferFailed) as failed:
        scene.read()
    assert failed.value.timed_out
    assert scene.clock.now == TRANSFER_TIMEOUT_S
    assert not scene.here.any()
    scene.there[:] = 9
    scene.network.wake(scene.theirs.session_id)
    assert (scene.here == 9).all()
    scene.here[:] = 0
    scene.network.wake(scene.theirs.session_id)
    assert not scene.here.any(), "what was late comes once"


def test_a_late_write_to_memory_that_its_owner_closed_meanwhile_is_refused(scene: Scene) -> None:
    scene.network.stop(scene.theirs.session_id)
    with pytest.raises(TransferFailed):
        scene.write()
    scene.theirs.unregister([(scene.there.ctypes.data, NBYTES)])
    scene.network.wake(scene.theirs.session_id)
    assert (scene.there == 7).all()


def test_what_a_dropped_engine_had_under_way_never_arrives(scene: Scene) -> None:
    scene.network.stop(scene.theirs.session_id)
    dropped = scene.network.engine()
    with pytest.raises(TransferFailed):
        scene.read(dropped)
    del dropped
    gc.collect()
    scene.network.wake(scene.theirs.session_id)
    assert not scene.here.any()


def test_a_slow_session_takes_time_by_the_clock(scene: Scene) -> None:
    scene.network.slow(scene.theirs.session_id, nbytes_per_s=NBYTES / 5)
    scene.read()
    assert scene.clock.now == pytest.approx(5)
    assert (scene.here == 7).all()


def test_engines_of_two_networks_do_not_reach_each_other(scene: Scene) -> None:
    with pytest.raises(TransferFailed):
        scene.read(Network().engine())

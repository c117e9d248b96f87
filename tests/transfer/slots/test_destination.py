"""Slots as a destination: straight, by way of staging, and what becomes of late bytes. The engine is the double."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch

from shm.block import ExpertKey, TensorEntry
from shm.checksum import checksum
from shm.errors import BlockUnavailable
from shm.manifest import FileSpec, Manifest
from transfer.destination import Resident
from transfer.engine.double import Network
from transfer.errors import TransferFailed
from transfer.memory import view
from transfer.plan import Batch, Want
from transfer.slots import Slots
from transfer.slots.destination import SlotDestination
from transfer.slots.host import HostSlots
from transfer.slots.staging import Staging
from transfer.slots.table import SlotTable
from transfer.sources import PeerMemory, reading

HIDDEN, ROWS, EXPERTS = 33, 14, 4
SHAPES = {"gate": (ROWS, HIDDEN), "up": (ROWS, HIDDEN), "down": (HIDDEN, ROWS)}
STEM = "model.layers.0.mlp.experts."


def manifest() -> Manifest:
    entries = [
        TensorEntry(f"model.layers.{{layer}}.mlp.experts.{{expert}}.{part}_proj.weight", "BF16", shape, 0, 0)
        for part, shape in SHAPES.items()
    ]
    keys = [ExpertKey(0, expert) for expert in range(EXPERTS)]
    return Manifest.build("m", "t", "experts", [FileSpec("f", 1 << 20, "0")], dict.fromkeys(keys, entries))


class Scene:
    """A rank whose slots hold every expert, the first one twice, and a peer that has all blocks."""

    def __init__(self, *, is_straight: bool = False, stages_host: bool = False, buffers: int = 3) -> None:
        self.manifest = manifest()
        nbytes = int(self.manifest.nbytes[0])
        self.tensors = {
            f"{STEM}w13_weight": torch.zeros((EXPERTS + 1, 2 * ROWS, HIDDEN), dtype=torch.bfloat16),
            f"{STEM}w2_weight": torch.zeros((EXPERTS + 1, HIDDEN, ROWS), dtype=torch.bfloat16),
        }
        slots = Slots.fused(self.tensors, physical_to_logical=[[*range(EXPERTS), 0]])
        table = SlotTable(slots.plan(self.manifest), self.manifest)
        self.memory = HostSlots(table)
        self.network = Network()
        self.engine, self.theirs = self.network.engine(), self.network.engine()
        self.engine.register([(r.address, r.nbytes) for r in slots.ranges])
        self.staging = Staging(nbytes, buffers * nbytes)
        self.done = 0
        self.destination = SlotDestination(
            self.memory, table, self.staging, self.tick,
            engine=self.engine, is_straight=is_straight, stages_host=stages_host,
        )  # fmt: skip
        self.blocks = [self.block(row, nbytes) for row in range(EXPERTS)]
        self.theirs.register([(self.address(row), nbytes) for row in range(EXPERTS)])
        self.wants = tuple(Want(row, nbytes, checksum(memoryview(b))) for row, b in enumerate(self.blocks))

    def block(self, row: int, nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Random tensors, and zeros between them."""
        made = np.zeros(nbytes, np.uint8)
        for tensor in self.manifest.schema(row).tensors:
            content = np.random.default_rng([row, tensor.offset]).bytes(tensor.nbytes)
            made[tensor.offset : tensor.offset + tensor.nbytes] = np.frombuffer(content, np.uint8)
        return made

    def address(self, row: int) -> int:
        return int(self.blocks[row].ctypes.data)

    def tick(self) -> None:
        self.done += 1

    def residents(self) -> list[Resident]:
        return [Resident(want, self.address(want.row), want.checksum or b"", ()) for want in self.wants]

    def read(self) -> Mapping[int, bytes]:
        peer = PeerMemory("peer", reading(self.engine, self.theirs.session_id))
        addresses = tuple(self.address(want.row) for want in self.wants)
        return peer.fetch(Batch(peer, self.wants, addresses, 0), self.destination)

    @property
    def is_right(self) -> bool:
        return all(self.memory.check([want.row])[want.row] == want.checksum for want in self.wants)

    @property
    def is_untouched(self) -> bool:
        return not any(tensor.any() for tensor in self.tensors.values())


def expected(scene: Scene) -> dict[int, bytes | None]:
    return {want.row: want.checksum for want in scene.wants}


@pytest.mark.parametrize("stages_host", [False, True])
def test_blocks_of_this_host_are_in_every_slot_with_the_checksum_taken_there(stages_host: bool) -> None:
    scene = Scene(stages_host=stages_host)
    assert scene.destination.take(scene.residents()) == expected(scene)
    assert scene.is_right


@pytest.mark.parametrize("is_straight", [False, True])
def test_blocks_of_a_peer_are_in_every_slot_with_the_checksum_taken_there(is_straight: bool) -> None:
    scene = Scene(is_straight=is_straight)
    assert scene.read() == expected(scene)
    assert scene.is_right


def test_late_bytes_land_in_a_buffer_that_nobody_gets_again_and_never_in_a_slot() -> None:
    scene = Scene()
    scene.network.stop(scene.theirs.session_id)
    with pytest.raises(TransferFailed) as failed:
        scene.read()
    assert not failed.value.timed_out, "to the restore it is a failure like any other"
    with ExitStack() as held:
        left = [held.enter_context(scene.staging.take()) for _ in range(scene.staging.count - 1)]
        buffers = [view(buffer.address, buffer.nbytes) for buffer in left]
        for each in buffers:
            each[:] = bytes([7]) * len(each)
        scene.network.wake(scene.theirs.session_id)
        assert all(bytes(each) == bytes([7]) * len(each) for each in buffers)
    assert scene.is_untouched


def test_late_bytes_may_reach_a_slot_that_was_filled_straight_and_the_restore_is_told() -> None:
    scene = Scene(is_straight=True)
    scene.network.stop(scene.theirs.session_id)
    with pytest.raises(TransferFailed) as failed:
        scene.read()
    assert failed.value.timed_out
    scene.network.wake(scene.theirs.session_id)
    assert not scene.is_untouched


def test_what_is_read_in_one_run_never_goes_straight_and_is_compared_with_what_was_taken_on_the_way() -> None:
    scene = Scene(is_straight=True)
    settled: dict[int, bytes] = {}
    for landing in scene.destination.landings(scene.wants, in_one_run=True):
        with landing as landed:
            for row, (piece,) in landed.pieces.items():
                view(piece.destination, piece.nbytes)[:] = memoryview(scene.blocks[row])
            taken = {row: checksum(memoryview(scene.blocks[row])) for row in landed.pieces}
            settled |= landed.settle({row: b"another" if row == 2 else said for row, said in taken.items()}, ())
    assert settled == {row: said for row, said in expected(scene).items() if row != 2}
    assert scene.is_right


def test_a_block_that_was_left_out_is_looked_at_only_where_its_checksum_can_be_told() -> None:
    scene = Scene()
    scene.destination.take(scene.residents())
    assert scene.destination.checksum(scene.wants[1]) == scene.wants[1].checksum
    with pytest.raises(BlockUnavailable, match="withdrawn while it was being copied"):
        scene.destination.checksum(scene.wants[1]._replace(checksum=None))


def test_every_block_that_is_in_place_and_right_is_told() -> None:
    scene = Scene()
    scene.destination.publish(scene.wants[0], scene.wants[0].checksum or b"")
    assert scene.done == 1

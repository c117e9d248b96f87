"""Slots on a device hold the block's bytes: runs, rows, siblings, and the way back.

On a machine without CUDA a double stands in for the driver, and moves the same bytes between the same addresses.
"""

from __future__ import annotations

import ctypes
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from shm.block import ExpertKey, TensorEntry
from shm.checksum import checksum
from shm.manifest import FileSpec, Manifest
from transfer.cuda.driver import Cuda, DeviceFailed
from transfer.cuda.slots import DeviceSlots
from transfer.slots import Slots
from transfer.slots.staging import Staging, host_memory
from transfer.slots.table import SlotTable

# Where there are several, one that is not current, as for most ranks of a host.
DEVICE = f"cuda:{torch.cuda.device_count() - 1}" if torch.cuda.is_available() else "cpu"
HIDDEN, ROWS, EXPERTS = 384, 256, 5


class NoStream:
    """Copies of the double are done when its calls return."""

    def __init__(self) -> None:
        self.waits = 0

    def follow(self) -> None:
        pass

    def wait(self) -> None:
        self.waits += 1


class NoCuda:
    """`transfer.cuda.driver.Cuda` over host memory."""

    device = "cpu"

    def __init__(self) -> None:
        self.calls: list[str] = []

    def open_stream(self) -> NoStream:
        return NoStream()

    def current(self) -> AbstractContextManager[None]:
        return nullcontext()

    def allocate(self, nbytes: int) -> tuple[int, Any]:
        return host_memory(nbytes)

    def runs(self, way: str, to: np.ndarray, source: np.ndarray, sizes: np.ndarray, stream: NoStream) -> None:
        self.calls.append(way)
        for one, other, size in zip(to.tolist(), source.tolist(), sizes.tolist(), strict=True):
            ctypes.memmove(one, other, size)

    def rows(
        self, way: str, to: tuple[int, int], source: tuple[int, int], shape: tuple[int, int], stream: NoStream
    ) -> None:
        self.calls.append(way)
        for row in range(shape[0]):
            ctypes.memmove(to[0] + row * to[1], source[0] + row * source[1], shape[1])


@pytest.fixture
def cuda() -> Any:
    return Cuda(DEVICE) if DEVICE != "cpu" else NoCuda()


def manifest() -> Manifest:
    """fp8 weights with a scale for each 128 by 128."""
    sides = {"gate": (ROWS, HIDDEN), "up": (ROWS, HIDDEN), "down": (HIDDEN, ROWS)}
    entries = [
        TensorEntry(f"model.layers.{{layer}}.mlp.experts.{{expert}}.{name}_proj.{kind}", dtype, shape, 0, 0)
        for name, (rows, columns) in sides.items()
        for kind, dtype, shape in (
            ("weight", "F8_E4M3", (rows, columns)),
            ("weight_scale_inv", "F32", (rows // 128, columns // 128)),
        )
    ]
    return Manifest.build(
        "m", "t", "experts", [FileSpec("f", 1 << 30, "0")], {ExpertKey(1, e): entries for e in range(EXPERTS)}
    )


def parameters(slots: int, tp: int) -> dict[str, torch.Tensor]:
    rows = ROWS // tp
    shapes = {
        "w13_weight": (torch.float8_e4m3fn, (slots, 2 * rows, HIDDEN)),
        "w13_weight_scale_inv": (torch.float32, (slots, 2 * rows // 128, HIDDEN // 128)),
        "w2_weight": (torch.float8_e4m3fn, (slots, HIDDEN, rows)),
        "w2_weight_scale_inv": (torch.float32, (slots, HIDDEN // 128, rows // 128)),
    }
    return {
        f"model.layers.1.mlp.experts.{name}": torch.zeros(shape, dtype=dtype, device=DEVICE)
        for name, (dtype, shape) in shapes.items()
    }


def blocks(of: Manifest) -> tuple[list[tuple[int, int]], list[bytes], Any]:
    """(row, address) of random blocks in host memory, their bytes, and what keeps them alive."""
    size = int(of.nbytes[0])
    address, memory = host_memory(size * EXPERTS)
    random = np.random.default_rng(3)
    content = []
    for row in range(EXPERTS):
        block = bytearray(size)
        for tensor in of.schema(row).tensors:
            block[tensor.offset : tensor.offset + tensor.nbytes] = random.bytes(tensor.nbytes)
        ctypes.memmove(address + row * size, bytes(block), size)
        content.append(bytes(block))
    return [(row, address + row * size) for row in range(EXPERTS)], content, memory


def tensor(of: Manifest, block: bytes, name: str) -> torch.Tensor:
    found = next(t for t in of.schema(0).tensors if t.name.endswith(name))
    raw = bytearray(block[found.offset : found.offset + found.nbytes])
    return torch.frombuffer(raw, dtype=torch.uint8).view(found.shape[0], -1)


def raw(held: torch.Tensor) -> torch.Tensor:
    return held.cpu().contiguous().view(torch.uint8).view(held.shape[0], -1)


@pytest.mark.parametrize(("tp", "rank"), [(1, 0), (2, 1)])
def test_every_slot_and_its_siblings_get_the_blocks_bytes(cuda: Any, tp: int, rank: int) -> None:
    of = manifest()
    held = parameters(EXPERTS + 2, tp)
    placement = {1: [4, 2, 0, 1, 3, 2, 4]}
    slots = Slots.fused(held, physical_to_logical=placement, tp_rank=rank, tp_size=tp)
    table = SlotTable(slots.plan(of), of)
    memory = DeviceSlots(table, cuda, Staging(int(of.nbytes.max()), int(of.nbytes.sum()), cuda.allocate))
    given, content, _alive = blocks(of)
    memory.follow(wait=False)
    assert memory.put(given) == {row: checksum(memoryview(block)) for row, block in enumerate(content)}
    for slot, expert in enumerate(placement[1]):
        for kind in ("weight", "weight_scale_inv"):
            w13 = raw(held[f"model.layers.1.mlp.experts.w13_{kind}"][slot])
            w2 = raw(held[f"model.layers.1.mlp.experts.w2_{kind}"][slot])
            gate, up, down = (tensor(of, content[expert], f"{part}_proj.{kind}") for part in ("gate", "up", "down"))
            rows, columns = len(gate) // tp, down.shape[1] // tp
            mine = slice(rank * rows, (rank + 1) * rows)
            assert torch.equal(w13, torch.cat([gate[mine], up[mine]]))
            assert torch.equal(w2, down[:, rank * columns : (rank + 1) * columns])


def test_what_lies_on_the_device_is_checked_there(cuda: Any) -> None:
    of = manifest()
    held = parameters(EXPERTS + 1, 1)
    slots = Slots.fused(held, physical_to_logical={1: [0, 1, 2, 3, 4, 2]})
    table = SlotTable(slots.plan(of), of)
    memory = DeviceSlots(table, cuda, Staging(int(of.nbytes.max()), int(of.nbytes.sum()), cuda.allocate))
    given, content, _alive = blocks(of)
    memory.put(given)
    for row, block in enumerate(content):
        assert memory.check([row])[row] == checksum(memoryview(block))
    scale = held["model.layers.1.mlp.experts.w2_weight_scale_inv"]
    scale[5].zero_()
    assert memory.check([2])[2] not in {checksum(memoryview(block)) for block in content}, "the sibling differs"
    memory.spread(2)
    assert memory.check([2])[2] == checksum(memoryview(content[2]))


@pytest.mark.parametrize("tp", [1, 2])
def test_what_lies_on_the_device_is_compared_with_a_block_and_brought_back(cuda: Any, tp: int) -> None:
    of = manifest()
    held = parameters(EXPERTS + 1, tp)
    slots = Slots.fused(held, physical_to_logical={1: [0, 1, 2, 3, 4, 2]}, tp_rank=tp - 1, tp_size=tp)
    table = SlotTable(slots.plan(of), of)
    memory = DeviceSlots(table, cuda, Staging(int(of.nbytes.max()), int(of.nbytes.sum()), cuda.allocate))
    given, content, _alive = blocks(of)
    memory.put(given)
    assert all(memory.holds(row, address) for row, address in given)
    assert not memory.holds(2, given[3][1])
    whole = bytes(memory.gather(2, 1))
    assert whole == content[2] or tp > 1
    up = table.manifest.schema(2).tensors[-1]
    last = up.offset + up.nbytes - 1  # of a scale, which the last rank has
    assert whole[last] == content[2][last]
    held["model.layers.1.mlp.experts.w13_weight_scale_inv"][5].view(torch.uint8)[-1, -1] ^= 1
    assert memory.gather(2, 1)[last] == content[2][last] ^ 1
    assert not memory.holds(2, given[2][1]), "the sibling differs"
    assert memory.holds(1, given[1][1])


@pytest.mark.parametrize(("placement", "singles"), [([0, 1, 2, 3, 4], 0), ([0, 2, 4, 1, 3], 0), ([4, 3, 2, 1, 0], 20)])
def test_neighbours_are_copied_together_and_never_two_tensors(
    cuda: Any, placement: list[int], singles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    of, held = manifest(), parameters(EXPERTS, 1)
    slots = Slots.fused(held, physical_to_logical={1: placement})
    table = SlotTable(slots.plan(of), of)
    memory = DeviceSlots(table, cuda, Staging(int(of.nbytes.max()), int(of.nbytes.sum()), cuda.allocate))
    given, content, _alive = blocks(of)
    matrices: list[tuple[int, int]] = []
    runs: list[int] = []
    copy_rows, copy_runs = cuda.rows, cuda.runs

    def rows(way: str, to: tuple[int, int], source: tuple[int, int], shape: tuple[int, int], stream: Any) -> None:
        end = to[0] + (shape[0] - 1) * to[1] + shape[1]
        tensors = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in held.values()]
        assert any(start <= to[0] and end <= stop for start, stop in tensors)
        matrices.append(shape)
        copy_rows(way, to, source, shape, stream)

    def count_runs(way: str, to: np.ndarray, *rest: Any) -> None:
        runs.extend(to.tolist())
        copy_runs(way, to, *rest)

    monkeypatch.setattr(cuda, "rows", rows)
    monkeypatch.setattr(cuda, "runs", count_runs)
    assert memory.put(given) == {row: checksum(memoryview(block)) for row, block in enumerate(content)}
    copied = len(runs) + sum(count for count, _ in matrices)
    assert copied == len(table.copies_of(table.rows)[0]), "every run once"
    assert len(runs) >= singles
    if not singles:
        assert len(matrices) < copied / 2
    for slot, expert in enumerate(placement):
        down = held["model.layers.1.mlp.experts.w2_weight"][slot]
        assert torch.equal(raw(down), tensor(of, content[expert], "down_proj.weight"))


def test_no_matrix_crosses_from_one_page_locked_piece_into_another(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    of, held = manifest(), parameters(EXPERTS, 1)
    table = SlotTable(Slots.fused(held).plan(of), of)
    memory = DeviceSlots(table, cuda, Staging(int(of.nbytes.max()), int(of.nbytes.sum()), cuda.allocate))
    given, content, _alive = blocks(of)
    memory.edges = np.array([given[2][1]], np.int64)  # the third block begins another piece
    matrices: list[tuple[int, int]] = []
    copy_rows = cuda.rows

    def rows(way: str, to: tuple[int, int], source: tuple[int, int], shape: tuple[int, int], stream: Any) -> None:
        matrices.append((source[0], source[0] + (shape[0] - 1) * source[1] + shape[1]))
        copy_rows(way, to, source, shape, stream)

    monkeypatch.setattr(cuda, "rows", rows)
    assert memory.put(given) == {row: checksum(memoryview(block)) for row, block in enumerate(content)}
    edge = given[2][1]
    assert any(start < edge for start, _ in matrices)
    assert any(start >= edge for start, _ in matrices)
    assert not [span for span in matrices if span[0] < edge < span[1]]


def test_nothing_is_copied_for_nothing(cuda: Any) -> None:
    of = manifest()
    table = SlotTable(Slots.fused(parameters(EXPERTS, 1)).plan(of), of)
    assert DeviceSlots(table, cuda, Staging(1, 1, cuda.allocate)).put([]) == {}


@pytest.mark.skipif(DEVICE != "cpu", reason="there is a device")
def test_without_a_device_there_is_a_clear_error() -> None:
    with pytest.raises(DeviceFailed, match="no working CUDA device"):
        Cuda("cuda:0")

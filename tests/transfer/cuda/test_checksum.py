"""The GPU's own xxh3-128 is the processor's, whatever the size of a block and wherever its runs lie.

On a machine without CUDA only the constants and the compiler's absence can be looked at.
"""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
import xxhash

from shm.block import ExpertKey, TensorEntry
from shm.checksum import checksum
from shm.manifest import FileSpec, Manifest
from transfer.client.bound_slots import BoundSlots
from transfer.cuda import checksum as device_checksum
from transfer.cuda import kernels
from transfer.cuda.checksum import can_take, source
from transfer.cuda.driver import Cuda, DeviceFailed
from transfer.cuda.slots import DeviceSlots
from transfer.slots import Slots
from transfer.slots.host import UNEQUAL
from transfer.slots.table import SlotTable

# Where there are several, one that is not current, as for most ranks of a host.
DEVICE = f"cuda:{torch.cuda.device_count() - 1}" if torch.cuda.is_available() else "cpu"
EXPERTS = 7
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class Rank:
    """Slots on the device for the blocks of one layer, and the blocks in page-locked memory."""

    def __init__(self, inner: int, hidden: int, dtype: str = "BF16", placement: list[int] | None = None) -> None:
        torch_dtype = {"BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}[dtype]
        sides = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        entries = [
            TensorEntry(f"model.layers.{{layer}}.mlp.experts.{{expert}}.{part}_proj.weight", dtype, shape, 0, 0)
            for part, shape in sides.items()
        ]
        files, keys = [FileSpec("f", 1 << 40, "0")], [ExpertKey(1, expert) for expert in range(EXPERTS)]
        self.manifest = Manifest.build("m", "t", "experts", files, dict.fromkeys(keys, entries))
        self.placement = placement or list(range(EXPERTS))
        slots = len(self.placement)
        self.held = {
            "model.layers.1.mlp.experts.w13_weight": torch.zeros(
                (slots, 2 * inner, hidden), dtype=torch_dtype, device=DEVICE
            ),
            "model.layers.1.mlp.experts.w2_weight": torch.zeros(
                (slots, hidden, inner), dtype=torch_dtype, device=DEVICE
            ),
        }
        described = Slots.fused(self.held, physical_to_logical={1: self.placement})
        torch.zeros(1, device="cuda:0")  # an engine may have worked on another device, which is current then
        self.bound = BoundSlots(described, self.manifest)
        assert can_take(self.bound.table)
        assert isinstance(self.bound.memory, DeviceSlots)
        self.memory = self.bound.memory
        size = int(self.manifest.nbytes[0])
        step = -(-size // 64) * 64
        address, self.alive = Cuda(DEVICE).allocate(step * EXPERTS)
        random = np.random.default_rng(inner)
        self.blocks, self.expected = [], {}
        for row in range(EXPERTS):
            block = bytearray(size)
            for tensor in self.manifest.schema(row).tensors:
                block[tensor.offset : tensor.offset + tensor.nbytes] = random.bytes(tensor.nbytes)
            ctypes.memmove(address + row * step, bytes(block), size)
            self.blocks.append((row, address + row * step))
            self.expected[row] = checksum(memoryview(block))


# Blocks of 250 to 2 million bytes: shorter than a round, of whole rounds, a stripe over, with gaps between tensors.
SIZES = [(8, 11), (8, 16), (16, 32), (32, 32), (11, 16), (36, 20), (64, 44), (100, 128), (333, 448), (512, 768)]


@needs_cuda
@pytest.mark.parametrize(("inner", "hidden"), SIZES)
@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3"])
def test_it_is_the_processors(inner: int, hidden: int, dtype: str) -> None:
    rank = Rank(inner, hidden, dtype)
    assert rank.memory.put(rank.blocks) == rank.expected
    assert rank.memory.check(list(rank.expected)) == rank.expected


@needs_cuda
def test_the_device_that_was_current_stays_so() -> None:
    rank = Rank(64, 44)
    assert rank.memory.put(rank.blocks) == rank.expected
    assert torch.cuda.current_device() == 0


@needs_cuda
@pytest.mark.parametrize("part", ["w13_weight", "w2_weight"])
def test_a_byte_that_differs_on_the_device_is_seen(part: str) -> None:
    rank = Rank(333, 444)
    rank.memory.put(rank.blocks)
    tensor = rank.held[f"model.layers.1.mlp.experts.{part}"].view(torch.uint8)
    tensor[4, -1, -1] ^= 1
    torch.cuda.synchronize(DEVICE)
    assert {row for row, right in rank.expected.items() if rank.memory.check([row])[row] != right} == {4}


@needs_cuda
def test_slots_of_one_expert_that_differ_are_unequal() -> None:
    rank = Rank(64, 44, placement=[0, 1, 2, 3, 4, 5, 6, 2, 4])
    assert rank.memory.put(rank.blocks) == rank.expected
    rank.held["model.layers.1.mlp.experts.w2_weight"].view(torch.uint8)[7, 0, 0] ^= 1
    torch.cuda.synchronize(DEVICE)
    assert rank.memory.check([2])[2] == UNEQUAL
    assert rank.memory.check([4])[4] == rank.expected[4]


@needs_cuda
@pytest.mark.parametrize(("name", "value"), [("SUBJECTS_MAX", 2), ("SUMS_NBYTES", 64)])
def test_more_than_fits_at_once_is_taken_in_turns(monkeypatch: pytest.MonkeyPatch, name: str, value: int) -> None:
    monkeypatch.setattr(device_checksum, name, value)
    rank = Rank(333, 444)
    assert rank.memory.put(rank.blocks) == rank.expected


@needs_cuda
def test_without_device_memory_to_spare_the_processor_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(cuda: Cuda, nbytes: int) -> None:
        raise DeviceFailed(f"{nbytes:,} bytes on {cuda.device} could not be had")

    monkeypatch.setattr(Cuda, "allocate_on_device", full)
    rank = Rank(64, 44)
    assert rank.memory.put(rank.blocks) == rank.expected
    assert rank.memory.check([3])[3] == rank.expected[3]


@needs_cuda
def test_source_that_does_not_compile_says_so() -> None:
    with pytest.raises(DeviceFailed, match="could not compile for sm_"):
        kernels.Kernels(Cuda(DEVICE), "no kernel", ())


@pytest.mark.parametrize(("inner", "tp", "can"), [(64, 1, True), (63, 1, True), (64, 2, False), (3, 1, False)], ids=str)
def test_parts_of_blocks_and_odd_bytes_are_left_to_the_processor(inner: int, tp: int, can: bool) -> None:
    hidden = 44 if inner != 3 else 11
    sides = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    entries = [
        TensorEntry(f"model.layers.{{layer}}.mlp.experts.{{expert}}.{part}_proj.weight", "BF16", shape, 0, 0)
        for part, shape in sides.items()
    ]
    manifest = Manifest.build("m", "t", "experts", [FileSpec("f", 1 << 40, "0")], {ExpertKey(1, 0): entries})
    held = {
        "model.layers.1.mlp.experts.w13_weight": torch.zeros((1, 2 * inner // tp, hidden), dtype=torch.bfloat16),
        "model.layers.1.mlp.experts.w2_weight": torch.zeros((1, hidden, inner // tp), dtype=torch.bfloat16),
    }
    slots = Slots.fused(held, tp_rank=0, tp_size=tp)
    assert can_take(SlotTable(slots.plan(manifest), manifest)) is can


def test_the_constants_are_those_of_the_algorithm() -> None:
    """A round's arithmetic in Python, with the constants that the kernels get, is xxhash's."""
    words: dict[str, list[int]] = {}
    for line in source().splitlines():
        if line.startswith("__constant__"):
            name = line.split()[4].split("[")[0]
            words[name] = [int(word.strip().removesuffix("ULL"), 16) for word in line.split("{")[1][:-2].split(",")]
    data = np.random.default_rng(3).bytes(3336)
    assert in_python(data, words) == xxhash.xxh3_128_digest(data)


def in_python(data: bytes, words: dict[str, list[int]]) -> bytes:
    mask, sums, full = (1 << 64) - 1, list(words["START"]), (len(data) - 1) // 1024

    def add(at: int, keys: list[int]) -> None:
        for lane in range(8):
            word = int.from_bytes(data[at + 8 * lane : at + 8 * lane + 8], "little")
            keyed = word ^ keys[lane]
            sums[lane] += (keyed & 0xFFFFFFFF) * (keyed >> 32)
            sums[lane ^ 1] += word

    for stripe in range((len(data) - 1) // 64):
        add(64 * stripe, words["SECRET"][stripe % 16 :])
        if stripe % 16 == 15 and stripe // 16 < full:
            for lane, key in enumerate(words["SECRET"][16:]):
                low = sums[lane] & mask
                sums[lane] = (low ^ low >> 47 ^ key) * 0x9E3779B1 & mask
    add(len(data) - 64, words["LAST"])
    digest = b""
    for keys, merged in (
        (words["HIGH"], ~(len(data) * 0xC2B2AE3D27D4EB4F)),
        (words["LOW"], len(data) * 0x9E3779B185EBCA87),
    ):
        for lane in range(0, 8, 2):
            one, other = ((sums[n] & mask) ^ keys[n] for n in (lane, lane + 1))
            merged += (one * other & mask) ^ (one * other >> 64)
        merged &= mask
        merged = (merged ^ merged >> 37) * 0x165667919E3779F9 & mask
        digest += (merged ^ merged >> 32).to_bytes(8, "big")
    return digest

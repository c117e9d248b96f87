"""Copies are carried out exactly: runs, strided rows, both ways, and never past the block."""

import ctypes
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shm.errors import InvalidInput
from transfer.slots.copies import SlotCopy, apply_copies, coalesce, gather_copies, holds_copies, normalise


def run(offset: int, address: int, nbytes: int, tensor: int = 0) -> SlotCopy:
    return SlotCopy(offset, address, 1, nbytes, nbytes, nbytes, tensor)


def test_strided_rows_land_at_their_pitch_and_gaps_stay() -> None:
    block = np.arange(100, dtype=np.uint8)
    to = np.full(60, 255, np.uint8)
    apply_copies(block, [SlotCopy(3, to.ctypes.data + 1, 5, 7, 19, 11, 0)])
    expected = np.full(60, 255, np.uint8)
    for row in range(5):
        expected[1 + 11 * row : 8 + 11 * row] = block[3 + 19 * row : 10 + 19 * row]
    assert (to == expected).all()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    nbytes=st.integers(1, 33),
    gap=st.integers(0, 7),
    to_gap=st.integers(0, 5),
    start=st.integers(0, 13),
)
def test_gather_undoes_apply(rows: int, nbytes: int, gap: int, to_gap: int, start: int) -> None:
    block = np.random.default_rng(7).integers(0, 256, start + rows * (nbytes + gap), np.uint8)
    to = np.zeros(rows * (nbytes + to_gap), np.uint8)
    copy = normalise(SlotCopy(start, to.ctypes.data, rows, nbytes, nbytes + gap, nbytes + to_gap, 0))
    assert (copy.rows == 1) == (rows == 1 or gap == to_gap == 0)
    apply_copies(block.tobytes(), [copy])
    assert holds_copies(block, [copy])
    back = bytearray(block.nbytes)
    gather_copies(back, [copy])
    expected = np.zeros_like(block)
    for row in range(rows):
        at = slice(start + row * (nbytes + gap), start + row * (nbytes + gap) + nbytes)
        expected[at] = block[at]
    assert bytes(back) == expected.tobytes()
    to[(rows - 1) * (nbytes + to_gap) + nbytes - 1] ^= 1
    assert not holds_copies(block, [copy]), "the last byte differs"


def test_runs_that_touch_on_both_sides_become_one() -> None:
    assert coalesce([run(10, 1010, 5), run(0, 1000, 10), run(15, 2000, 3)]) == (run(0, 1000, 15), run(15, 2000, 3))


def test_runs_of_two_tensors_or_with_a_hole_stay_apart() -> None:
    apart = (run(0, 1000, 10), run(10, 1010, 5, tensor=1), run(16, 1016, 5, tensor=1))
    assert coalesce(apart) == apart


def test_rows_are_not_joined_to_a_run() -> None:
    apart = (run(0, 1000, 10), SlotCopy(10, 1010, 3, 2, 4, 2, 0))
    assert coalesce(apart) == apart


def test_nothing_is_left_of_an_empty_copy() -> None:
    assert coalesce([run(0, 1000, 0)]) == ()


@pytest.mark.parametrize("copy", [run(90, 0, 11), SlotCopy(1, 0, 4, 10, 30, 10, 0)])
def test_a_copy_past_the_end_of_the_block_is_refused_before_a_byte_moves(copy: SlotCopy) -> None:
    to = np.zeros(100, np.uint8)
    good = run(0, to.ctypes.data, 50)
    with pytest.raises(InvalidInput, match="of a block of 100"):
        apply_copies(bytes(range(1, 101)), [good, copy])
    with pytest.raises(InvalidInput, match="of a block of 100"):
        gather_copies(bytearray(100), [good, copy])
    assert not to.any()


def test_a_read_only_buffer_cannot_be_gathered_into() -> None:
    with pytest.raises(InvalidInput, match="read-only"):
        gather_copies(bytes(10), [])


def test_other_threads_run_while_rows_are_copied() -> None:
    rows, width = 4096, 16384  # 64 MiB: far longer than a switch of threads takes
    block = np.ones((rows, 2 * width), np.uint8)
    to = np.ones((rows, width), np.uint8)
    copy = SlotCopy(0, to.ctypes.data, rows, width, 2 * width, width, 0)
    done = threading.Event()

    def copy_many() -> None:
        for _ in range(8):
            apply_copies(block, [copy])
        done.set()

    worker = threading.Thread(target=copy_many)
    gaps, last = [], time.perf_counter()
    start = last
    worker.start()
    while not done.is_set():
        now = time.perf_counter()
        gaps.append(now - last)
        last = now
    worker.join()
    assert max(gaps) < (time.perf_counter() - start) / 2  # one call that held the lock all along would fill it


def test_addresses_may_be_those_of_any_memory_of_the_process() -> None:
    memory = (ctypes.c_uint8 * 9)()
    apply_copies(memoryview(b"123456789")[2:], [run(1, ctypes.addressof(memory) + 2, 4)])
    assert bytes(memory) == b"\0\x004567\0\0\0"

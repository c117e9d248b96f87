from __future__ import annotations

import mmap

import numpy as np

from transfer.memory import gather, populate, scatter, view
from transfer.plan import Piece


def test_a_view_reads_and_writes_the_memory_itself() -> None:
    array = np.arange(33, dtype=np.uint8)
    seen = view(array.ctypes.data + 3, 7)
    assert seen.tobytes() == bytes(range(3, 10))
    seen[0] = 77
    assert array[3] == 77


def test_pieces_that_lie_in_one_run_are_one_view() -> None:
    array = np.arange(33, dtype=np.uint8)
    at = array.ctypes.data
    whole = gather((Piece(at, 0, 5), Piece(at + 5, 5, 20)))
    assert whole is not None
    assert whole.tobytes() == bytes(range(25))


def test_pieces_apart_or_in_another_order_are_not() -> None:
    at = np.zeros(333, np.uint8).ctypes.data
    assert gather((Piece(at, 0, 5), Piece(at + 6, 5, 20))) is None
    assert gather((Piece(at + 5, 5, 20), Piece(at, 0, 5))) is None
    assert gather((Piece(at, 0, 5), Piece(at + 5, 7, 20))) is None, "alignment between them belongs to the block"


def test_a_block_is_scattered_to_its_pieces_and_nowhere_else() -> None:
    array = np.zeros(33, np.uint8)
    at = array.ctypes.data
    scatter(memoryview(bytes(range(1, 11))), (Piece(at + 20, 0, 3), Piece(at + 1, 5, 5)))
    expected = np.zeros(33, np.uint8)
    expected[20:23] = [1, 2, 3]
    expected[1:6] = [6, 7, 8, 9, 10]
    assert (array == expected).all()


def resident_kib(address: int) -> int:
    """Of the mapping that starts there, in this process."""
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            if line.startswith(f"{address:x}-"):
                return int(next(each for each in smaps if each.startswith("Rss:")).split()[1])
    raise AssertionError("no such mapping")


def test_populating_maps_every_page_that_is_touched_and_changes_no_byte() -> None:
    nbytes = 7 * mmap.PAGESIZE
    with mmap.mmap(-1, nbytes) as mapping:
        address = int(np.frombuffer(mapping, np.uint8).ctypes.data)
        whole = view(address, nbytes)
        whole[mmap.PAGESIZE + 5] = 77
        expected = bytes(whole[: 2 * mmap.PAGESIZE])
        assert resident_kib(address) * 1024 <= 2 * mmap.PAGESIZE
        populate(address + mmap.PAGESIZE + 3, 3 * mmap.PAGESIZE - 2)
        assert resident_kib(address) * 1024 >= 4 * mmap.PAGESIZE
        assert bytes(whole[: 2 * mmap.PAGESIZE]) == expected
        populate(address, 0)

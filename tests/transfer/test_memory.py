from __future__ import annotations

import mmap

import numpy as np

from transfer.memory import populate, view


def test_a_view_reads_and_writes_the_memory_itself() -> None:
    array = np.arange(33, dtype=np.uint8)
    seen = view(array.ctypes.data + 3, 7)
    assert seen.tobytes() == bytes(range(3, 10))
    seen[0] = 77
    assert array[3] == 77


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

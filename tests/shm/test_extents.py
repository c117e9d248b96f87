"""The memory that an owner fills, and the same memory as it is served: read-only there, also where it grew."""

from __future__ import annotations

import ctypes
import gc
import mmap
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shm.checksum import checksum
from shm.errors import SegmentError
from shm.extents import Extents
from shm.manifest import Manifest
from shm.segment import Segment


def permissions(segment: Segment) -> list[str]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line.split()[1] for line in lines if segment.name.object_name in line]


def test_served_addresses_have_the_bytes_of_the_block_as_it_is_written(sealed: Callable[..., Segment]) -> None:
    segment = sealed(rows=[0, 3])
    segment.extend([8])
    for row in (0, 3, 8):
        block = segment.block(row)
        served = segment.served_address(row)
        assert served != segment.address(row)
        block[:] = bytes([row + 1]) * len(block)
        assert ctypes.string_at(served, len(block)) == bytes([row + 1]) * len(block)


def test_served_ranges_are_the_blocks_memory_at_other_addresses(sealed: Callable[..., Segment]) -> None:
    segment = sealed(rows=[0, 3])
    before = segment.served_ranges()
    assert len(before) == 1
    segment.extend([5, 8])
    served = segment.served_ranges()
    assert served[:1] == before, "what was handed out stays where it is"
    assert [nbytes for _, nbytes in served] == [nbytes for _, nbytes in segment.data_ranges()]
    assert {address for address, _ in served}.isdisjoint(address for address, _ in segment.data_ranges())
    for row in (0, 3, 5, 8):
        address, nbytes = segment.served_address(row), len(segment.block(row))
        assert sum(start <= address and address + nbytes <= start + size for start, size in served) == 1


def test_a_segment_that_was_extended_before_it_is_served_is_served_whole(sealed: Callable[..., Segment]) -> None:
    segment = sealed(rows=[0])
    segment.extend([1])
    assert sum(nbytes for _, nbytes in segment.served_ranges()) == segment.header.data_nbytes


def test_nothing_is_mapped_twice_before_it_is_asked_for_nor_after_closing(sealed: Callable[..., Segment]) -> None:
    segment = sealed()
    assert permissions(segment) == ["rw-s"]
    segment.served_ranges()
    segment.served_ranges()
    assert sorted(permissions(segment)) == ["r--s", "rw-s"]
    segment.close()
    gc.collect()
    assert permissions(segment) == []


def test_served_addresses_stay_mapped_while_a_view_of_them_is_held(sealed: Callable[..., Segment]) -> None:
    segment = sealed()
    address, expected = segment.served_address(3), bytes(segment.block(3))
    held = segment.mappings()
    segment.close()
    gc.collect()
    assert len(held) == 2
    assert sorted(permissions(segment)) == ["r--s", "rw-s"]
    assert ctypes.string_at(address, len(expected)) == expected


def test_nothing_is_mapped_of_a_segment_that_was_given_up() -> None:
    extents = Extents(mmap.PROT_READ)
    with pytest.raises(SegmentError, match="was given up: claim it again"):
        extents.cover(-1, 4096)
    assert extents.ranges(0) == []


def test_a_host_with_larger_pages_maps_what_was_extended_from_the_middle_of_one(
    sealed: Callable[..., Segment], make_manifest: Callable[..., Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offsets that are given to mmap are multiples of the host's granularity; blocks begin on pages of 4 KiB."""
    monkeypatch.setattr("shm.extents.GRANULARITY", 65536)
    segment = sealed(manifest=make_manifest(2, 5, rows=33, cols=57), rows=[0])
    for row in range(1, 10):
        segment.extend([row])
        block = segment.block(row)
        block[:] = bytes([row]) * len(block)
        segment.publish(row, checksum(block))
    lines = [
        line.split() for line in Path("/proc/self/maps").read_text().splitlines() if segment.name.object_name in line
    ]
    assert len(lines) == 10
    assert all(int(offset, 16) % 65536 == 0 for _, _, offset, *_ in lines)
    for row in range(1, 10):
        assert bytes(segment.block(row)) == bytes([row]) * len(segment.block(row))
        assert (
            ctypes.string_at(segment.address(row), 3)
            == ctypes.string_at(segment.served_address(row), 3)
            == bytes([row] * 3)
        )
    assert sum(nbytes for _, nbytes in segment.data_ranges()) == segment.header.data_nbytes
    with pytest.raises(SegmentError, match="are not mapped"):
        segment._extents.view(segment.nbytes - 1, 2)


def test_writing_to_a_served_address_ends_the_writer_and_changes_nothing(
    python: Callable[..., Any], sealed: Callable[..., Segment], namespace: str
) -> None:
    segment = sealed()
    expected = bytes(segment.block(3))
    segment.close()
    child = python(
        """
import ctypes, sys
from shm.layout import SegmentName
from shm.segment import Segment
segment = Segment.claim(SegmentName(sys.argv[1], "tiny", "n0"))
ctypes.memset(segment.address(3), segment.block(3)[0], 1)
print("writes", flush=True)
ctypes.memset(segment.served_address(3), 0x55, 1)
print("wrote", flush=True)
""",
        namespace,
    )
    child.expect("writes")
    status, said, _ = child.wait()
    assert status == -signal.SIGSEGV
    assert "wrote" not in said
    again = Segment.claim(segment.name)
    assert bytes(again.block(3)) == expected
    again.close()

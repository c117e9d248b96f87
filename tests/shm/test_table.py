"""The block table: what is damaged or half-written in one copy is read from the other, and what is lost is said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from shm.attachment import attach
from shm.layout import ENTRY, BlockState, Entries, absent_entries, entry_checks
from shm.segment import Segment
from shm.table import TABLE_READS_MAX, BlockTable, is_whole, read_entries

OLD, NEW = bytes(range(16)), bytes(range(33, 49))
N = 7
ALL = np.arange(N)


class Observed:
    """A copy of a table; after each single store into it, `look` is called."""

    def __init__(self, copy: Entries, look: Callable[[], None]) -> None:
        self.copy = copy
        self._look = look

    def __getitem__(self, key: Any) -> Any:
        return Column(self.copy, key, self._look) if isinstance(key, str) else self.copy[key]

    def __setitem__(self, rows: Any, entries: Entries) -> None:
        self.copy[rows] = entries
        self._look()


class Column:
    def __init__(self, copy: Entries, field: str, look: Callable[[], None]) -> None:
        self._copy, self._field, self._look = copy, field, look

    def __setitem__(self, rows: Any, values: Any) -> None:
        self._copy[self._field][rows] = values
        self._look()


class Watch:
    """A table, and readers who look after each store: one has both copies, to the others one of them is damaged."""

    def __init__(self) -> None:
        self.copies = [absent_entries(ALL), absent_entries(ALL)]
        observed: Any = [Observed(copy, self.look) for copy in self.copies]
        self.table = BlockTable(absent_entries(ALL), observed)
        self.seen: dict[str, list[tuple[int, bytes] | None]] = {"both": [], "first": [], "second": []}

    def look(self) -> None:
        for who, copies in (("both", self.copies), ("first", self.copies[:1]), ("second", self.copies[1:])):
            entries, lost = read_once(copies)
            self.seen[who].append(None if lost[3] else (int(entries["state"][3]), bytes(entries["checksum"][3])))

    def clear(self) -> None:
        for seen in self.seen.values():
            seen.clear()


def read_once(copies: list[Entries]) -> tuple[Entries, Any]:
    for number, copy in enumerate(copies):
        whole = is_whole(ALL, copy)
        if whole[3] or number + 1 == len(copies):
            return copy.copy(), ~whole
    raise AssertionError


@pytest.fixture
def watch() -> Watch:
    watch = Watch()
    watch.table.place(ALL, ALL * 4096 + 8192, np.full(N, 333))
    watch.table.publish(3, OLD)
    watch.clear()
    return watch


# -- an owner's order ----------------------------------------------------------------------------------------------


def test_a_reader_of_both_copies_finds_a_whole_entry_after_each_store(watch: Watch) -> None:
    watch.table.publish(3, NEW)
    watch.table.hide(3)
    watch.table.publish(3, OLD)
    assert len(watch.seen["both"]) > 20
    assert None not in watch.seen["both"]


@pytest.mark.parametrize("who", ["both", "first", "second"])
def test_no_checksum_is_shown_with_a_state_that_is_not_its_own(watch: Watch, who: str) -> None:
    """Hidden, then written, then shown: old and new are never mixed, and the old is not shown again."""
    watch.table.publish(3, NEW)
    seen = [entry for entry in watch.seen[who] if entry is not None]
    hidden = next(at for at, (state, _) in enumerate(seen) if state == BlockState.QUARANTINED)
    assert set(seen[:hidden]) <= {(BlockState.PUBLISHED, OLD)}
    shown = {entry for entry in seen[hidden:] if entry[0] == BlockState.PUBLISHED}
    assert shown == {(BlockState.PUBLISHED, NEW)}


def test_a_block_is_hidden_in_both_copies_before_anything_of_either_changes(watch: Watch) -> None:
    watch.table.publish(3, NEW)
    hidden = (BlockState.QUARANTINED, OLD)
    first, second = watch.seen["first"], watch.seen["second"]
    assert first[1] == second[1] == hidden
    assert first[0] == hidden, "who has both sees it first"


@pytest.mark.parametrize("damaged", [(), (0,), (1,)])
def test_a_block_that_is_published_again_as_it_was_is_not_hidden_for_a_moment(
    watch: Watch, damaged: tuple[int, ...]
) -> None:
    """A restore of a healthy node does so with every block, while engines read."""
    for which in damaged:
        flip(watch.copies[which], 3, 5)
    watch.table.publish(3, OLD)
    assert set(watch.seen["both"]) <= {(BlockState.PUBLISHED, OLD)}
    assert len(watch.seen["both"]) == 2 * len(damaged), "nothing is written where nothing is damaged"
    assert watch.table.damaged().tolist() == []


def test_a_place_is_there_before_the_state_that_promises_it() -> None:
    watch = Watch()
    watch.table.place(np.array([3]), np.array([8192]), np.array([333]))
    for seen in watch.seen.values():
        states = [entry[0] for entry in seen if entry is not None]
        assert set(states) == {BlockState.ABSENT, BlockState.RESERVED}
    assert None not in watch.seen["both"]
    assert watch.copies[0]["offset"][3] == watch.copies[1]["offset"][3] == 8192


# -- damage --------------------------------------------------------------------------------------------------------


def flip(copy: Entries, row: int, bit: int) -> None:
    copy.view(np.uint8).reshape(len(copy), ENTRY.itemsize)[row, bit // 8] ^= 1 << bit % 8


@pytest.mark.parametrize("which", [0, 1])
def test_any_bit_of_an_entry_may_flip_in_one_copy(watch: Watch, which: int) -> None:
    good = watch.copies[0].copy()
    for bit in range(8 * ENTRY.itemsize):
        flip(watch.copies[which], 3, bit)
        entries, lost = read_entries(watch.copies, ALL)
        assert not lost.any()
        assert entries.tobytes() == good.tobytes()
        assert watch.table.damaged().tolist() == [3]
        flip(watch.copies[which], 3, bit)
    assert watch.table.damaged().tolist() == []


def test_an_entry_that_is_damaged_in_both_copies_is_lost_and_no_other(watch: Watch) -> None:
    flip(watch.copies[0], 3, 5)
    flip(watch.copies[1], 3, 300)
    entries, lost = read_entries(watch.copies, ALL)
    assert np.flatnonzero(lost).tolist() == [3]
    assert entries[~lost].tobytes() == watch.table.entries[~lost].tobytes()
    entries, lost = read_entries(watch.copies, np.array([5, 3]))
    assert lost.tolist() == [False, True]


def test_a_table_of_zeros_or_of_another_rows_entries_is_lost() -> None:
    for copy in (np.zeros(N, ENTRY), np.full(N, absent_entries(np.array([N]))[0])):
        assert read_entries([copy, copy], ALL)[1].all()


@pytest.mark.parametrize("field", ["reserved", "state"])
def test_an_entry_with_a_right_check_and_reserved_bytes_or_an_unknown_state_is_lost(field: str) -> None:
    copy = absent_entries(ALL)
    copy[field][3] = 1
    assert (copy["check"] == entry_checks(ALL, copy)).all()
    assert np.flatnonzero(read_entries([copy, copy], ALL)[1]).tolist() == [3]


def test_a_lost_entry_is_looked_for_again_before_it_is_said(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reads slowly may find both copies in the middle of being written."""
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == TABLE_READS_MAX - 1:
            watch.table.mend()

    monkeypatch.setattr("shm.table.time.sleep", wait)
    for copy in watch.copies:
        flip(copy, 3, 5)
    assert not read_entries(watch.copies, ALL)[1].any()
    assert len(waits) == TABLE_READS_MAX - 1


def test_mending_writes_both_copies_as_they_were(watch: Watch) -> None:
    good = watch.copies[0].tobytes()
    flip(watch.copies[0], 3, 5)
    flip(watch.copies[1], 3, 300)
    watch.copies[1].view(np.uint8)[-33:] = 0
    assert watch.table.damaged().tolist() == [3, 6]
    assert watch.table.mend().tolist() == [3, 6]
    assert watch.copies[0].tobytes() == watch.copies[1].tobytes() == good
    assert watch.table.mend().tolist() == []


def test_publishing_a_block_mends_its_entry(watch: Watch) -> None:
    for copy in watch.copies:
        copy.view(np.uint8).reshape(N, ENTRY.itemsize)[3] ^= 0x55
    watch.table.publish(3, NEW)
    entries, lost = read_entries(watch.copies, ALL)
    assert not lost.any()
    assert bytes(entries["checksum"][3]) == NEW


# -- while it is written -------------------------------------------------------------------------------------------


def test_entries_that_another_process_is_writing_are_never_lost_and_never_mixed(
    python: Callable[..., Any], sealed: Callable[..., Segment], namespace: str, wait_until: Callable[..., Any]
) -> None:
    segment = sealed()
    segment.publish(2, OLD)
    segment.close()
    writer = python(
        """
import sys
from shm.layout import SegmentName
from shm.segment import Segment
segment = Segment.claim(SegmentName(sys.argv[1], "tiny", "n0"))
print("writes", flush=True)
while True:
    for checksum in (bytes(range(16)), bytes(range(33, 49))):
        segment.publish(2, checksum)
""",
        namespace,
    )
    writer.expect("writes")
    with attach("tiny", namespace=namespace) as weights:
        seen: set[bytes] = set()

        def look() -> bool:
            assert weights.damaged() == []
            seen.update(block.checksum for block in weights.held([2]).values())
            return seen == {OLD, NEW}

        wait_until(look)
        for _ in range(333):
            assert look(), seen
    writer.kill()

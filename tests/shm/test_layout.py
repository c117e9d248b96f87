"""The byte format: names, where blocks lie, states and checks."""

from __future__ import annotations

import itertools
import re
import struct
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shm.errors import InvalidInput
from shm.layout import (
    BLOCK_ALIGNMENT,
    ENTRY,
    HEADER_NBYTES,
    MANIFEST_OFFSET,
    BlockState,
    Entries,
    SegmentName,
    copy_offset,
    entry_check,
    entry_checks,
    plan_segment,
)
from shm.manifest import NAME_CHARS_MAX, Manifest
from shm.table import is_whole

NAME_MAX = 255
NAME = SegmentName("prod", "org/model-1", "node-a")

parts = st.text(
    st.sampled_from("ab.-_/ Äß語😀") | st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=NAME_CHARS_MAX
).filter(lambda text: text == text.strip() and text.isprintable())
near_parts = st.text("a._/", min_size=1, max_size=4)
names = st.builds(SegmentName, parts, parts, parts)
near_names = st.builds(SegmentName, near_parts, near_parts, near_parts)


# -- names ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(names)
def test_object_names_fit_and_are_plain_file_names(name: SegmentName) -> None:
    assert len(name.object_name.encode()) <= NAME_MAX
    assert re.fullmatch(r"hotspare\.[A-Za-z0-9_.-]+", name.object_name)


@settings(max_examples=400, deadline=None)
@given(near_names, near_names)
def test_different_segments_never_share_a_name(one: SegmentName, other: SegmentName) -> None:
    assert (one.object_name == other.object_name) == (one == other)


@settings(max_examples=60, deadline=None)
@given(names, names)
def test_long_and_foreign_names_do_not_collide_either(one: SegmentName, other: SegmentName) -> None:
    assert (one.object_name == other.object_name) == (one == other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("a.b", "c", "d"), ("a", "b.c", "d")),
        (("a", "b/c", "d"), ("a", "b_c", "d")),
        (("a", "b", "x" * 65), ("a", "b", "x" * 64)),
        (("a", "b", "x" * 65), ("a", "b", "x" * 66)),
        (("a", "B", "c"), ("a", "b", "c")),
        # a plain name made to look like one with a digest
        (("a", "b", "c.0123456789abcdef"), ("a", "b", "c")),
    ],
)
def test_names_that_look_alike_when_made_safe_stay_apart(one: tuple[str, ...], other: tuple[str, ...]) -> None:
    assert SegmentName(*one).object_name != SegmentName(*other).object_name


def test_plain_names_read_as_they_are() -> None:
    assert SegmentName("prod", "qwen3-30b", "node_7").object_name == "hotspare.prod.qwen3-30b.node_7"
    assert NAME.object_name.startswith("hotspare.prod.org_model-1.node-a.")


@pytest.mark.parametrize("part", ["", " a", "a ", "a\nb", "a\0b", "\ud800", "x" * (NAME_CHARS_MAX + 1), "x" * 300])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_names_out_of_limits_are_refused(part: str, position: int) -> None:
    three = ["a", "b", "c"]
    three[position] = part
    with pytest.raises(InvalidInput, match="printable"):
        SegmentName(*three)


# -- where blocks lie ----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.integers(0, 20), max_size=30))
def test_blocks_are_page_aligned_ascending_and_without_holes(
    rows: list[int], make_manifest: Callable[..., Manifest]
) -> None:
    manifest = make_manifest(3, 7)
    plan = plan_segment(manifest, rows)
    held = sorted(set(rows))
    table = plan.table
    assert np.flatnonzero(table["state"] == BlockState.RESERVED).tolist() == held
    absent = np.setdiff1d(np.arange(len(manifest)), held)
    assert set(table["state"][absent].tolist()) <= {BlockState.ABSENT}
    assert is_whole(np.arange(len(table)), table).all()
    end = plan.data_offset
    for row in held:
        assert table["offset"][row] == end
        assert table["nbytes"][row] == manifest.nbytes[row]
        end += -(-int(manifest.nbytes[row]) // BLOCK_ALIGNMENT) * BLOCK_ALIGNMENT
    assert plan.total_nbytes == end
    sections = [(0, HEADER_NBYTES), (MANIFEST_OFFSET, plan.manifest_nbytes), (plan.table_offset, plan.table_nbytes)]
    twice = [(start, nbytes) for at, nbytes in sections for start in (at, copy_offset(at, nbytes))]
    ends = [start + nbytes for start, nbytes in twice]
    starts = [*(start for start, _ in twice), plan.data_offset]
    assert starts[0] == 0
    assert [-(-end // BLOCK_ALIGNMENT) * BLOCK_ALIGNMENT for end in ends] == starts[1:]


# -- states and checks ---------------------------------------------------------------------------------------------


def test_no_few_flipped_bits_turn_a_state_into_another_or_nothing_into_one() -> None:
    words = [0, 0xFFFFFFFF, *map(int, BlockState)]
    distances = [(one ^ other).bit_count() for one, other in itertools.combinations(words, 2)]
    assert min(distances) == 16


def entries(n: int, seed: int = 0) -> Entries:
    random = np.random.Generator(np.random.SFC64(seed))
    return np.frombuffer(random.bytes(n * ENTRY.itemsize), ENTRY).copy()


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 332), st.integers(0, 8 * 32 - 1))
def test_any_flipped_bit_of_an_entry_changes_its_check(row: int, bit: int) -> None:
    table, rows = entries(333), np.arange(333)
    before = entry_checks(rows, table)
    table.view(np.uint8).reshape(333, ENTRY.itemsize)[row, bit // 8] ^= 1 << bit % 8
    assert np.flatnonzero(entry_checks(rows, table) != before).tolist() == [row]


def test_entries_of_other_rows_have_other_checks() -> None:
    """One that was written to another row's place is not taken for that row's."""
    alike = np.repeat(entries(1), 3333)
    assert len(np.unique(entry_checks(np.arange(3333), alike))) == 3333


def test_the_check_is_the_one_that_is_written_down() -> None:
    def mixed(word: int) -> int:
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            word = (word ^ word >> shift) * factor % (1 << 64)
        return word ^ word >> 31

    table = entries(3)
    for row in range(3):
        check = mixed(row + 8)
        for word in struct.unpack_from("<4Q", table[row].tobytes()):
            check = mixed(check ^ word)
        assert entry_checks(np.array([row + 7]), table[row : row + 1]).tolist() == [check]
        offset, nbytes, checksum, *_ = table[row].tolist()
        assert entry_check(row + 7, offset, nbytes, checksum) == check

"""The byte format: names, and where blocks lie."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shm.errors import InvalidInput
from shm.layout import BLOCK_ALIGNMENT, ENTRY, HEADER_NBYTES, BlockState, SegmentName, plan_segment
from shm.manifest import NAME_CHARS_MAX, Manifest

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
    assert table[absent].tobytes() == bytes(ENTRY.itemsize * len(absent)), "an absent block's entry is all zeros"
    end = plan.data_offset
    for row in held:
        assert table["offset"][row] == end
        assert table["nbytes"][row] == manifest.nbytes[row]
        end += -(-int(manifest.nbytes[row]) // BLOCK_ALIGNMENT) * BLOCK_ALIGNMENT
    assert plan.total_nbytes == end
    assert plan.manifest_offset == HEADER_NBYTES
    assert plan.manifest_offset + plan.manifest_nbytes <= plan.table_offset
    assert plan.table_offset + plan.table_nbytes <= plan.data_offset

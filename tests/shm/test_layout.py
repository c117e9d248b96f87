"""The byte format: names, the header page, and where blocks lie."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from shm.errors import (
    InvalidInput,
    SegmentCorrupt,
    SegmentError,
    SegmentForeign,
    SegmentTooNew,
    SegmentTruncated,
    SegmentUnsealed,
)
from shm.layout import (
    BLOCK_ALIGNMENT,
    ENTRY,
    HEADER_NBYTES,
    STATE_OFFSET,
    VERSION,
    BlockState,
    Header,
    SegmentName,
    SegmentState,
    plan_segment,
)
from shm.manifest import NAME_CHARS_MAX, Manifest

NAME_MAX = 255
NAME = SegmentName("prod", "org/model-1", "node-a")
CHECKSUM_OFFSET = HEADER_NBYTES - 8

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


# -- the header page -----------------------------------------------------------------------------------------------

u64 = st.integers(0, (1 << 64) - 1)
headers = st.builds(
    Header,
    name=names,
    state=st.sampled_from([SegmentState.CLAIMED, SegmentState.FILLING]),
    generation=u64, owner_pid=u64, created_ns=u64, sealed_ns=u64, manifest_offset=u64, manifest_nbytes=u64,
    table_offset=u64, table_nbytes=u64, data_offset=u64, data_nbytes=u64, total_nbytes=u64,
    manifest_digest=st.binary(min_size=32, max_size=32), origin=st.binary(min_size=16, max_size=16),
)  # fmt: skip


def header(state: SegmentState = SegmentState.SEALED, **fields: object) -> Header:
    whole = Header(NAME, state, 7, 4242, 11, 13, total_nbytes=99_999, manifest_digest=bytes(range(32)))
    return replace(whole, **fields)  # type: ignore[arg-type]


def unpack(page: bytes, object_nbytes: int = 99_999) -> Header:
    return Header.unpack(page, "object", object_nbytes)


@settings(max_examples=60, deadline=None)
@given(headers)
def test_a_header_reads_back_as_it_was(header: Header) -> None:
    page = header.pack()
    assert len(page) == HEADER_NBYTES
    assert unpack(page) == header


def test_the_longest_names_fit_the_page() -> None:
    long = header(name=SegmentName(*["😀" * NAME_CHARS_MAX] * 3))
    assert unpack(long.pack()) == long


@pytest.mark.parametrize("state", SegmentState)
def test_the_state_lies_outside_the_checksum(state: SegmentState) -> None:
    page = bytearray(header(SegmentState.CLAIMED).pack())
    struct.pack_into("<I", page, STATE_OFFSET, state)
    assert unpack(bytes(page)).state is state


def test_the_format_is_the_one_that_is_written_down() -> None:
    page = header().pack()
    assert page[:8] == b"HOTSPARE"
    assert struct.unpack_from("<III", page, 8) == (VERSION, HEADER_NBYTES, SegmentState.SEALED)
    stateless = page[:STATE_OFFSET] + bytes(4) + page[STATE_OFFSET + 4 : CHECKSUM_OFFSET]
    assert page[CHECKSUM_OFFSET:] == struct.pack("<Q", xxhash.xxh3_64_intdigest(stateless))


def resealed(page: bytearray) -> bytes:
    """The page with a checksum that is right."""
    stateless = page[:STATE_OFFSET] + bytes(4) + page[STATE_OFFSET + 4 : CHECKSUM_OFFSET]
    return bytes(page[:CHECKSUM_OFFSET]) + struct.pack("<Q", xxhash.xxh3_64_intdigest(bytes(stateless)))


@pytest.mark.parametrize("nbytes", [0, 1, 3333, HEADER_NBYTES - 1])
def test_less_than_a_header_is_truncated(nbytes: int) -> None:
    with pytest.raises(SegmentTruncated, match=f"has {nbytes} bytes, less than a header"):
        unpack(header().pack()[:nbytes], nbytes)


def test_a_sealed_object_shorter_than_its_header_says_is_truncated() -> None:
    assert unpack(header().pack(), 99_999).total_nbytes == 99_999
    assert unpack(header().pack(), 199_999).total_nbytes == 99_999, "longer is fine: its owner extends it"
    with pytest.raises(SegmentTruncated, match="has 99998 bytes, its header says 99999"):
        unpack(header().pack(), 99_998)


def test_another_magic_is_foreign() -> None:
    page = bytearray(header().pack())
    page[:8] = b"HOTSPANE"
    with pytest.raises(SegmentForeign, match="does not begin with HOTSPARE"):
        unpack(resealed(page))


def test_a_page_of_zeros_is_a_claim_whose_header_was_not_written_yet() -> None:
    with pytest.raises(SegmentUnsealed):
        unpack(bytes(HEADER_NBYTES), HEADER_NBYTES)


@pytest.mark.parametrize("version", [VERSION + 1, 0xFFFFFFFF])
def test_a_newer_format_is_refused_whatever_the_rest_looks_like(version: int) -> None:
    page = bytearray(header().pack())
    struct.pack_into("<I", page, 8, version)
    page[100:CHECKSUM_OFFSET] = b"?" * (CHECKSUM_OFFSET - 100)
    with pytest.raises(SegmentTooNew, match=f"format {version}, this Hotspare reads up to {VERSION}"):
        unpack(bytes(page))


@settings(max_examples=300, deadline=None)
@given(
    st.integers(12, HEADER_NBYTES - 1).filter(lambda at: not STATE_OFFSET <= at < STATE_OFFSET + 4), st.integers(0, 7)
)
def test_any_flipped_bit_is_corrupt(at: int, bit: int) -> None:
    page = bytearray(header().pack())
    page[at] ^= 1 << bit
    with pytest.raises(SegmentCorrupt, match="does not match its checksum"):
        unpack(bytes(page))


@pytest.mark.parametrize("state", [3, 77, 0xFFFFFFFF])
def test_an_unknown_state_is_corrupt(state: int) -> None:
    page = bytearray(header().pack())
    struct.pack_into("<I", page, STATE_OFFSET, state)
    with pytest.raises(SegmentCorrupt, match=f"unknown state {state}"):
        unpack(bytes(page))


@settings(max_examples=200, deadline=None)
@given(st.integers(20, 400), st.binary(min_size=1, max_size=40))
def test_a_page_with_a_right_checksum_and_wrong_content_raises_nothing_but_segment_errors(at: int, junk: bytes) -> None:
    page = bytearray(header(SegmentState.CLAIMED).pack())
    page[at : at + len(junk)] = junk
    try:
        unpack(resealed(page))
    except SegmentError:
        return


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

"""The header: it reads back as it was, every way to be wrong is one error, and one page of two is enough."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from shm.errors import (
    SegmentCorrupt,
    SegmentError,
    SegmentForeign,
    SegmentTooNew,
    SegmentTruncated,
    SegmentUnsealed,
)
from shm.header import Header
from shm.layout import HEADER_NBYTES, VERSION, SegmentName, SegmentState
from shm.manifest import NAME_CHARS_MAX

NAME = SegmentName("prod", "org/model-1", "node-a")
STATE_OFFSET = 16
NAMES_OFFSET = 184
CHECKSUM_OFFSET = HEADER_NBYTES - 8

parts = st.text("ab.-_/ Äß語😀", min_size=1, max_size=NAME_CHARS_MAX).filter(lambda text: text == text.strip())
names = st.builds(SegmentName, parts, parts, parts)

u64 = st.integers(0, (1 << 64) - 1)
headers = st.builds(
    Header,
    name=names,
    state=st.sampled_from(SegmentState),
    generation=u64, owner_pid=u64, created_ns=u64, sealed_ns=u64, manifest_offset=u64, manifest_nbytes=u64,
    table_offset=u64, table_nbytes=u64, data_offset=u64, data_nbytes=u64, total_nbytes=u64,
    manifest_digest=st.binary(min_size=32, max_size=32), origin=st.binary(min_size=16, max_size=16),
    content_digest=st.binary(min_size=16, max_size=16),
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
    assert unpack(page, 1 << 64) == header


def test_the_longest_names_fit_the_page() -> None:
    long = header(name=SegmentName(*["😀" * NAME_CHARS_MAX] * 3))
    assert unpack(long.pack()) == long


def test_the_format_is_the_one_that_is_written_down() -> None:
    page = header().pack()
    assert page[:8] == b"HOTSPARE"
    assert struct.unpack_from("<III", page, 8) == (VERSION, HEADER_NBYTES, SegmentState.SEALED)
    assert page[CHECKSUM_OFFSET:] == struct.pack("<Q", xxhash.xxh3_64_intdigest(page[:CHECKSUM_OFFSET]))


def resealed(page: bytearray) -> bytes:
    """The page with a checksum that is right."""
    checked = bytes(page[:CHECKSUM_OFFSET])
    return checked + struct.pack("<Q", xxhash.xxh3_64_intdigest(checked))


@pytest.mark.parametrize("nbytes", [0, 1, 3333, HEADER_NBYTES - 1])
def test_less_than_a_header_is_truncated(nbytes: int) -> None:
    with pytest.raises(SegmentTruncated, match=f"has {nbytes} bytes, less than a header"):
        unpack(header().pack()[:nbytes], nbytes)


@pytest.mark.parametrize("state", SegmentState)
def test_an_object_shorter_than_its_header_says_is_truncated(state: SegmentState) -> None:
    page = header(state).pack()
    assert unpack(page, 99_999).total_nbytes == 99_999
    assert unpack(page, 199_999).total_nbytes == 99_999, "longer is fine: its owner extends it"
    with pytest.raises(SegmentTruncated, match="has 99998 bytes, its header says 99999"):
        unpack(page, 99_998)


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


@pytest.mark.parametrize("version", range(1, VERSION))
def test_a_format_that_is_no_longer_read_is_refused_with_what_to_do(version: int) -> None:
    page = bytearray(header().pack())
    struct.pack_into("<I", page, 8, version)
    with pytest.raises(SegmentError, match=f"has format {version}, .* start its node with this Hotspare") as raised:
        unpack(bytes(page))
    assert type(raised.value) is SegmentError


@settings(max_examples=300, deadline=None)
@given(st.integers(12, HEADER_NBYTES - 1), st.integers(0, 7))
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
        unpack(resealed(page))


@settings(max_examples=200, deadline=None)
@given(st.integers(20, 400), st.binary(min_size=1, max_size=40))
def test_a_page_with_a_right_checksum_and_wrong_content_raises_nothing_but_segment_errors(at: int, junk: bytes) -> None:
    page = bytearray(header(SegmentState.CLAIMED).pack())
    page[at : at + len(junk)] = junk
    try:
        unpack(resealed(page))
    except SegmentError:
        return


# What a page says although its checksum is right: what is written where, and the error's words.
WRONG: dict[str, tuple[int, bytes, str]] = {
    "another size of header": (12, struct.pack("<I", 8192), "a header of 8192 bytes, not of 4096"),
    "reserved bytes in front": (23, b"\x01", "reserved bytes of the header are not zero"),
    "reserved bytes behind the lengths": (182, b"\x01", "reserved bytes of the header are not zero"),
    "bytes behind the names": (CHECKSUM_OFFSET - 1, b"\x01", "more follows the names"),
    "a name that is not UTF-8": (NAMES_OFFSET, b"\xff", "the header names nobody .*can't decode"),
    "a name out of its limits": (NAMES_OFFSET, b"\n", "the header names nobody .*printable"),
    "no name": (180, bytes(2), "the header names nobody .*more follows"),
    "a name that is longer than its characters": (180, struct.pack("<H", 7), "the header names nobody"),
    "a name past the page's end": (180, b"\xff\xff", "the header names nobody"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_page_whose_checksum_is_right_and_that_breaks_a_rule_is_corrupt(fault: str) -> None:
    at, by, said = WRONG[fault]
    page = bytearray(header().pack())
    page[at : at + len(by)] = by
    with pytest.raises(SegmentCorrupt, match=said) as raised:
        unpack(resealed(page))
    assert str(raised.value).startswith("/dev/shm/object: ")
    assert str(raised.value).endswith("`hotspare rm` it, and refill")


# -- two pages -----------------------------------------------------------------------------------------------------


def read(first: bytes, second: bytes) -> Header:
    return Header.read(first + second, "object", 99_999)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 1), st.integers(0, HEADER_NBYTES - 1), st.integers(0, 7))
def test_a_flipped_bit_in_one_page_costs_nothing(which: int, at: int, bit: int) -> None:
    pages = [bytearray(header().pack()), bytearray(header().pack())]
    pages[which][at] ^= 1 << bit
    assert read(*pages) == header()


@pytest.mark.parametrize("other", [bytes(HEADER_NBYTES), b"\xff" * HEADER_NBYTES], ids=["zeros", "ones"])
def test_either_page_is_enough(other: bytes) -> None:
    page = header().pack()
    assert read(page, other) == header()
    assert read(other, page) == header()


def test_of_two_whole_pages_the_first_counts() -> None:
    """Its owner writes it first: the second is of before, if it was killed in between."""
    assert read(header(generation=8).pack(), header(generation=7).pack()).generation == 8


def test_two_damaged_pages_are_corrupt_and_not_taken_for_anothers() -> None:
    """What is foreign is never removed, and would keep the node from starting for ever."""
    damaged = bytearray(header().pack())
    damaged[333] ^= 1
    anothers = bytearray(damaged)
    anothers[0] ^= 1
    for pages in ((damaged, damaged), (damaged, anothers), (anothers, damaged)):
        with pytest.raises(SegmentCorrupt, match="does not match its checksum"):
            read(*map(bytes, pages))
    with pytest.raises(SegmentForeign):
        read(bytes(anothers), bytes(anothers))


def test_a_first_page_of_another_format_and_no_second_of_ours_is_of_that_format() -> None:
    newer = bytearray(header().pack())
    struct.pack_into("<I", newer, 8, VERSION + 1)
    with pytest.raises(SegmentTooNew):
        read(bytes(newer), b"?" * HEADER_NBYTES)
    assert read(bytes(newer), header().pack()) == header(), "a flipped bit of the version"

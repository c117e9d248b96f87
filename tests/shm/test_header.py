"""The header page: it reads back as it was, and every way to be wrong is one error that says so."""

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
from shm.layout import HEADER_NBYTES, STATE_OFFSET, VERSION, SegmentName, SegmentState
from shm.manifest import NAME_CHARS_MAX

NAME = SegmentName("prod", "org/model-1", "node-a")
NAMES_OFFSET = 168
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


# What a page says although its checksum is right: what is written where, and the error's words.
WRONG: dict[str, tuple[int, bytes, str]] = {
    "no format": (8, bytes(4), "there is no format 0"),
    "another size of header": (12, struct.pack("<I", 8192), "a header of 8192 bytes, not of 4096"),
    "reserved bytes in front": (23, b"\x01", "reserved bytes of the header are not zero"),
    "reserved bytes behind the lengths": (166, b"\x01", "reserved bytes of the header are not zero"),
    "bytes behind the names": (CHECKSUM_OFFSET - 1, b"\x01", "more follows the names"),
    "a name that is not UTF-8": (NAMES_OFFSET, b"\xff", "the header names nobody .*can't decode"),
    "a name out of its limits": (NAMES_OFFSET, b"\n", "the header names nobody .*printable"),
    "no name": (164, bytes(2), "the header names nobody .*more follows"),
    "a name that is longer than its characters": (164, struct.pack("<H", 7), "the header names nobody"),
    "a name past the page's end": (164, b"\xff\xff", "the header names nobody"),
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

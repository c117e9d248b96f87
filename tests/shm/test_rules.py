"""The rules of the format: one error of ours for each, to whoever attaches, and a fresh start for whoever adopts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shm.attachment import attach
from shm.block import ExpertKey, TensorEntry
from shm.checksum import checksum
from shm.errors import BlockUnavailable, HotspareError, SegmentCorrupt, SegmentError
from shm.header import Header
from shm.layout import (
    BLOCK_ALIGNMENT,
    ENTRY,
    SHM_DIRECTORY,
    SegmentName,
    SegmentState,
    copy_offset,
    entry_checks,
    plan_segment,
)
from shm.manifest import FileSpec, Manifest
from shm.rules import SEGMENT_NBYTES_MAX, check_entries, check_sections
from shm.segment import Segment

U64_MAX = (1 << 64) - 1
FIELD_MAX = {"offset": U64_MAX, "nbytes": U64_MAX, "state": 0xFFFFFFFF, "check": U64_MAX}
SECTION_FIELDS = (
    "manifest_offset", "manifest_nbytes", "table_offset", "table_nbytes", "data_offset", "data_nbytes", "total_nbytes",
)  # fmt: skip


@dataclass(frozen=True)
class Left:
    """A sealed segment whose owner is gone; rows 2 and 7 are absent."""

    name: SegmentName
    header: Header
    manifest: Manifest

    @property
    def path(self) -> Path:
        return Path(SHM_DIRECTORY, self.name.object_name)

    def write(self, at: int, by: bytes) -> None:
        with self.path.open("r+b") as file:
            file.seek(at)
            file.write(by)

    def write_header(self, **fields: Any) -> None:
        """Both pages, with a checksum that is right."""
        self.write(0, 2 * replace(self.header, **fields).pack())

    def write_entry(self, row: int, **fields: Any) -> None:
        """In both copies, with a check that is right."""
        table, nbytes = self.header.table_offset, self.header.table_nbytes
        at = table + row * ENTRY.itemsize
        entry = np.frombuffer(self.path.read_bytes()[at : at + ENTRY.itemsize], ENTRY).copy()
        for field, value in fields.items():
            entry[field][0] = value
        entry["check"] = entry_checks(np.array([row]), entry)
        for start in (table, copy_offset(table, nbytes)):
            self.write(start + row * ENTRY.itemsize, entry.tobytes())


@pytest.fixture
def left(sealed: Callable[..., Segment], make_manifest: Callable[..., Manifest]) -> Left:
    segment = sealed(rows=[0, 1, 3, 4, 5, 6, 8, 9])
    segment.close()
    return Left(segment.name, segment.header, make_manifest())


def refused_everywhere(left: Left, said: str) -> None:
    """Attaching refuses it by that rule; who adopts it starts afresh."""
    for node in (None, "n0"):
        with pytest.raises(SegmentCorrupt, match=said) as raised:
            attach("tiny", namespace=left.name.namespace, node=node)
        assert str(raised.value).startswith(f"{left.path}: ")
        assert str(raised.value).endswith("`hotspare rm` it, and refill")
    again = Segment.claim(left.name)
    assert again.state is SegmentState.CLAIMED
    again.unlink()


# -- sections ------------------------------------------------------------------------------------------------------

# What is added to which numbers of the header, and the error's words.
SECTIONS: dict[str, tuple[dict[str, int], str]] = {
    "manifest elsewhere": ({"manifest_offset": 16}, "its manifest is not on the page after the headers"),
    "manifest in the header": ({"manifest_offset": -4096}, "its manifest is not on the page after the headers"),
    "table over the manifest": ({"table_offset": -4096}, "its block table is not on the page after the manifests"),
    "table off its page": ({"table_offset": 8}, "its block table is not on the page after the manifests"),
    "table after a hole": ({"table_offset": 4096}, "its block table is not on the page after the manifests"),
    "half an entry": ({"table_nbytes": 24}, "its block table is not of whole entries"),
    "blocks over the table": ({"data_offset": -4096}, "its blocks do not begin on the page after the block tables"),
    "blocks off their page": ({"data_offset": 512}, "its blocks do not begin on the page after the block tables"),
    "blocks after a hole": ({"data_offset": 4096}, "its blocks do not begin on the page after the block tables"),
    "blocks too short": ({"data_nbytes": -4096}, "its blocks do not end where it ends"),
    "blocks past the end": ({"data_nbytes": 4096}, "its blocks do not end where it ends"),
    "half a page": ({"data_nbytes": -333, "total_nbytes": -333}, "it does not end with a page"),
    "an entry more": ({"table_nbytes": 48}, "its block table has 11 entries, its manifest 10 blocks"),
    "an entry less": ({"table_nbytes": -48}, "its block table has 9 entries, its manifest 10 blocks"),
}


@pytest.mark.parametrize("fault", SECTIONS)
def test_sections_that_are_not_in_their_places_are_refused(left: Left, fault: str) -> None:
    changes, said = SECTIONS[fault]
    left.write_header(**{field: getattr(left.header, field) + by for field, by in changes.items()})
    refused_everywhere(left, said)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"manifest_nbytes": 0}, "it has no manifest"),
        ({"table_nbytes": 0}, "its block table is not of whole entries"),
        ({"state": SegmentState.CLAIMED}, "it has sections, and is not filled"),
        ({"total_nbytes": SEGMENT_NBYTES_MAX + 4096}, "it says to be larger than any segment"),
    ],
)
def test_sections_of_no_size_or_of_any_are_refused(left: Left, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(SegmentCorrupt, match=said):
        check_sections(replace(left.header, **fields), "here")


@pytest.mark.parametrize("value", [0, 1, 1 << 63, U64_MAX - 4095, U64_MAX])
@pytest.mark.parametrize("field", SECTION_FIELDS)
def test_absurd_numbers_of_a_header_are_errors_of_ours(left: Left, field: str, value: int) -> None:
    left.write_header(**{field: value})
    with pytest.raises(SegmentError, match="`hotspare rm` it"):
        attach("tiny", namespace=left.name.namespace)
    again = Segment.claim(left.name)
    assert again.state is SegmentState.CLAIMED
    again.unlink()


def test_what_owners_write_breaks_no_rule(
    namespace: str, sealed: Callable[..., Segment], make_manifest: Callable[..., Manifest]
) -> None:
    segment = sealed(rows=[3])
    segment.extend([1, 8])
    for state in SegmentState:
        fresh = Header(segment.name, SegmentState.CLAIMED, 1, 2, 3, 4)
        check_sections(fresh if state is SegmentState.CLAIMED else replace(segment.header, state=state), "here")
    segment.quarantine(3)
    entries = segment._table.entries
    check_entries(entries, np.zeros(len(entries), bool), segment.manifest, segment.header, "here")


# -- entries -------------------------------------------------------------------------------------------------------

PLACE = "a place outside the segment"
SIZE = "another size than the manifest says"

# Of row 3, which is expert 3 of layer 0: what is written where, and the error's words.
ENTRIES: dict[str, tuple[dict[str, Any], str]] = {
    "no size": ({"nbytes": 0}, SIZE),
    "another size": ({"nbytes": 857}, SIZE),
    "endless size": ({"nbytes": U64_MAX}, SIZE),
    "off its page": ({"offset": 65536 + 8}, "a place that is not on a page"),
    "in the header": ({"offset": 0}, PLACE),
    "in the table": ({"offset": 16384}, PLACE),
    "at the end": ({"offset": "end"}, PLACE),
    "past the end": ({"offset": 1 << 40}, PLACE),
    "before zero": ({"offset": U64_MAX - 4095}, PLACE),
    "over another block": ({"offset": "next"}, "a place that is another block's"),
}


@pytest.mark.parametrize("fault", ENTRIES)
def test_entries_that_no_owner_writes_are_refused(left: Left, fault: str) -> None:
    fields, said = ENTRIES[fault]
    named = {"end": left.header.total_nbytes, "next": left.header.data_offset + 3 * BLOCK_ALIGNMENT}
    left.write_entry(3, **{field: named.get(value, value) for field, value in fields.items()})
    refused_everywhere(left, f"the table's entry for expert .* of layer 0 has {said}")


def test_the_error_names_the_block(left: Left) -> None:
    left.write_entry(8, nbytes=1)
    with pytest.raises(SegmentCorrupt, match="entry for expert 3 of layer 1 has another size"):
        attach("tiny", namespace=left.name.namespace)


def test_a_place_without_a_block_is_what_an_owner_leaves_that_was_killed_while_it_extended(
    left: Left, content: Callable[..., bytes]
) -> None:
    """Its state is written last, and the next owner gives the block a place anew."""
    left.write_entry(2, offset=left.header.data_offset + 3 * BLOCK_ALIGNMENT, nbytes=333)
    with attach("tiny", namespace=left.name.namespace) as weights:
        assert weights.verify() == []
        assert 2 not in weights.rows()
    segment = Segment.claim(left.name)
    assert segment.state is SegmentState.SEALED
    segment.extend([2])
    block = segment.block(2)
    block[:] = content(99, len(block))
    assert bytes(segment.block(3)) == content(3, len(segment.block(3)))
    del block
    segment.close()


def test_a_place_so_high_that_its_end_is_low_is_outside(make_manifest: Callable[..., Manifest]) -> None:
    manifest = make_manifest(1, 2, rows=33, cols=57)
    assert manifest.nbytes[0] > BLOCK_ALIGNMENT
    plan = plan_segment(manifest, [0, 1])
    header = Header(SegmentName("a", "b", "c"), SegmentState.SEALED, 1, 2, 3, 4, data_offset=plan.data_offset)
    plan.table["offset"][0] = U64_MAX - 4095
    with pytest.raises(SegmentCorrupt, match=PLACE):
        check_entries(plan.table, np.zeros(2, bool), manifest, replace(header, total_nbytes=plan.total_nbytes), "here")


def test_blocks_without_a_byte_are_in_nobodys_way(sealed: Callable[..., Segment], namespace: str) -> None:
    files = [FileSpec("a.safetensors", 99, "0" * 32)]
    shapes = {0: (0, 7), 1: (7,), 2: (0,), 3: (9,), 4: (0, 0)}
    blocks = {ExpertKey(0, e): [TensorEntry("w{layer}.{expert}", "U8", shape, 0, 8)] for e, shape in shapes.items()}
    segment = sealed(manifest=Manifest.build("tiny", "f", "experts", files, blocks), rows=[0, 1, 2, 4])
    segment.extend([3])  # it begins where the empty one behind it lies
    segment.publish(3, checksum(segment.block(3)))
    assert [len(segment.block(row)) for row in range(5)] == [0, 7, 0, 9, 0]
    segment.close()
    adopted = Segment.claim(segment.name)
    assert adopted.published().tolist() == [0, 1, 2, 3, 4]
    with attach("tiny", namespace=namespace) as weights:
        assert weights.verify() == []
        assert weights["w0.4"].shape == (0, 0)
    adopted.close()


def test_a_table_that_breaks_a_rule_while_its_owner_is_at_work_is_read_again(
    left: Left, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner extends: a reader of the old header finds entries behind its end."""
    waits: list[float] = []

    def extend(seconds: float) -> None:
        waits.append(seconds)
        left.write_entry(3, nbytes=left.manifest.nbytes[3])

    monkeypatch.setattr("shm.attachment.time.sleep", extend)
    left.write_entry(3, nbytes=1)
    with attach("tiny", namespace=left.name.namespace, node="n0") as weights:
        assert weights.verify() == []
    assert len(waits) == 1


# -- whatever is there ---------------------------------------------------------------------------------------------


def use(namespace: str) -> None:
    """Everything that a reader does with numbers of the table."""
    with attach("tiny", namespace=namespace) as weights:
        weights.verify()
        weights.held(range(len(weights.manifest)))
        for row in range(len(weights.manifest)):
            try:
                bytes(weights.block(row))
            except BlockUnavailable:
                continue


def numbers() -> Iterator[tuple[int, int]]:
    random = np.random.Generator(np.random.SFC64(3333))
    edges = [0, 1, 7, 4095, 4096, 1 << 31, 1 << 32, 1 << 47, 1 << 48, 1 << 63, U64_MAX - 4095, U64_MAX]
    for _ in range(150):
        yield int(random.integers(1 << 30)), int(random.choice(np.array(edges, np.uint64)))


def test_any_number_anywhere_in_the_table_is_an_error_of_ours_or_harmless(left: Left, namespace: str) -> None:
    """Also with a right check: of a writer that is wrong, or means harm."""
    whole = left.path.read_bytes()
    refused = 0
    for where, number in numbers():
        row, word = divmod(where % (6 * len(left.manifest)), 6)
        field = ("offset", "nbytes", "checksum", "checksum", "state", "check")[word]
        left.write_entry(row, **{field: number.to_bytes(16, "little") if word in (2, 3) else number & FIELD_MAX[field]})
        try:
            use(namespace)
        except HotspareError:
            refused += 1
        left.write(0, whole)
    assert refused > 20

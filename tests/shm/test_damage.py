"""Proof at rest: of thousands of bits that flip in a sealed segment, each is found, and costs one block at most.

Each case damages a sealed segment that nobody owns, attaches, compares every block, and has it adopted and mended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from shm.attachment import Attachment, attach
from shm.block import ExpertKey
from shm.checksum import checksum
from shm.errors import BlockUnavailable, SegmentError
from shm.layout import HEADER_NBYTES, SHM_DIRECTORY, SegmentName, SegmentState, copy_offset
from shm.segment import Damage, Segment

FLIPS_EACH = 333  # of each section
DOUBLE_FLIPS = 666
ACCIDENTS = 333
ROWS = [0, 1, 3, 4, 5, 6, 8, 9]


@dataclass(frozen=True)
class Sealed:
    """A segment, its whole object, and what must be read from it."""

    name: SegmentName
    path: Path
    whole: bytes
    sections: dict[str, tuple[int, int]]
    blocks: dict[int, bytes]
    places: dict[int, int]
    keys: tuple[ExpertKey, ...]

    def damaged(self, *bits: int) -> None:
        """Write the object as it was, with these bits flipped."""
        data = bytearray(self.whole)
        for bit in bits:
            data[bit // 8] ^= 1 << bit % 8
        self.path.write_bytes(data)

    def bits(self, section: str, n: int, seed: int = 0) -> Iterator[int]:
        start, nbytes = self.sections[section]
        random = np.random.Generator(np.random.SFC64([seed, start]))
        yield from (8 * start + random.integers(8 * nbytes, size=n)).tolist()


@pytest.fixture
def made(sealed: Callable[..., Segment]) -> Sealed:
    segment = sealed(rows=ROWS[:5])
    segment.extend(ROWS)
    for row in ROWS[5:]:
        block = segment.block(row)
        block[:] = bytes([row]) * len(block)
        segment.publish(row, checksum(block))
        del block
    header, table_nbytes = segment.header, segment.header.table_nbytes
    blocks = {row: bytes(segment.block(row)) for row in ROWS}
    places = {row: segment.address(row) - segment.address(ROWS[0]) + header.data_offset for row in ROWS[:5]}
    starts = {"header": (0, HEADER_NBYTES), "manifest": (header.manifest_offset, header.manifest_nbytes)}
    starts["table"] = (header.table_offset, table_nbytes)
    sections = starts | {f"second {name}": (copy_offset(*where), where[1]) for name, where in starts.items()}
    keys = segment.manifest.keys
    segment.close()
    path = Path(SHM_DIRECTORY, segment.name.object_name)
    return Sealed(segment.name, path, path.read_bytes(), sections, blocks, places, keys)


def readable(weights: Attachment, rows: Iterable[int]) -> dict[int, bytes]:
    found = {}
    for row in rows:
        try:
            found[row] = bytes(weights.block(row))
        except BlockUnavailable:
            continue
    return found


def reads(made: Sealed) -> tuple[dict[int, bytes], list[int]]:
    """What a reader finds, and of which rows it says that something is wrong."""
    with attach("tiny", namespace=made.name.namespace, node="n0") as weights:
        wrong = [made.keys.index(key) for key in weights.verify()]
        found = readable(weights, range(len(made.keys)))
        assert set(weights.held(range(len(made.keys)))) == set(found) == set(weights.rows().tolist())
        assert all(weights.holds(row) for row in found)
        assert {row for row in wrong if row not in found} == {made.keys.index(key) for key in weights.damaged()}
    return found, wrong


def test_a_flipped_bit_in_what_leads_to_the_blocks_costs_nothing_and_is_mended(made: Sealed) -> None:
    """No bit of header, manifest or table is without a check: whoever adopts the segment says where it was."""
    for section in made.sections:
        for bit in made.bits(section, FLIPS_EACH):
            made.damaged(bit)
            assert reads(made) == (made.blocks, []), (section, bit)
            segment = Segment.claim(made.name)
            assert segment.state is SegmentState.SEALED
            assert {row: bytes(segment.block(row)) for row in segment.published().tolist()} == made.blocks
            if "table" in section:
                assert segment.found == Damage(rows=((bit // 8 - made.sections[section][0]) // 48,))
            else:
                assert segment.found == Damage(parts=(section,))
            segment._write_header(owner_pid=int.from_bytes(made.whole[32:40], "little"))
            segment.close()
            assert made.path.read_bytes() == made.whole, "it is again what it was"


def test_a_flipped_bit_in_a_block_is_found_and_no_other_is_suspected(made: Sealed) -> None:
    random = np.random.Generator(np.random.SFC64(3333))
    for _ in range(FLIPS_EACH):
        row = int(random.choice(list(made.places)))
        at = int(random.integers(8 * len(made.blocks[row])))
        made.damaged(8 * made.places[row] + at)
        found, wrong = reads(made)
        assert wrong == [row]
        assert {r for r, block in found.items() if block != made.blocks[r]} == {row}


def test_what_is_no_part_of_anything_does_nothing(made: Sealed) -> None:
    """The rest of the last page of a manifest, a table or a block."""
    ends = [start + nbytes for start, nbytes in made.sections.values()]
    ends += [place + len(made.blocks[row]) for row, place in made.places.items()]
    for end in ends:
        if end % 4096:
            made.damaged(8 * end, 8 * (end // 4096 * 4096 + 4095))
            assert reads(made) == (made.blocks, [])


def test_two_flipped_bits_in_the_table_are_said_and_cost_one_block_at_most(made: Sealed) -> None:
    """Both copies of one entry: its block is not found any more, which every reader is told, and is fetched again."""
    first, second = made.sections["table"][0], made.sections["second table"][0]
    random = np.random.Generator(np.random.SFC64(99))
    n_lost = 0
    for _ in range(DOUBLE_FLIPS // 15):
        row = int(random.integers(len(made.keys)))
        made.damaged(*(8 * (at + 48 * row) + int(random.integers(8 * 48)) for at in (first, second)))
        found, wrong = reads(made)
        assert wrong == [row]
        assert found == {r: block for r, block in made.blocks.items() if r != row}
        segment = Segment.claim(made.name)
        assert segment.found == Damage(rows=(row,), lost=(row,))
        assert segment.published().tolist() == sorted(found)
        segment.extend(ROWS)
        for waiting in set(ROWS) - set(found):
            assert waiting == row
            block = segment.block(row)
            block[:] = made.blocks[row]
            segment.publish(row, checksum(block))
            del block
            n_lost += 1
        segment.close()
        assert reads(made) == (made.blocks, []), "whole again"
    assert n_lost > 20


def test_any_two_flipped_bits_are_never_a_wrong_byte_nor_a_block_that_is_missing_in_silence(made: Sealed) -> None:
    sections = [*made.sections, *made.sections]
    random = np.random.Generator(np.random.SFC64(7))
    refused = 0
    for number in range(DOUBLE_FLIPS):
        pair = random.choice(sections, size=2)
        made.damaged(*(next(made.bits(section, 1, number + 99 * k)) for k, section in enumerate(pair)))
        try:
            found, wrong = reads(made)
        except SegmentError:  # a header or a manifest that is right in no copy
            refused += 1
            assert set(pair) <= {"header", "second header"} or set(pair) <= {"manifest", "second manifest"}
            continue
        assert all(made.blocks[row] == block for row, block in found.items())
        assert set(made.blocks) - set(found) <= set(wrong)
    assert 0 < refused < DOUBLE_FLIPS / 3


@pytest.mark.parametrize("section", ["header", "manifest", "table"])
@pytest.mark.parametrize("by", [b"\0", b"\xff"])
def test_a_section_that_is_gone_costs_nothing(made: Sealed, section: str, by: bytes) -> None:
    for name in (section, f"second {section}"):
        start, nbytes = made.sections[name]
        made.path.write_bytes(made.whole[:start] + by * nbytes + made.whole[start + nbytes :])
        assert reads(made) == (made.blocks, [])
        segment = Segment.claim(made.name)
        assert segment.published().tolist() == ROWS
        assert segment.found == (
            Damage(rows=tuple(range(len(made.keys)))) if section == "table" else Damage(parts=(name,))
        )
        segment.close()


def spoilt(made: Sealed, random: np.random.Generator) -> bytes:
    """The object after one to four accidents: many bits, pages of zeros, of noise or of another place, torn writes."""
    data = bytearray(made.whole)
    for _ in range(int(random.integers(1, 5))):
        page, other = (4096 * int(at) for at in random.integers(len(data) // 4096, size=2))
        sector, n = 512 * int(random.integers(len(data) // 512)), 512 * int(random.integers(1, 9))
        accident = int(random.integers(5))
        if accident == 0:
            data[page : page + 4096] = bytes(4096)
        elif accident == 1:
            data[page : page + 4096] = random.bytes(4096)
        elif accident == 2:
            data[page : page + 4096] = made.whole[other : other + 4096]
        elif accident == 3:
            data[sector : sector + n] = random.bytes(n)[: len(data) - sector]
        else:
            for bit in random.integers(8 * made.sections["second table"][0], size=33).tolist():
                data[bit // 8] ^= 1 << bit % 8
    return bytes(data)


def test_pages_torn_writes_and_many_bits_are_never_a_wrong_byte_in_silence_nor_another_kind_of_error(
    made: Sealed,
) -> None:
    """Whoever attaches is told of every block that is wrong or missing; whoever adopts records no wrong checksum."""
    random = np.random.Generator(np.random.SFC64(1111))
    n_read = 0
    for number in range(ACCIDENTS):
        made.path.write_bytes(spoilt(made, random))
        try:
            found, wrong = reads(made)
        except SegmentError:
            pass
        else:
            n_read += 1
            assert {row for row, block in found.items() if made.blocks.get(row) != block} <= set(wrong), number
            assert set(made.blocks) - set(found) <= set(wrong), number
        try:
            segment = Segment.claim(made.name)
        except SegmentError:
            continue
        for row in segment.published().tolist():
            assert segment.checksum(row) == checksum(made.blocks[row])
            assert (segment.read_checksum(row) == segment.checksum(row)) == (
                bytes(segment.block(row)) == made.blocks[row]
            )
        segment.close()
        made.path.unlink()
    assert ACCIDENTS / 4 < n_read < ACCIDENTS


# -- under a living owner ------------------------------------------------------------------------------------------


def test_an_owner_finds_and_mends_what_flips_under_it_and_restores_to_the_right_place(made: Sealed) -> None:
    segment = Segment.claim(made.name)
    whole = made.path.read_bytes()
    for section, (start, nbytes) in made.sections.items():
        for bit in list(made.bits(section, 33, seed=1)):
            with made.path.open("r+b") as file:
                file.seek(bit // 8)
                file.write(bytes([whole[bit // 8] ^ 1 << bit % 8]))
            row = (bit // 8 - start) // 48
            assert segment.damaged().tolist() == ([row] if "table" in section else [])
            assert {row: bytes(segment.block(row)) for row in segment.published().tolist()} == made.blocks
            assert segment.mend() == (Damage(rows=(row,)) if "table" in section else Damage(parts=(section,)))
            assert segment.mend() == Damage()
            assert made.path.read_bytes() == whole
        assert nbytes > 0
    segment.close()


def test_an_owner_writes_anew_what_pages_torn_writes_and_many_bits_did_to_what_leads_to_the_blocks(
    made: Sealed,
) -> None:
    segment = Segment.claim(made.name)
    whole, end = made.path.read_bytes(), segment.header.data_offset
    random = np.random.Generator(np.random.SFC64(2222))
    for _ in range(ACCIDENTS):
        with made.path.open("r+b") as file:
            file.write(spoilt(made, random)[:end])
        segment.mend()
        now = made.path.read_bytes()
        for start, nbytes in made.sections.values():  # the rest of their last pages is no part of anything
            assert now[start : start + nbytes] == whole[start : start + nbytes]
        assert segment.reader_problem() is None
    segment.close()


def test_a_reader_sees_through_damage_that_comes_after_it_attached(made: Sealed) -> None:
    made.damaged()
    with attach("tiny", namespace=made.name.namespace) as weights:
        for which in ("table", "second table"):
            for bit in made.bits(which, 99, seed=2):
                flipped = made.whole[bit // 8] ^ 1 << bit % 8
                with made.path.open("r+b") as file:
                    file.seek(bit // 8)
                    file.write(bytes([flipped]))
                assert weights.verify() == []
                assert weights.damaged() == []
                assert readable(weights, ROWS) == made.blocks
                with made.path.open("r+b") as file:
                    file.seek(bit // 8)
                    file.write(made.whole[bit // 8 : bit // 8 + 1])


def test_a_damaged_entry_says_what_to_do_and_a_publication_mends_it(made: Sealed) -> None:
    segment = Segment.claim(made.name)
    with attach("tiny", namespace=made.name.namespace) as weights:
        for name in ("table", "second table"):
            start, _ = made.sections[name]
            with made.path.open("r+b") as file:
                file.seek(start + 48 * 3 + 32)
                file.write(b"\x01\x02\x03\x04")
        assert weights.damaged() == weights.verify() == [made.keys[3]]
        assert 3 not in weights.rows()
        said = r"entry for expert 3 of layer 0 is damaged in .*hotspare restore --node n0"
        for ask in (weights.block, weights.address, weights.checksum):
            with pytest.raises(BlockUnavailable, match=said):
                ask(3)
        with pytest.raises(BlockUnavailable, match=said):
            weights["model.layers.0.mlp.experts.3.up_proj.weight"]
        segment.quarantine(3)
        assert weights.damaged() == []
        segment.publish(3, segment.checksum(3))
        assert bytes(weights.block(3)) == made.blocks[3]
        assert weights.verify() == []
    segment.close()


def test_an_entry_that_is_damaged_while_its_block_is_verified_is_said(
    made: Sealed, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.damaged()

    def taken(block: memoryview) -> bytes:
        if bytes(block) != made.blocks[3]:
            return checksum(block)
        first, second = (8 * (made.sections[name][0] + 48 * 3) for name in ("table", "second table"))
        data = bytearray(made.whole)
        for bit in (first, second):
            data[bit // 8] ^= 1
        with made.path.open("r+b") as file:
            file.write(data)
        return bytes(16)

    with attach("tiny", namespace=made.name.namespace) as weights:
        monkeypatch.setattr("shm.attachment.checksum", taken)
        assert weights.verify() == [made.keys[3]]

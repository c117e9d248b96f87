"""The owner's side: one owner at a time, whatever dies when; space before bytes; nothing sealed that is not there."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shm import posix
from shm.attachment import attach
from shm.checksum import checksum
from shm.errors import (
    BlockUnavailable,
    InvalidInput,
    SegmentBusy,
    SegmentError,
    SegmentForeign,
    SegmentNotFound,
    SegmentTooNew,
    SegmentUnsealed,
)
from shm.header import Header
from shm.layout import (
    BLOCK_ALIGNMENT,
    HEADER_NBYTES,
    MANIFEST_OFFSET,
    SHM_DIRECTORY,
    BlockState,
    SegmentName,
    SegmentState,
    copy_offset,
)
from shm.manifest import Manifest
from shm.segment import Segment
from shm.twin import Twin

# Brings a segment to the state that it is asked for, says so, and waits to be told to end.
OWNER = """
import sys
from shm.checksum import checksum
from shm.layout import SegmentName
from shm.block import ExpertKey, TensorEntry
from shm.manifest import FileSpec, Manifest
from shm.segment import Segment

namespace, state = sys.argv[1:]
entry = [TensorEntry("layers.{layer}.experts.{expert}.w", "U8", (9999,), 0, 8)]
files = [FileSpec("a.safetensors", 99999, "0" * 32)]
manifest = Manifest.build("tiny", "f", "experts", files, {ExpertKey(0, e): entry for e in range(5)})
try:
    segment = Segment.claim(SegmentName(namespace, "tiny", "n0"))
except Exception as error:
    print("refused", type(error).__name__, getattr(error, "owner_pid", 0), error, flush=True)
    sys.exit(3)
print("claimed", segment.state.name, flush=True)
if state != "claimed":
    segment.allocate(manifest, range(3))
if state == "sealed":
    for row in range(3):
        segment.block(row)[:] = bytes([row + 1]) * 9999
        segment.publish(row, checksum(segment.block(row)))
    segment.seal()
print("done", segment.state.name, flush=True)
sys.stdin.readline()
"""


def name_of(namespace: str, node: str = "n0") -> SegmentName:
    return SegmentName(namespace, "tiny", node)


def path_of(name: SegmentName) -> str:
    return os.path.join(SHM_DIRECTORY, name.object_name)


# -- one owner -----------------------------------------------------------------------------------------------------


def test_a_second_owner_is_refused_by_name_and_pid(python: Callable[..., Any], namespace: str) -> None:
    owner = python(OWNER, namespace, "sealed")
    owner.expect("done SEALED")
    with pytest.raises(
        SegmentBusy, match=f"tiny on node n0 .* is owned by process {owner.pid}, which is alive"
    ) as said:
        Segment.claim(name_of(namespace))
    assert said.value.owner_pid == owner.pid


def test_the_same_process_cannot_own_a_segment_twice(sealed: Callable[..., Segment], namespace: str) -> None:
    segment = sealed()
    with pytest.raises(SegmentBusy):
        Segment.claim(name_of(namespace))
    segment.close()
    assert Segment.claim(name_of(namespace)).state is SegmentState.SEALED


def test_other_nodes_models_and_namespaces_are_other_segments(namespace: str) -> None:
    names = [name_of(namespace), name_of(namespace, "n1"), SegmentName(namespace, "other", "n0")]
    held = [Segment.claim(name) for name in names]
    assert len({os.stat(path_of(name)).st_ino for name in names}) == 3
    for segment in held:
        segment.unlink()


def test_a_sealed_segment_of_a_killed_owner_is_adopted(python: Callable[..., Any], namespace: str) -> None:
    owner = python(OWNER, namespace, "sealed")
    owner.expect("done SEALED")
    inode = os.stat(path_of(name_of(namespace))).st_ino
    owner.kill()
    segment = Segment.claim(name_of(namespace))
    assert segment.state is SegmentState.SEALED
    assert os.stat(path_of(name_of(namespace))).st_ino == inode
    assert segment.header.owner_pid == os.getpid()
    assert [bytes(segment.block(row)) for row in segment.published()] == [bytes([r + 1]) * 9999 for r in range(3)]
    segment.unlink()


@pytest.mark.parametrize("state", ["claimed", "filling"])
def test_an_unsealed_segment_of_a_killed_owner_is_replaced_by_an_empty_one(
    python: Callable[..., Any], namespace: str, state: str
) -> None:
    owner = python(OWNER, namespace, state)
    owner.expect("done")
    inode = os.stat(path_of(name_of(namespace))).st_ino
    owner.kill()
    segment = Segment.claim(name_of(namespace))
    assert segment.state is SegmentState.CLAIMED
    assert not segment.is_allocated
    assert os.stat(path_of(name_of(namespace))).st_ino != inode
    segment.unlink()


def test_the_lock_says_who_lives_not_the_pid_in_the_header(python: Callable[..., Any], namespace: str) -> None:
    """A pid would be taken for alive once it is used again."""
    owner = python(OWNER, namespace, "sealed")
    owner.expect("done")
    owner.kill()
    first = Segment.claim(name_of(namespace))  # the header now names this process, which lives on
    first.close()
    adopted = python(OWNER, namespace, "claimed")
    assert adopted.expect("claimed") == "SEALED"


@pytest.mark.parametrize("left", ["nothing", "sealed", "filling"])
def test_of_many_that_claim_at_once_exactly_one_wins(
    python: Callable[..., Any], namespace: str, left: str, sealed: Callable[..., Segment]
) -> None:
    racer = """
import sys
from shm.errors import SegmentBusy
from shm.layout import SegmentName
from shm.segment import Segment
for name in iter(lambda: sys.stdin.readline().strip(), ""):
    try:
        segment = Segment.claim(SegmentName(sys.argv[1], "tiny", name))
        print("won", segment.state.name, flush=True)
    except SegmentBusy:
        print("lost", flush=True)
"""
    rounds = 40
    for number in range(rounds):
        if left == "sealed":
            sealed(f"n{number}").close()
        elif left == "filling":
            Segment.claim(name_of(namespace, f"n{number}")).close()
    racers = [python(racer, namespace) for _ in range(4)]
    for number in range(rounds):
        for child in racers:
            child.tell(f"n{number}")
        answers = [child.expect("") for child in racers]
        won = [answer for answer in answers if answer.startswith("won")]
        assert won == ["won SEALED" if left == "sealed" else "won CLAIMED"], answers
        assert os.path.exists(path_of(name_of(namespace, f"n{number}"))), "the winner's object has its name"


# -- what claiming finds -------------------------------------------------------------------------------------------


def make_object(name: SegmentName, content: bytes) -> None:
    with open(path_of(name), "wb") as file:
        file.write(content)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * HEADER_NBYTES,
        b"\0" * 8192,
        b"HOTSPARE\2\0\0\0\0\x10" + b"\0" * 8178,
        b"HOT",
        b"HOTSPARE" + b"\0" * 9,
    ],
    ids=["empty", "no header", "no headers", "half a header", "cut in the magic", "cut"],
)
def test_what_an_owner_killed_while_claiming_leaves_is_replaced(namespace: str, content: bytes) -> None:
    make_object(name_of(namespace), content)
    segment = Segment.claim(name_of(namespace))
    assert segment.state is SegmentState.CLAIMED
    segment.unlink()


def test_an_object_that_is_not_ours_is_never_removed(namespace: str) -> None:
    content = b"somebody else's" * 999
    make_object(name_of(namespace), content)
    with pytest.raises(SegmentForeign, match="does not begin with HOTSPARE"):
        Segment.claim(name_of(namespace))
    with open(path_of(name_of(namespace)), "rb") as file:
        assert file.read() == content


def test_a_segment_of_a_newer_format_is_never_removed(sealed: Callable[..., Segment], namespace: str) -> None:
    sealed().close()
    with open(path_of(name_of(namespace)), "r+b") as file:
        for at in (0, HEADER_NBYTES):
            file.seek(at + 8)
            file.write(b"\x09")
    with pytest.raises(SegmentTooNew, match="format 9"):
        Segment.claim(name_of(namespace))
    assert os.path.exists(path_of(name_of(namespace)))


def test_a_segment_under_another_ones_name_is_foreign(sealed: Callable[..., Segment], namespace: str) -> None:
    sealed("n1").close()
    os.rename(path_of(name_of(namespace, "n1")), path_of(name_of(namespace, "n0")))
    with pytest.raises(SegmentForeign, match="is the segment of tiny on node n1"):
        Segment.claim(name_of(namespace))


@pytest.mark.parametrize("where", ["header", "manifest"])
def test_a_sealed_segment_whose_header_or_manifest_is_damaged_in_both_copies_is_replaced(
    sealed: Callable[..., Segment], namespace: str, where: str
) -> None:
    segment = sealed()
    start, nbytes = (0, HEADER_NBYTES) if where == "header" else (MANIFEST_OFFSET, segment.header.manifest_nbytes)
    segment.close()
    with open(path_of(name_of(namespace)), "r+b") as file:
        for at in (start, copy_offset(start, nbytes)):
            file.seek(at + 100)
            file.write(b"\xff\xfe\xfd")
    again = Segment.claim(name_of(namespace))
    assert again.state is SegmentState.CLAIMED
    again.unlink()


def test_a_segment_of_a_format_that_is_no_longer_read_is_replaced(
    sealed: Callable[..., Segment], namespace: str
) -> None:
    sealed().close()
    with open(path_of(name_of(namespace)), "r+b") as file:
        for at in (0, HEADER_NBYTES):
            file.seek(at + 8)
            file.write(b"\x01")
    with pytest.raises(SegmentError, match=r"format 1, .*start its node with this Hotspare"):
        attach("tiny", namespace=namespace)
    again = Segment.claim(name_of(namespace))
    assert again.state is SegmentState.CLAIMED
    again.unlink()


def test_a_sealed_segment_that_was_cut_is_replaced(sealed: Callable[..., Segment], namespace: str) -> None:
    segment = sealed()
    nbytes = segment.nbytes
    segment.close()
    os.truncate(path_of(name_of(namespace)), nbytes - 1)
    again = Segment.claim(name_of(namespace))
    assert again.state is SegmentState.CLAIMED
    again.unlink()


# -- space ---------------------------------------------------------------------------------------------------------

SMALL = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=8m tmpfs /dev/shm && exec "$@"', "sh"]

TIGHT = """
import os, sys
from shm import posix
from shm.errors import SharedMemoryFull
from shm.layout import SegmentName
from shm.block import ExpertKey, TensorEntry
from shm.manifest import FileSpec, Manifest
from shm.segment import Segment

entry = [TensorEntry("layers.{layer}.experts.{expert}.w", "U8", (999999,), 0, 8)]
files = [FileSpec("a.safetensors", 9999999, "0" * 32)]
manifest = Manifest.build("tiny", "f", "experts", files, {ExpertKey(0, e): entry for e in range(20)})
name = SegmentName("small", "tiny", "n0")

def used():
    return sum(os.stat("/dev/shm/" + n).st_blocks * 512 for n in os.listdir("/dev/shm"))
"""


@pytest.fixture
def small_shm(python: Callable[..., Any]) -> Callable[[str], str]:
    """`small_shm(code)` runs it after TIGHT in a mount namespace whose /dev/shm holds 8 MiB; what it said."""
    probe = subprocess.run([*SMALL, "true"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip(f"a small /dev/shm needs a mount namespace: {probe.stderr.decode().strip()}")

    def run(code: str) -> str:
        status, said, errors = python(TIGHT + code, prefix=SMALL).wait()
        assert status == 0, errors
        return str(said)

    return run


def test_a_segment_too_large_for_shared_memory_says_needed_and_free_and_reserves_nothing(
    small_shm: Callable[[str], str],
) -> None:
    small_shm("""
segment = Segment.claim(name)
before = used()
try:
    segment.allocate(manifest, range(20))
except SharedMemoryFull as error:
    assert error.needed > 19999980, error.needed
    assert error.free == 8388608 - before, (error.free, before)
    assert f"{error.free:,} bytes free, {error.needed:,} are needed" in str(error)
else:
    raise SystemExit("it fitted")
assert used() == before
assert segment.state.name == "CLAIMED"
segment.allocate(manifest, range(5))  # fewer fit
for row in range(5):
    segment.block(row)[:] = bytes([row]) * 999999
segment.unlink()
assert os.listdir("/dev/shm") == []
""")


def test_a_shortage_that_shows_only_while_reserving_gives_everything_back(small_shm: Callable[[str], str]) -> None:
    """Another process takes space between the look and the reservation."""
    small_shm("""
segment = Segment.claim(name)
before = used()
posix.check_room = lambda needed: None
posix.RESERVE_STEP_NBYTES = 1 << 20  # several steps succeed before one fails
try:
    segment.allocate(manifest, range(20))
except SharedMemoryFull as error:
    assert error.needed > 19999980
else:
    raise SystemExit("it fitted")
assert used() == before, (used(), before)
assert os.stat("/dev/shm/" + name.object_name).st_size == 8192
segment.allocate(manifest, range(5))
""")


def test_an_extension_that_does_not_fit_leaves_the_segment_as_it_was(small_shm: Callable[[str], str]) -> None:
    small_shm("""
segment = Segment.claim(name)
segment.allocate(manifest, range(3))
for row in range(3):
    segment.block(row)[:] = bytes([row + 1]) * 999999
    segment.publish(row, bytes(16))
segment.seal()
before, header = used(), segment.header
for check in (posix.check_room, lambda needed: None):
    posix.check_room = check
    try:
        segment.extend(range(20))
    except SharedMemoryFull:
        pass
    else:
        raise SystemExit("it fitted")
    assert used() == before
    assert segment.header == header
    assert segment.published().tolist() == [0, 1, 2] and not segment.holds(3)
segment.extend([3])
segment.block(3)[:] = bytes(999999)
segment.close()
again = Segment.claim(name)
assert [bytes(again.block(row)) for row in range(3)] == [bytes([row + 1]) * 999999 for row in range(3)]
""")


def test_a_claim_without_space_for_its_header_leaves_no_object(small_shm: Callable[[str], str]) -> None:
    small_shm("""
with open("/dev/shm/fat", "wb") as file:
    os.posix_fallocate(file.fileno(), 0, posix.free_nbytes())
try:
    Segment.claim(name)
except SharedMemoryFull as error:
    assert (error.needed, error.free) == (8192, 0)
else:
    raise SystemExit("it fitted")
assert os.listdir("/dev/shm") == ["fat"]
""")


def test_every_page_is_reserved_before_a_byte_is_written(
    namespace: str, make_manifest: Callable[..., Manifest]
) -> None:
    segment = Segment.claim(name_of(namespace))
    segment.allocate(make_manifest(2, 5), range(10))
    stat = os.stat(path_of(name_of(namespace)))
    assert stat.st_blocks * 512 >= stat.st_size == segment.nbytes
    segment.unlink()


def test_objects_are_for_their_own_user_only(sealed: Callable[..., Segment]) -> None:
    assert os.stat(path_of(sealed().name)).st_mode & 0o777 == 0o600


# -- sealing and publishing ----------------------------------------------------------------------------------------


def test_nothing_is_sealed_while_a_block_is_not_published(
    namespace: str, make_manifest: Callable[..., Manifest], fill: Callable[..., None]
) -> None:
    segment = Segment.claim(name_of(namespace))
    segment.allocate(make_manifest(2, 5), [1, 4, 7])
    with pytest.raises(SegmentError, match=r"cannot be sealed: 3 blocks are not published, first .*layer=0, expert=1"):
        segment.seal()
    fill(segment)
    segment.quarantine(4)
    with pytest.raises(SegmentError, match=r"1 blocks are not published, first .*layer=0, expert=4"):
        segment.seal()
    with pytest.raises(SegmentUnsealed):
        attach("tiny", namespace=namespace)
    fill(segment)
    segment.seal()
    with attach("tiny", namespace=namespace) as weights:
        assert weights.rows().tolist() == [1, 4, 7]
    segment.unlink()


def test_one_page_of_a_header_is_whole_whenever_its_owner_is_killed(
    namespace: str,
    make_manifest: Callable[..., Manifest],
    fill: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    segment = Segment.claim(name_of(namespace))
    seen: list[SegmentState] = []
    pwrite = os.pwrite

    def look(fd: int) -> None:
        pages = os.pread(fd, MANIFEST_OFFSET, 0)
        seen.append(Header.read(pages, "object", os.fstat(fd).st_size).state)

    def in_pieces(fd: int, data: bytes, at: int) -> int:
        for start in range(0, len(data), 1111):
            pwrite(fd, data[start : start + 1111], at + start)
            look(fd)
        return len(data)

    monkeypatch.setattr("shm.twin.os.pwrite", in_pieces)
    segment.allocate(make_manifest(), [0, 3])
    assert set(seen) == {SegmentState.CLAIMED, SegmentState.FILLING}
    assert seen == sorted(seen), "the state does not come before what it promises"
    seen.clear()
    fill(segment)
    segment.seal()
    assert set(seen) == {SegmentState.FILLING, SegmentState.SEALED}
    segment.unlink()


def test_what_a_filling_header_promises_is_there_before_it(
    namespace: str, make_manifest: Callable[..., Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    segment = Segment.claim(name_of(namespace))
    written: list[int] = []
    pwrite = os.pwrite
    monkeypatch.setattr("shm.twin.os.pwrite", lambda fd, data, at: written.append(at) or pwrite(fd, data, at))
    segment.allocate(make_manifest(), [0, 3])
    assert written[-2:] == [0, HEADER_NBYTES], "the header comes last"
    assert MANIFEST_OFFSET in written[:-2]
    assert segment.header.table_offset in written[:-2]
    segment.unlink()


def test_a_quarantined_block_is_hidden_and_keeps_its_checksum(sealed: Callable[..., Segment], namespace: str) -> None:
    segment = sealed()
    known = segment.checksum(3)
    with attach("tiny", namespace=namespace) as weights:
        segment.quarantine(3)
        assert not weights.holds(3)
        with pytest.raises(BlockUnavailable, match="expert 3 of layer 0 is not published"):
            weights.block(3)
        assert segment.checksum(3) == known
        segment.publish(3, known)
        assert weights.holds(3)


def test_sealing_twice_changes_nothing(sealed: Callable[..., Segment]) -> None:
    segment = sealed()
    before = segment.header
    segment.seal()
    assert segment.header == before


def test_a_segment_is_allocated_once(sealed: Callable[..., Segment], make_manifest: Callable[..., Manifest]) -> None:
    with pytest.raises(SegmentError, match="allocated already"):
        sealed().allocate(make_manifest(), [0])


def test_rows_without_space_are_refused_by_key(sealed: Callable[..., Segment]) -> None:
    segment = sealed(rows=[0, 2])
    asks = (segment.block, segment.address, segment.served_address, segment.quarantine)
    for ask in (*asks, lambda row: segment.publish(row, bytes(16))):
        with pytest.raises(BlockUnavailable, match=r"has no space for .*expert=1"):
            ask(1)


def test_blocks_lie_in_data_ranges_and_nothing_else_does(
    sealed: Callable[..., Segment], fill: Callable[..., None]
) -> None:
    segment = sealed(rows=[0, 2])
    segment.extend([5, 6])
    ranges = segment.data_ranges()
    assert len(ranges) == 2
    for row in (0, 2, 5, 6):
        address, nbytes = segment.address(row), len(segment.block(row))
        assert any(start <= address and address + nbytes <= start + size for start, size in ranges)
    assert sum(size for _, size in ranges) == segment.header.data_nbytes


# -- extending -----------------------------------------------------------------------------------------------------


def test_extending_keeps_readers_going_and_shows_them_new_blocks_when_they_attach_again(
    sealed: Callable[..., Segment], fill: Callable[..., None], content: Callable[..., bytes], namespace: str
) -> None:
    segment = sealed(rows=[0, 3])
    with attach("tiny", namespace=namespace) as early:
        kept = early["model.layers.0.mlp.experts.3.up_proj.weight"]
        before = kept.clone()
        segment.extend([0, 1, 3, 8])
        assert segment.rows(BlockState.RESERVED).tolist() == [1, 8]
        fill(segment)
        assert kept.equal(before)
        assert early.rows().tolist() == [0, 3], "a block past the end of its mapping is none that it holds"
        assert not early.holds(8)
        assert early.verify() == []
        assert len(list(early)) == len(early) == 6
        with pytest.raises(BlockUnavailable, match="attach again"):
            early.block(8)
        with attach("tiny", namespace=namespace) as late:
            assert late.rows().tolist() == [0, 1, 3, 8]
            assert late.verify() == []
            for row in (0, 1, 3, 8):
                assert bytes(late.block(row)) == content(row, len(late.block(row)))


def test_extending_by_nothing_new_changes_nothing(sealed: Callable[..., Segment]) -> None:
    segment = sealed(rows=[0, 3])
    before = segment.header
    segment.extend([0, 3])
    assert segment.header == before


# Adopts the sealed segment and extends it; it is killed by its own hand at the call that is named, before or after.
EXTENDER = """
import os, signal, sys
from shm import posix
from shm.extents import Extents
from shm.layout import SegmentName
from shm.segment import Segment
from shm.table import BlockTable

namespace, victim, moment = sys.argv[1:]
segment = Segment.claim(SegmentName(namespace, "tiny", "n0"))
owner, _, method = victim.rpartition(".")
owner = {"posix": posix, "Segment": Segment, "Extents": Extents, "BlockTable": BlockTable}[owner]
call = getattr(owner, method)

def dying(*arguments, **changes):
    if moment == "after":
        call(*arguments, **changes)
    os.kill(os.getpid(), signal.SIGKILL)

setattr(owner, method, dying)
print("extending", flush=True)
segment.extend([1, 8])
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("victim", ["posix.reserve", "Extents.cover", "Segment._write_header", "BlockTable.place"])
def test_a_crash_at_any_point_of_extending_costs_no_block(
    python: Callable[..., Any],
    sealed: Callable[..., Segment],
    fill: Callable[..., None],
    namespace: str,
    victim: str,
    moment: str,
) -> None:
    sealed(rows=[0, 3]).close()
    child = python(EXTENDER, namespace, victim, moment)
    assert child.wait()[0] == -signal.SIGKILL
    with attach("tiny", namespace=namespace) as weights:
        assert weights.rows().tolist() == [0, 3]
        assert weights.verify() == []
    segment = Segment.claim(name_of(namespace))
    assert segment.state is SegmentState.SEALED
    assert segment.published().tolist() == [0, 3]
    segment.extend([1, 8])
    fill(segment)
    with attach("tiny", namespace=namespace) as weights:
        assert weights.rows().tolist() == [0, 1, 3, 8]
        assert weights.verify() == []
    segment.close()


# -- renewing and letting go ---------------------------------------------------------------------------------------


def test_a_reader_keeps_its_bytes_when_the_owner_starts_over(
    python: Callable[..., Any], sealed: Callable[..., Segment], namespace: str, make_manifest: Callable[..., Manifest]
) -> None:
    """A named object is never made shorter: the reader would die of SIGBUS."""
    segment = sealed()
    reader = python(
        """
import sys
from shm import attach
weights = attach("tiny", namespace=sys.argv[1])
print("attached", flush=True)
sys.stdin.readline()
assert weights.verify() == []
print("bytes are right", flush=True)
sys.stdin.readline()
""",
        namespace,
    )
    reader.expect("attached")
    sizes = [os.stat(path_of(segment.name)).st_size]
    generation = segment.header.generation
    segment = segment.renew()
    assert segment.state is SegmentState.CLAIMED
    assert segment.header.generation != generation
    segment.allocate(make_manifest(1, 2), [0])
    reader.tell()
    reader.expect("bytes are right")
    sizes.append(os.stat(path_of(segment.name)).st_size)
    segment.unlink()
    assert sizes[1] < sizes[0], "the new object is a smaller one, so bytes that were kept are the old one's"


def test_views_outlive_closing_and_the_lock_does_not(sealed: Callable[..., Segment], namespace: str) -> None:
    segment = sealed()
    block, expected = segment.block(4), segment.checksum(4)
    segment.close()
    segment.close()
    assert checksum(block) == expected
    again = Segment.claim(name_of(namespace))  # a mapping holds a duplicate of the descriptor, and no lock by it
    assert again.state is SegmentState.SEALED
    block[0] ^= 1
    assert checksum(again.block(4)) != expected, "one object, not a copy"
    again.close()


def test_addresses_stay_mapped_while_a_restore_holds_them(sealed: Callable[..., Segment]) -> None:
    """Sources write to bare addresses: a segment that is given up meanwhile must not be unmapped under them."""
    segment = sealed()
    address, nbytes, expected = segment.address(0), len(segment.block(0)), segment.checksum(0)
    held = segment.mappings()
    segment = segment.renew()
    gc.collect()
    assert checksum(ctypes.string_at(address, nbytes)) == expected
    assert sum(map(len, held)) > nbytes
    segment.unlink()


def test_unlinking_removes_the_name_and_leaves_another_ones_object(namespace: str) -> None:
    first = Segment.claim(name_of(namespace))
    os.unlink(path_of(first.name))
    second = Segment.claim(name_of(namespace))
    first.unlink()
    assert os.path.exists(path_of(second.name)), "the name is another object's by now"
    second.unlink()
    second.unlink()
    assert not os.path.exists(path_of(second.name))


def test_origin_and_content_survive_the_owner(sealed: Callable[..., Segment], namespace: str) -> None:
    segment = sealed()
    assert segment.header.content_digest == bytes(16)
    segment.record_origin(bytes(range(16)))
    segment.record_content(bytes(range(33, 49)))
    segment.close()
    again = Segment.claim(name_of(namespace))
    assert again.header.origin == bytes(range(16))
    assert again.header.content_digest == bytes(range(33, 49))
    assert again.state is SegmentState.SEALED
    again.close()


@pytest.mark.parametrize("nbytes", [0, 15, 17, 32])
def test_a_content_digest_of_another_length_is_refused(sealed: Callable[..., Segment], nbytes: int) -> None:
    segment = sealed()
    with pytest.raises(InvalidInput, match=f"of {nbytes} bytes: give 16"):
        segment.record_content(bytes(nbytes))
    assert segment.header.content_digest == bytes(16)


# -- what is done to the object by others --------------------------------------------------------------------------


def test_a_segment_that_succeeds_a_good_one_has_its_room_before_that_is_given_up(
    small_shm: Callable[[str], str],
) -> None:
    """A shortage threw the old weights away: the name was unlinked first."""
    small_shm("""
segment = Segment.claim(name)
segment.allocate(manifest, range(3))
for row in range(3):
    segment.block(row)[:] = bytes([row + 1]) * 999999
    segment.publish(row, bytes(16))
segment.seal()
before, header = used(), segment.header
try:
    segment.succeed(manifest, range(6))
except SharedMemoryFull as error:
    assert error.free < 6 * 999999 < error.needed
else:
    raise SystemExit("it fitted")
assert (used(), segment.header, segment.reader_problem()) == (before, header, None)
assert [bytes(segment.block(row)) for row in range(3)] == [bytes([row + 1]) * 999999 for row in range(3)]
successor = segment.succeed(manifest, [7])
assert os.listdir("/dev/shm") == [name.object_name]
assert (successor.state.name, successor.rows(0x33333333).tolist()) == ("FILLING", [7])
assert successor.reader_problem() is None and not segment.is_named()
assert bytes(segment.block(2)) == bytes([3]) * 999999, "who has the old one reads on"
""")


def test_a_segment_never_unlinks_what_took_its_name(sealed: Callable[..., Segment], namespace: str) -> None:
    segment = sealed()
    os.unlink(path_of(segment.name))
    other = Segment.claim(segment.name)
    segment.unlink()
    assert other.is_named()
    other.unlink()


def test_what_a_killed_extension_reserved_is_given_back_when_the_segment_is_adopted(
    sealed: Callable[..., Segment], namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed behind the reservation, or behind the header too, it left its space taken."""
    segment = sealed(rows=[0, 1, 2])
    name, header, path = segment.name, segment.header, path_of(segment.name)
    expected, used = [bytes(segment.block(row)) for row in range(3)], os.stat(path).st_blocks

    class Killed(BaseException): ...

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    for owner, step in ((Segment, "_write_header"), (type(segment._table), "place")):
        with monkeypatch.context() as patched:
            patched.setattr(owner, step, killed)
            with pytest.raises(Killed):
                segment.extend(range(10))
        segment.close()
        assert os.stat(path).st_blocks > used
        segment = Segment.claim(name)
        assert os.stat(path).st_blocks == used
        assert (segment.header.total_nbytes, segment.state) == (header.total_nbytes, SegmentState.SEALED)
        assert [bytes(segment.block(row)) for row in range(3)] == expected
    segment.extend(range(10))
    for row in range(3, 10):
        block = segment.block(row)
        block[:] = bytes([row]) * len(block)
        segment.publish(row, checksum(block))
        del block
    with attach("tiny", namespace=namespace) as weights:
        assert weights.verify() == []
        assert [bytes(weights.block(row)) for row in range(3)] == expected
    segment.close()


def test_room_that_is_no_longer_wanted_is_given_back(sealed: Callable[..., Segment]) -> None:
    segment = sealed(rows=[0, 1, 2])
    before = os.stat(path_of(segment.name)).st_blocks
    segment.extend([3, 4, 5])
    segment.drop_unfilled([0, 3, 4, 5])
    assert os.stat(path_of(segment.name)).st_blocks == before
    assert segment.published().tolist() == [0, 1, 2]
    assert not any(segment.holds(row) for row in (3, 4, 5))


def test_an_object_that_was_cut_short_has_its_length_again_and_hides_what_is_lost(
    sealed: Callable[..., Segment], namespace: str
) -> None:
    segment = sealed()
    expected = {row: bytes(segment.block(row)) for row in segment.published().tolist()}
    path, whole = path_of(segment.name), segment.nbytes
    for left in (
        whole - BLOCK_ALIGNMENT + 1,
        segment.header.data_offset + 3 * mmap.PAGESIZE + 7,
        segment.header.table_offset + 9,
        333,
        0,
    ):
        os.truncate(path, left)
        assert "bytes" in str(segment.reader_problem())
        assert segment.read_checksum(9) is None
        damage = segment.mend()
        assert os.stat(path).st_size == whole
        assert segment.reader_problem() is None
        assert set(damage.cut_off).isdisjoint(segment.published().tolist())
        for row in segment.published().tolist():
            assert bytes(segment.block(row)) == expected[row]
        assert 9 in damage.cut_off
        with attach("tiny", namespace=namespace) as weights:
            assert weights.rows().tolist() == segment.published().tolist()
            assert weights.verify() == weights.damaged() == []
        for row in damage.cut_off:
            segment.block(row)[:] = expected[row]
            segment.publish(row, checksum(segment.block(row)))
    assert damage.cut_off == tuple(expected)


def test_what_a_reader_would_stumble_over_is_said(sealed: Callable[..., Segment], namespace: str) -> None:
    segment = sealed()
    header, path = segment.header, path_of(segment.name)
    whole = Path(path).read_bytes()

    def damage(*places: int) -> None:
        with open(path, "r+b") as file:
            for at in places:
                file.seek(at)
                file.write(bytes([whole[at] ^ 1]))

    assert segment.reader_problem() is None
    second = copy_offset(header.manifest_offset, header.manifest_nbytes)
    for places, said in (
        ((33, HEADER_NBYTES + 33), "does not match its checksum"),
        ((header.manifest_offset + 99, second + 99), "its manifest is damaged in both copies"),
    ):
        damage(places[0])
        assert segment.reader_problem() is None, "one of the two is enough"
        damage(*places)
        assert said in str(segment.reader_problem())
        with pytest.raises(SegmentError):
            attach("tiny", namespace=namespace)
        segment.mend()
        assert segment.reader_problem() is None
    os.chmod(path, 0o666)
    assert "may be written by others" in str(segment.reader_problem())
    os.chmod(path, 0o600)
    os.unlink(path)
    assert "there is no" in str(segment.reader_problem())
    other = Segment.claim(segment.name)
    assert "another object now" in str(segment.reader_problem())
    other.unlink()


def test_a_checksum_is_read_from_the_object_and_from_memory_once_that_is_given_up(
    sealed: Callable[..., Segment],
) -> None:
    segment = sealed()
    for row in segment.published().tolist():
        assert segment.read_checksum(row) == segment.checksum(row)
    successor = segment.renew()
    assert segment.read_checksum(3) == segment.checksum(3)
    successor.unlink()


# -- posix ---------------------------------------------------------------------------------------------------------


def test_a_lock_ends_with_its_process_and_taking_it_never_waits(python: Callable[..., Any], namespace: str) -> None:
    holder = python(OWNER, namespace, "claimed")
    holder.expect("done")
    fd = posix.open_existing(name_of(namespace).object_name, read_only=False)
    assert posix.is_locked(fd)
    assert not posix.try_lock(fd)
    holder.kill()
    assert not posix.is_locked(fd)
    assert posix.try_lock(fd)
    os.close(fd)


def test_a_read_only_descriptor_can_ask_for_the_owner(sealed: Callable[..., Segment]) -> None:
    segment = sealed()
    fd = posix.open_existing(segment.name.object_name, read_only=True)
    assert posix.is_locked(fd)
    segment.close()
    assert not posix.is_locked(fd)
    os.close(fd)


@pytest.mark.parametrize("kind", ["directory", "link"])
def test_things_that_are_no_shared_memory_are_foreign(namespace: str, kind: str) -> None:
    path = path_of(name_of(namespace))
    if kind == "directory":
        os.mkdir(path)
    else:
        os.symlink("/etc/hostname", path)
    try:
        for read_only in (True, False):
            with pytest.raises(SegmentForeign):
                posix.open_existing(name_of(namespace).object_name, read_only=read_only)
    finally:
        os.rmdir(path) if kind == "directory" else os.unlink(path)


def test_what_is_not_there_is_not_found_and_unlinked_in_silence(namespace: str) -> None:
    with pytest.raises(SegmentNotFound, match="hotspare ls"):
        posix.open_existing(name_of(namespace).object_name, read_only=True)
    posix.unlink(name_of(namespace).object_name)


def test_addresses_are_where_the_bytes_are(sealed: Callable[..., Segment]) -> None:
    segment = sealed()
    for row in segment.published().tolist():
        view = np.frombuffer(segment.block(row), np.uint8)
        assert view.ctypes.data == segment.address(row)
        assert segment.address(row) % mmap.PAGESIZE == 0


def test_nobody_is_told_that_it_is_sealed_before_readers_find_it_so(
    sealed: Callable[..., Segment], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node was READY, and who attached at once was told to wait until it is."""
    segment, told = sealed(rows=[0, 1]), list[SegmentState]()
    segment.extend([2])
    segment._header = replace(segment.header, state=SegmentState.FILLING)
    segment._write_header()
    write = Twin.write

    def look(self: Twin, fd: int) -> None:
        told.append(segment.state)
        write(self, fd)

    monkeypatch.setattr(Twin, "write", look)
    segment._table.hide(2)
    segment.publish(2, bytes(16))
    segment.seal()
    assert (told, segment.state) == ([SegmentState.FILLING], SegmentState.SEALED)

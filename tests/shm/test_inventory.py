"""What is on this host: who owns it, who has it attached, and what may be removed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shm import posix
from shm.attachment import attach
from shm.errors import SegmentBusy, SegmentError, SegmentForeign, SegmentNotFound
from shm.inventory import SegmentInfo, inspect, list_segments, remove
from shm.layout import SHM_DIRECTORY, SegmentName, SegmentState
from shm.manifest import Manifest
from shm.segment import Segment

OWNER = """
import sys
from shm.layout import SegmentName
from shm.segment import Segment
segment = Segment.claim(SegmentName(sys.argv[1], "tiny", "n0"))
print("owns", flush=True)
sys.stdin.readline()
"""

READER = """
import sys
from shm import attach
weights = attach("tiny", namespace=sys.argv[1])
print("attached", flush=True)
sys.stdin.readline()
weights.close()
print("closed", flush=True)
sys.stdin.readline()
"""

List = Callable[[str], list[SegmentInfo]]


def test_a_segment_is_listed_with_its_facts(
    sealed: Callable[..., Segment], namespace: str, list_segments_of: List
) -> None:
    began = time.time_ns()
    segment = sealed()
    (info,) = list_segments_of(namespace)
    assert info.object_name == segment.name.object_name
    assert info.nbytes == segment.nbytes == os.stat(os.path.join(SHM_DIRECTORY, info.object_name)).st_size
    assert info.state == "sealed"
    assert info.error is None
    assert info.owner_alive
    assert info.header is not None
    assert info.header.name == segment.name
    assert info.header.owner_pid == os.getpid()
    assert info.header.manifest_digest.hex() == segment.manifest.digest
    assert began < info.header.created_ns <= info.header.sealed_ns <= time.time_ns()


def test_the_owner_is_alive_until_it_is_killed(
    python: Callable[..., Any], sealed: Callable[..., Segment], namespace: str, list_segments_of: List
) -> None:
    sealed().close()
    assert not list_segments_of(namespace)[0].owner_alive
    owner = python(OWNER, namespace)
    owner.expect("owns")
    (info,) = list_segments_of(namespace)
    assert info.owner_alive
    assert info.attached_pids == (owner.pid,)
    owner.kill()
    (info,) = list_segments_of(namespace)
    assert not info.owner_alive
    assert info.attached_pids == ()
    assert info.state == "sealed"


def test_attached_processes_are_listed_until_they_let_go(
    python: Callable[..., Any], sealed: Callable[..., Segment], namespace: str, list_segments_of: List
) -> None:
    sealed().close()
    readers = [python(READER, namespace) for _ in range(2)]
    for reader in readers:
        reader.expect("attached")
    assert list_segments_of(namespace)[0].attached_pids == tuple(sorted(reader.pid for reader in readers))
    readers[0].tell()
    readers[0].expect("closed")
    assert list_segments_of(namespace)[0].attached_pids == (readers[1].pid,)


def test_a_reader_of_an_earlier_segment_is_none_of_the_new_one(
    sealed: Callable[..., Segment], namespace: str, list_segments_of: List
) -> None:
    segment = sealed()
    with attach("tiny", namespace=namespace):
        segment = segment.renew()
        assert list_segments_of(namespace)[0].attached_pids == ()
        segment.unlink()


def test_states_are_told_apart(namespace: str, make_manifest: Callable[..., Manifest], list_segments_of: List) -> None:
    segment = Segment.claim(SegmentName(namespace, "tiny", "n0"))
    assert list_segments_of(namespace)[0].state == "claimed"
    segment.allocate(make_manifest(), [0])
    assert list_segments_of(namespace)[0].state == "filling"
    segment.close()
    segment.unlink()


@pytest.mark.parametrize("content", [b"", b"x" * 9999, b"HOTSPARE" + b"\1" * 5000])
def test_what_cannot_be_read_is_listed_with_the_reason(namespace: str, content: bytes, list_segments_of: List) -> None:
    path = Path(SHM_DIRECTORY, f"hotspare.{namespace}.junk")
    path.write_bytes(content)
    (info,) = list_segments_of(namespace)
    assert info.state == "unreadable"
    assert info.header is None
    assert info.error
    assert info.nbytes == len(content)
    assert remove(info.object_name) == len(content)
    assert not path.exists()


def test_things_that_are_no_objects_do_not_stop_the_list(
    sealed: Callable[..., Segment], namespace: str, list_segments_of: List
) -> None:
    sealed()
    directory, link = (Path(SHM_DIRECTORY, f"hotspare.{namespace}.a{kind}") for kind in ("dir", "link"))
    dangling = Path(SHM_DIRECTORY, f"hotspare.{namespace}.adangling")
    directory.mkdir()
    link.symlink_to("/etc/hostname")
    dangling.symlink_to("/nowhere")
    try:
        states = {i.object_name.removeprefix(f"hotspare.{namespace}."): i.state for i in list_segments_of(namespace)}
        assert states["tiny.n0"] == "sealed"
        assert states["adir"] == "unreadable"
        with attach("tiny", namespace=namespace) as weights:
            assert weights.verify() == []
        with pytest.raises(SegmentError):
            remove(directory.name)
        assert directory.exists()
    finally:
        directory.rmdir(), link.unlink(), dangling.unlink()


def test_removing_refuses_a_living_owner_by_pid(
    python: Callable[..., Any], sealed: Callable[..., Segment], namespace: str
) -> None:
    name = sealed()
    name.close()
    object_name = name.name.object_name
    owner = python(OWNER, namespace)
    owner.expect("owns")
    with pytest.raises(SegmentBusy, match=f"owned by process {owner.pid}, which is alive: stop it first") as said:
        remove(object_name)
    assert said.value.owner_pid == owner.pid
    owner.kill()
    assert remove(object_name) > 0
    with pytest.raises(SegmentNotFound):
        inspect(object_name)


def test_readers_keep_what_was_removed(sealed: Callable[..., Segment], namespace: str) -> None:
    segment = sealed()
    segment.close()
    with attach("tiny", namespace=namespace) as weights:
        remove(segment.name.object_name)
        assert weights.verify() == []


def test_a_segment_that_is_claimed_while_it_is_being_removed_is_not_removed(
    sealed: Callable[..., Segment], namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon that starts between the look and the removal must not be left with an object that has no name."""
    segment = sealed()
    segment.close()
    object_name = segment.name.object_name
    late: list[Segment] = []

    def look_then_claim(name: str) -> SegmentInfo:
        info = inspect(name)
        late.append(Segment.claim(segment.name))
        return info

    monkeypatch.setattr("shm.inventory.inspect", look_then_claim)
    with pytest.raises(SegmentBusy):
        remove(object_name)
    assert late[0].state is SegmentState.SEALED
    assert os.path.exists(os.path.join(SHM_DIRECTORY, object_name))
    late[0].close()


def test_an_object_that_took_the_name_while_another_was_being_removed_is_not_removed(
    sealed: Callable[..., Segment], namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its daemon renews the segment between the opening and the lock: the name is of a segment in use by then."""
    old = sealed()
    old.close()
    path = Path(SHM_DIRECTORY, old.name.object_name)
    late: list[Segment] = []

    def renew_then_lock(fd: int) -> bool:
        monkeypatch.undo()
        posix.unlink(old.name.object_name)
        late.append(sealed(seed=1))
        late[0].close()  # and even with nobody left who owns it
        return posix.try_lock(fd)

    monkeypatch.setattr("shm.inventory.posix.try_lock", renew_then_lock)
    remove(old.name.object_name)
    assert late
    assert path.exists(), "it was looked at by nobody"
    with attach("tiny", namespace=namespace) as weights:
        assert weights.generation == late[0].header.generation


def test_only_our_own_are_removed(namespace: str) -> None:
    path = Path(SHM_DIRECTORY, f"{namespace}-other")
    path.write_bytes(b"x" * 3333)
    try:
        with pytest.raises(SegmentForeign, match="not ours to remove"):
            remove(path.name)
        assert path.exists()
        for name in ("../etc/passwd", "hotspare.../../etc/passwd", "hotspare.nobody"):
            with pytest.raises((SegmentNotFound, SegmentForeign)):
                remove(name)
    finally:
        path.unlink()


def test_listing_needs_no_segment() -> None:
    assert isinstance(list_segments(), list)

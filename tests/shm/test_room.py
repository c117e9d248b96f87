"""What bounds shared memory is asked before a byte is reserved: file system, control groups, host."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from shm import posix, room
from shm.errors import SharedMemoryFull

MIB = 1 << 20
V2_MOUNT = "31 23 0:27 {root} {top} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = "33 32 0:30 {root} {top} rw - cgroup cgroup rw,memory\n34 32 0:31 / /x rw - cgroup cgroup rw,cpu\n"


def group(directory: Path, **files: object) -> Path:
    """A control group as the kernel shows it; `memory_max=3` for memory.max."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name.replace("memory_", "memory.")).write_text(f"{content}\n")
    return directory


def proc(tmp_path: Path, cgroup: str, mountinfo: str) -> Path:
    directory = tmp_path / "proc"
    directory.mkdir()
    (directory / "cgroup").write_text(cgroup)
    (directory / "mountinfo").write_text(mountinfo)
    return directory


def test_every_group_above_with_a_limit_is_asked_and_file_cache_counts_as_free(tmp_path: Path) -> None:
    top = tmp_path / "cg"
    group(top)  # the outermost has no limit
    stat = "anon 700\nfile 250\ninactive_file 30\nactive_file 20\nshmem 200"
    group(top / "pods", memory_max="max", memory_current=5000, memory_stat=stat)
    group(top / "pods/a", memory_max=2000, memory_current=1500, memory_stat=stat)
    group(top / "pods/a/engine", memory_max=1000, memory_current=990, memory_stat=stat)
    mountinfo = V2_MOUNT.format(root="/", top=top)
    found = room.control_groups(proc(tmp_path, "1:cpu:/x\n0::/pods/a/engine\n", mountinfo))
    assert [r.nbytes for r in found] == [60, 550]
    assert found[0].where == f"the control group {top}/pods/a/engine (memory.max 1,000, in use 990)"


@pytest.mark.parametrize(
    ("root", "path"), [("/docker/abc", "/docker/abc"), ("/", "/"), ("/docker/abc", "/../../elsewhere")]
)
def test_a_container_that_sees_itself_as_the_outermost_group_is_held_to_its_limit(
    tmp_path: Path, root: str, path: str
) -> None:
    top = group(tmp_path / "a b", memory_limit_in_bytes=3333, memory_usage_in_bytes=333,
                memory_stat="total_inactive_file 3\ntotal_active_file 30\ninactive_file 9")  # fmt: skip
    mountinfo = V1_MOUNT.format(root=root, top=str(top).replace(" ", "\\040"))
    (found,) = room.control_groups(proc(tmp_path, f"4:cpu,memory:{path}\n", mountinfo))
    assert found.nbytes == 3033
    assert "memory.limit_in_bytes 3,333, in use 333" in found.where


def test_a_group_that_is_over_its_limit_has_no_room(tmp_path: Path) -> None:
    top = group(tmp_path / "cg", memory_max=10, memory_current=30, memory_stat="inactive_file 3")
    (found,) = room.control_groups(proc(tmp_path, "0::/\n", V2_MOUNT.format(root="/", top=top)))
    assert found.nbytes == 0


def test_where_nothing_is_said_nothing_bounds(tmp_path: Path) -> None:
    assert room.control_groups(tmp_path) == []
    assert room.host(tmp_path / "nothing") == []
    (tmp_path / "meminfo").write_text("MemTotal: 33 kB\nHugePages_Total:       0\n")
    assert room.host(tmp_path / "meminfo") == []


def test_the_host_counts_what_it_can_give_and_swap() -> None:
    (here,) = room.host()
    assert here.nbytes > 0
    assert room.tightest().nbytes <= min(here.nbytes, room.file_system().nbytes)


# -- a real one ----------------------------------------------------------------------------------------------------


@contextmanager
def limited(nbytes: int) -> Iterator[Path]:
    """A control group below this process's own, of whichever version has the memory controller here."""
    for version, directory, _ in room._memory_groups(Path("/proc/self")):
        made = directory / f"hotspare-test-{os.getpid()}"
        try:
            made.mkdir()
        except OSError:
            continue
        try:
            (made / version.limit).write_text(str(nbytes))
        except OSError:
            made.rmdir()
            continue
        try:
            yield made
        finally:
            made.rmdir()
        return
    pytest.skip("needs a control group that this user may make others in")


def test_a_reservation_beyond_the_control_groups_limit_is_refused_with_both_numbers_before_a_byte(
    python: Callable[..., Any], namespace: str, wait_until: Callable[..., Any]
) -> None:
    """/dev/shm had the room, so pages were taken until the kernel killed this process, or the engine beside it."""
    with limited(64 * MIB) as directory:
        child = python(
            """
import os, sys
from shm import posix
from shm.errors import SharedMemoryFull
with open(sys.argv[1] + "/cgroup.procs", "w") as file:
    file.write(str(os.getpid()))
fd = posix.create_exclusive(sys.argv[2])
posix.reserve(fd, 0, 8 << 20)
try:
    posix.reserve(fd, 8 << 20, 72 << 20)
except SharedMemoryFull as error:
    print(error.needed, error.free, os.fstat(fd).st_size, error, flush=True)
""",
            directory,
            f"hotspare.{namespace}.x.y",
        )
        status, said, errors = child.wait()
        assert status == 0, errors
        needed, free, size, message = said.split(" ", 3)
        assert (int(needed), int(size)) == (64 * MIB, 8 * MIB)
        assert 0 < int(free) < 56 * MIB, "the pages that were reserved are charged"
        assert f"the control group {directory} (memory." in message
        assert "raise its limit" in message
        wait_until(lambda: not (directory / "cgroup.procs").read_text(), "the group is empty")


def test_the_least_of_all_is_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "host", lambda: [room.Room(3333, "the host's memory", "end what takes it")])
    assert posix.free_nbytes() == 3333
    with pytest.raises(SharedMemoryFull, match="the host's memory has 3,333 bytes free, 3,334 are needed: end what"):
        posix.check_room(3334)
    posix.check_room(3333)

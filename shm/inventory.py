"""Segments on this host, with no daemon needed: list them, check them, reclaim what nobody owns."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from shm import posix
from shm.errors import HotspareError, SegmentBusy, SegmentForeign, SegmentNotFound
from shm.header import Header
from shm.layout import PREFIX, SHM_DIRECTORY, SegmentState
from shm.lookup import object_names, read_header

INODE_FIELD = 4  # of a line of /proc/PID/maps


@dataclass(frozen=True, slots=True)
class SegmentInfo:
    """One object in /dev/shm. `header` is None where it cannot be read, and `error` says why."""

    object_name: str
    nbytes: int
    header: Header | None
    owner_alive: bool
    attached_pids: tuple[int, ...]
    error: str | None = None

    @property
    def state(self) -> str:
        return "unreadable" if self.header is None else self.header.state.name.lower()


Mapped = Mapping[str, Collection[int]]
"""Inode of an object, in decimal → processes that have it mapped."""


def mapped_objects() -> Mapped:
    """Who has which object of /dev/shm mapped, as far as this user may see; owners are among them."""
    found: dict[str, set[int]] = defaultdict(set)
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/maps", errors="replace") as maps:
                for line in maps:
                    if f" {SHM_DIRECTORY}/{PREFIX}." in line:
                        found[line.split()[INODE_FIELD]].add(int(pid))
        except OSError:
            continue
    return found


def inspect(object_name: str, mapped: Mapped | None = None) -> SegmentInfo:
    """Look at one object. Raises SegmentNotFound; anything else that is wrong with it is in `error`."""
    try:
        stat = os.stat(os.path.join(SHM_DIRECTORY, object_name), follow_symlinks=False)
    except FileNotFoundError as error:
        raise SegmentNotFound(f"there is no {SHM_DIRECTORY}/{object_name}: `hotspare ls` lists what is") from error
    pids = tuple(sorted((mapped_objects() if mapped is None else mapped).get(str(stat.st_ino), ())))
    header, alive, wrong = None, False, None
    try:
        fd = posix.open_existing(object_name, read_only=True, any_owner=True)
    except HotspareError as error:
        return SegmentInfo(object_name, stat.st_size, None, False, pids, str(error))
    try:
        alive = posix.is_locked(fd)
        header = read_header(fd, object_name)
    except HotspareError as error:
        wrong = str(error)
    finally:
        os.close(fd)
    return SegmentInfo(object_name, stat.st_size, header, alive, pids, wrong)


def list_segments() -> list[SegmentInfo]:
    """Every segment of this host, this user's first, by object name. Raises SegmentError where there is no /dev/shm."""
    found, mapped = [], mapped_objects()
    for object_name in object_names():
        try:
            found.append(inspect(object_name, mapped))
        except SegmentNotFound:
            continue  # removed while we looked
    return found


def remove(object_name: str) -> int:
    """Unlink a segment that nobody owns; the bytes that were in it.

    Processes that have it mapped keep the memory until they let go. Raises SegmentBusy while its daemon lives.
    """
    info = inspect(object_name)
    if not object_name.startswith(PREFIX + "."):
        raise SegmentForeign(f"{SHM_DIRECTORY}/{object_name} is not a Hotspare segment: it is not ours to remove")
    fd = posix.open_existing(object_name, read_only=False, any_owner=True)
    try:
        if not posix.try_lock(fd):  # who starts from here on is refused, or finds no object
            pid = info.header.owner_pid if info.header else 0
            raise SegmentBusy(
                f"{object_name} is owned by process {pid or 'unknown'}, which is alive: stop it first", pid
            )
        if posix.still_named(fd, object_name):
            posix.unlink(object_name)
    finally:
        os.close(fd)
    return info.nbytes


def give_up(object_name: str) -> bool:
    """Unlink a segment of this process that is not sealed; whether there was one.

    For a process that ends with threads still at work on it: they keep their mappings until then. Raises what reading
    its header does.
    """
    try:
        fd = posix.open_existing(object_name, read_only=True)
    except SegmentNotFound:
        return False
    try:
        header = read_header(fd, object_name)
        is_ours = header.owner_pid == os.getpid() and header.state is not SegmentState.SEALED
        if is_ours and posix.still_named(fd, object_name):
            posix.unlink(object_name)
        return is_ours
    finally:
        os.close(fd)

"""How much shared memory may still be taken, and what says so: the file system, the control groups, the host.

A page of /dev/shm is counted thrice: by the file system's size, by every control group that the process is in, and by
the host. Reserving more than the first allows is an error; more than the others allow, and the kernel kills somebody:
this process, or an engine beside it in the same container. So all of them are asked before a byte is reserved.

The page cache counts as taken in a control group's usage, and gives way when memory is asked for: what of it lies in
files is free. Pages of shared memory do not give way, and `memory.stat` lists them among the anonymous ones.
https://docs.kernel.org/admin-guide/cgroup-v2.html (memory.max, memory.current, memory.stat), and cgroup-v1/memory.html.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from shm.layout import SHM_DIRECTORY

PROC_SELF = Path("/proc/self")
MEMINFO = Path("/proc/meminfo")
KIB = 1024


@dataclass(frozen=True, slots=True)
class Room:
    """So many bytes may still be taken, says `where`; `remedy` makes it more."""

    nbytes: int
    where: str
    remedy: str


@dataclass(frozen=True, slots=True)
class _Version:
    """What a version of control groups calls things; `cached` are fields of memory.stat that give way."""

    limit: str
    usage: str
    cached: tuple[str, ...]


_V1 = _Version("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
_V2 = _Version("memory.max", "memory.current", ("inactive_file", "active_file"))


def tightest() -> Room:
    """Where there is least room. Raises OSError where /dev/shm cannot be asked."""
    return min((file_system(), *control_groups(), *host()), key=lambda room: room.nbytes)


def file_system(directory: str = SHM_DIRECTORY) -> Room:
    """The file system's own size. Raises OSError."""
    there = os.statvfs(directory)
    remedy = "enlarge it (`mount -o remount,size=… /dev/shm`; containers: `--shm-size`)"
    return Room(there.f_bavail * there.f_frsize, directory, remedy)


def host(meminfo: Path = MEMINFO) -> list[Room]:
    """Memory that the host can give without killing anybody; nothing where it does not say."""
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return []
    kib = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines) if value.split()}
    if "MemAvailable" not in kib:
        return []
    nbytes = KIB * (kib["MemAvailable"] + kib.get("SwapFree", 0))
    return [Room(nbytes, "the host's memory", "end what takes it")]


def control_groups(proc: Path = PROC_SELF) -> list[Room]:
    """Every control group with a limit that this process is in, of both versions, the innermost first."""
    return [room for version, directory, top in _memory_groups(proc) for room in _upwards(version, directory, top)]


def _upwards(version: _Version, directory: Path, top: Path) -> Iterator[Room]:
    """A group is held to the limits of those above it as well."""
    for group in (directory, *directory.parents):
        if (room := _room_in(version, group)) is not None:
            yield room
        if group == top:
            return


def _room_in(version: _Version, group: Path) -> Room | None:
    try:
        limit = int((group / version.limit).read_text())  # "max" is no number
        usage = int((group / version.usage).read_text())
        cached = _cached(version, (group / "memory.stat").read_text())
    except (OSError, ValueError):  # no limit, or no such file in the outermost group
        return None
    where = f"the control group {group} ({version.limit} {limit:,}, in use {usage:,})"
    return Room(max(0, limit - usage + cached), where, "raise its limit (containers: `--memory`, `resources.limits`)")


def _cached(version: _Version, stat: str) -> int:
    values = dict(line.split() for line in stat.splitlines() if len(line.split()) == 2)
    return sum(int(values.get(name, 0)) for name in version.cached)


def _memory_groups(proc: Path) -> Iterator[tuple[_Version, Path, Path]]:
    """The group that counts this process's memory, of each version, and the outermost that is seen from here."""
    try:
        paths = dict(_paths((proc / "cgroup").read_text()))
        mounts = (proc / "mountinfo").read_text().splitlines()
    except OSError:
        return
    for line in mounts:
        before, _, behind = line.partition(" - ")
        fields, (kind, _, options, *_) = before.split(), [*behind.split(), "", "", ""]
        version = _version(kind, options)
        if version is not None and version.limit in paths:
            top = Path(_unescaped(fields[4]))
            yield version, _within(top, _unescaped(fields[3]), paths[version.limit]), top


def _version(kind: str, options: str) -> _Version | None:
    if kind == "cgroup2":
        return _V2
    return _V1 if kind == "cgroup" and "memory" in options.split(",") else None


def _paths(lines: str) -> Iterator[tuple[str, str]]:
    """By version (its limit's name) the process's group, as /proc/self/cgroup has it: `id:controllers:path`."""
    for line in lines.splitlines():
        number, controllers, path = line.split(":", 2)
        if (number, controllers) == ("0", ""):
            yield _V2.limit, path
        elif "memory" in controllers.split(","):
            yield _V1.limit, path


def _within(top: Path, root: str, path: str) -> Path:
    """Where a group is seen: the mount shows those below `root`, and a container may see itself as the outermost."""
    inside = os.path.relpath(path, root)
    return top if inside.split("/")[0] == ".." else Path(os.path.normpath(top / inside))


_ESCAPES: Mapping[str, str] = {"\\040": " ", "\\011": "\t", "\\012": "\n", "\\134": "\\"}


def _unescaped(field: str) -> str:
    for code, character in _ESCAPES.items():
        field = field.replace(code, character)
    return field

"""POSIX shared-memory objects as this project opens, locks and reserves them.

The lock is an open-file-description lock on the object itself: it lies where the object lies (any container that
sees one sees the other), it is gone with its last descriptor, SIGKILL included, and it leaves no file behind.
Its holder is the owner; a pid would be wrong across pid namespaces and after reuse.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct

import posix_ipc

from shm.errors import SegmentForbidden, SegmentForeign, SegmentNotFound, SharedMemoryFull
from shm.layout import SHM_DIRECTORY

OBJECT_MODE = 0o600  # weights are for the user who loaded them
RESERVE_STEP_NBYTES = 4 << 30  # a reservation of hundreds of GiB stays interruptible

_FLOCK = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux: type, whence, start, len, pid


def create_exclusive(object_name: str) -> int:
    """Create the object and return its descriptor; raises FileExistsError if it is there."""
    try:
        return int(posix_ipc.SharedMemory("/" + object_name, posix_ipc.O_CREX, mode=OBJECT_MODE).fd)
    except posix_ipc.ExistentialError as error:
        raise FileExistsError(errno.EEXIST, str(error), object_name) from error


def open_existing(object_name: str, *, read_only: bool) -> int:
    """Open the object; raises SegmentNotFound, SegmentForbidden, or SegmentForeign for what is no plain file."""
    try:
        fd = int(posix_ipc.SharedMemory("/" + object_name, 0, read_only=read_only).fd)
    except posix_ipc.ExistentialError as error:
        raise SegmentNotFound(f"there is no {SHM_DIRECTORY}/{object_name}: `hotspare ls` lists what is") from error
    except posix_ipc.PermissionsError as error:
        raise SegmentForbidden(
            f"{SHM_DIRECTORY}/{object_name} belongs to another user: run as the user who runs `hotspare serve`"
        ) from error
    except (OSError, ValueError) as error:  # a link, or a directory opened for writing
        raise SegmentForeign(f"{SHM_DIRECTORY}/{object_name} is not a Hotspare segment: {error}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise SegmentForeign(f"{SHM_DIRECTORY}/{object_name} is not a Hotspare segment: no plain file")
    return fd


def unlink(object_name: str) -> None:
    """Remove the name, if it is there. Processes that have it mapped keep their memory."""
    try:
        posix_ipc.unlink_shared_memory("/" + object_name)
    except posix_ipc.ExistentialError:
        return
    except posix_ipc.PermissionsError as error:
        raise SegmentForbidden(f"{SHM_DIRECTORY}/{object_name} belongs to another user, who must remove it") from error


def try_lock(fd: int) -> bool:
    """Become the owner of the object; False if another description holds the lock. Never waits."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def unlock(fd: int) -> None:
    """Give ownership up. Needed besides closing: a mapping keeps a duplicate of the descriptor, and so the lock."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, 0, 1, 0))


def is_locked(fd: int) -> bool:
    """Whether a living process owns the object. Takes no lock itself."""
    asked = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0))
    return bool(_FLOCK.unpack(asked)[0] != fcntl.F_UNLCK)


def still_named(fd: int, object_name: str) -> bool:
    """Whether the descriptor is of the object that has this name now."""
    try:
        named = os.stat(os.path.join(SHM_DIRECTORY, object_name))
    except FileNotFoundError:
        return False
    mine = os.fstat(fd)
    return (named.st_dev, named.st_ino) == (mine.st_dev, mine.st_ino)


def free_nbytes() -> int:
    """Bytes that /dev/shm still takes."""
    there = os.statvfs(SHM_DIRECTORY)
    return there.f_bavail * there.f_frsize


def reserve(fd: int, start: int, end: int) -> None:
    """Grow the object to `end` bytes and reserve the pages from `start`: a later write cannot die of SIGBUS.

    Raises SharedMemoryFull, and gives back what it had reserved.
    """
    free = free_nbytes()
    if end - start > free:
        raise SharedMemoryFull(end - start, free)
    try:
        for at in range(start, end, RESERVE_STEP_NBYTES):
            os.posix_fallocate(fd, at, min(RESERVE_STEP_NBYTES, end - at))
    except OSError as error:
        os.ftruncate(fd, start)
        if error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
            raise SharedMemoryFull(end - start, free_nbytes()) from error
        raise

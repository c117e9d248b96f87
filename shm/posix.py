"""POSIX shared-memory objects as this project opens, locks and reserves them.

The lock is an open-file-description lock on the object itself: it lies where the object lies (any container that
sees one sees the other), it is gone with its last descriptor, SIGKILL included, and it leaves no file behind.
Its holder is the owner; a pid would be wrong across pid namespaces and after reuse.

Everybody may make anything in /dev/shm, under any name: a FIFO, which holds up whoever opens it; an object that looks
sealed, which its maker goes on writing to. So nothing is opened that could wait, and an object is only good if it is
this user's, and nobody else may write to it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import resource
import stat
import struct

import posix_ipc

from shm import room
from shm.errors import SegmentError, SegmentForbidden, SegmentForeign, SegmentNotFound, SharedMemoryFull
from shm.layout import SHM_DIRECTORY

OBJECT_MODE = 0o600  # weights are for the user who loaded them
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
ROOT = 0
RESERVE_STEP_NBYTES = 4 << 30  # a reservation of hundreds of GiB stays interruptible

_FLOCK = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux: type, whence, start, len, pid
_PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01  # fallocate(2): give pages back, and leave the object as long as it is

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

# What the system says of /dev/shm or of this process, and not of the object, and what to do about it.
_REASONS = {
    errno.EROFS: "it is mounted read-only: `mount -o remount,rw /dev/shm`",
    errno.ENOSPC: "it has no room for another name, be it space or inodes: remove what nobody needs (`hotspare ls`), "
    "or `mount -o remount,nr_inodes=0 /dev/shm`",
    errno.EDQUOT: "this user's quota is used up: remove what nobody needs, or raise it",
    errno.EMFILE: "this process has as many open files as it may: raise the limit (`ulimit -n`)",
    errno.ENFILE: "this host has as many open files as it may: raise fs.file-max",
    errno.EOPNOTSUPP: "its file system cannot do that: /dev/shm must be a tmpfs of Linux",
}
# What to do about a name that somebody else has taken, be it to read there or to make a segment of that name.
_TAKEN = (
    "run as the user who runs `hotspare serve`; or remove it (`rm`, as its owner or root), or give the node another "
    "--node-id or --namespace"
)
_NO_LOCKS = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


def _path(object_name: str) -> str:
    return os.path.join(SHM_DIRECTORY, object_name)


def _system_error(error: OSError, what: str) -> SegmentError | None:
    """The error for what is wrong with /dev/shm itself or with this process; None where it may be the object."""
    if not os.path.isdir(SHM_DIRECTORY):
        return SegmentError(f"there is no {SHM_DIRECTORY}: mount it (`mount -t tmpfs tmpfs {SHM_DIRECTORY}`)")
    if error.errno in _REASONS:
        return SegmentError(f"{SHM_DIRECTORY} {what}: {_REASONS[error.errno]}")
    return None


def create_exclusive(object_name: str) -> int:
    """Create the object and return its descriptor; raises FileExistsError if it is there, else SegmentError."""
    try:
        return int(posix_ipc.SharedMemory("/" + object_name, posix_ipc.O_CREX, mode=OBJECT_MODE).fd)
    except posix_ipc.ExistentialError as error:  # said of a name that is taken and of a directory that is missing
        if missing := _system_error(OSError(errno.EEXIST, ""), "takes no object"):
            raise missing from error
        raise FileExistsError(errno.EEXIST, str(error), object_name) from error
    except posix_ipc.PermissionsError as error:
        raise SegmentForbidden(f"this user may make nothing in {SHM_DIRECTORY}: its mode must be 1777") from error
    except OSError as error:
        said = _system_error(error, "takes no object")
        raise said or SegmentError(f"{SHM_DIRECTORY} takes no object: {error}") from error


def create_unnamed() -> int:
    """A descriptor of a new object that has no name yet, and is gone with the process that made it."""
    try:
        return os.open(SHM_DIRECTORY, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, OBJECT_MODE)
    except OSError as error:
        said = _system_error(error, "takes no object")
        raise said or SegmentError(f"{SHM_DIRECTORY} takes no object without a name: {error}") from error


def name(fd: int, object_name: str) -> None:
    """Give an object of `create_unnamed` its name. Raises FileExistsError."""
    source = f"/proc/self/fd/{fd}"  # with a descriptor of a directory Python calls linkat, which follows that link
    os.link(source, _path(object_name), src_dir_fd=fd, follow_symlinks=True)


def open_existing(object_name: str, *, read_only: bool, any_owner: bool = False) -> int:
    """Open the object; never waits. With `any_owner` it is only to be looked at, or removed.

    Raises SegmentNotFound, SegmentForeign for what is no plain file, SegmentForbidden for what another user made, or
    may write to, and SegmentError for what is wrong with /dev/shm.
    """
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(_path(object_name), flags)
    except FileNotFoundError as error:
        raise SegmentNotFound(f"there is no {_path(object_name)}: `hotspare ls` lists what is") from error
    except PermissionError as error:
        raise SegmentForbidden(
            f"{_path(object_name)} belongs to another user than {os.geteuid()}, who keeps it to himself: {_TAKEN}"
        ) from error
    except OSError as error:  # a link, a socket, a directory opened for writing
        said = _system_error(error, "lets nothing be opened") if error.errno != errno.EOPNOTSUPP else None
        raise said or _foreign(object_name, str(error.strerror)) from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise _foreign(object_name, "no plain file")
        if not any_owner:
            _check_owner(fd, object_name, read_only=read_only)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _foreign(object_name: str, why: str) -> SegmentForeign:
    return SegmentForeign(f"{_path(object_name)} is not a Hotspare segment ({why}): {_TAKEN}")


def _check_owner(fd: int, object_name: str, *, read_only: bool) -> None:
    """Whether what is in the object was written by this user; root's may be read, for root can do anything anyway.

    Root is held to it as well: any user can make a sealed segment of any name, and root's engine would load it.
    """
    there, me = os.fstat(fd), os.geteuid()
    if there.st_uid != me and not (read_only and there.st_uid == ROOT):
        raise SegmentForbidden(
            f"{_path(object_name)} belongs to user {there.st_uid}, and this is user {me}: what another user made "
            f"is not trusted; {_TAKEN}"
        )
    if there.st_mode & OTHERS_WRITE:
        raise SegmentForbidden(
            f"{_path(object_name)} may be written by others (mode {stat.S_IMODE(there.st_mode):o}): what is in it is "
            f"not trusted; `hotspare rm` it, or `chmod {OBJECT_MODE:o}` it if nobody wrote to it"
        )


def unlink(object_name: str) -> None:
    """Remove the name, if it is there. Processes that have it mapped keep their memory."""
    try:
        posix_ipc.unlink_shared_memory("/" + object_name)
    except posix_ipc.ExistentialError:
        return
    except posix_ipc.PermissionsError as error:
        raise SegmentForbidden(f"{SHM_DIRECTORY}/{object_name} belongs to another user, who must remove it") from error


def _lock_call(fd: int, command: int, kind: int) -> bytes:
    """One call for the lock on byte 0. Raises SegmentError where /dev/shm knows no such locks."""
    try:
        return bytes(fcntl.fcntl(fd, command, _FLOCK.pack(kind, os.SEEK_SET, 0, 1, 0)))
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise SegmentError(
            f"{SHM_DIRECTORY} knows no open-file-description locks ({error.strerror}), by which a segment has one "
            "owner: run on a Linux kernel (3.15 or newer), not in a sandbox that imitates one (gVisor)"
        ) from error


def try_lock(fd: int) -> bool:
    """Become the owner of the object; False if another description holds the lock. Never waits. Raises SegmentError."""
    try:
        _lock_call(fd, fcntl.F_OFD_SETLK, fcntl.F_WRLCK)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def unlock(fd: int) -> None:
    """Give ownership up. Needed besides closing: a mapping keeps a duplicate of the descriptor, and so the lock."""
    _lock_call(fd, fcntl.F_OFD_SETLK, fcntl.F_UNLCK)


def is_locked(fd: int) -> bool:
    """Whether a living process owns the object. Takes no lock itself. Raises SegmentError."""
    return bool(_FLOCK.unpack(_lock_call(fd, fcntl.F_OFD_GETLK, fcntl.F_WRLCK))[0] != fcntl.F_UNLCK)


def still_named(fd: int, object_name: str) -> bool:
    """Whether the descriptor is of the object that has this name now."""
    try:
        named = os.stat(_path(object_name), follow_symlinks=False)
    except OSError:
        return False
    return (named.st_dev, named.st_ino) == identity(fd)


def identity(fd: int) -> tuple[int, int]:
    """Of the open object: another one for each that lives at the same time, whatever its name."""
    mine = os.fstat(fd)
    return mine.st_dev, mine.st_ino


def free_nbytes() -> int:
    """Bytes of shared memory that may still be taken, whatever bounds them. Raises SegmentError."""
    return _tightest().nbytes


def _tightest() -> room.Room:
    try:
        return room.tightest()
    except OSError as error:
        said = _system_error(error, "cannot be asked")
        raise said or SegmentError(f"{SHM_DIRECTORY} cannot be asked for room: {error}") from error


def check_room(needed: int) -> None:
    """Whether so many bytes may be taken. Raises SharedMemoryFull, which says what has too few."""
    least = _tightest()
    if needed > least.nbytes:
        raise SharedMemoryFull(needed, least.nbytes, least.where, least.remedy)


def reserve(fd: int, start: int, end: int) -> None:
    """Grow the object to `end` bytes and reserve the pages from `start`: a later write cannot die of SIGBUS.

    Raises SharedMemoryFull, or SegmentError for another reason, and gives back what it had reserved.
    """
    check_room(end - start)
    largest, before = resource.getrlimit(resource.RLIMIT_FSIZE)[0], os.fstat(fd).st_size
    if largest != resource.RLIM_INFINITY and end > largest:
        raise SegmentError(
            f"a segment of {end:,} bytes is larger than this process may make a file ({largest:,}): raise that limit "
            "(`ulimit -f unlimited`, systemd: LimitFSIZE)"
        )
    try:
        for at in range(start, end, RESERVE_STEP_NBYTES):
            os.posix_fallocate(fd, at, min(RESERVE_STEP_NBYTES, end - at))
    except OSError as error:
        give_back(fd, start, end)
        os.ftruncate(fd, max(before, start))  # what nobody was ever told of
        if error.errno in (errno.ENOSPC, errno.ENOMEM):
            raise SharedMemoryFull(end - start, free_nbytes()) from error
        said = _system_error(error, "gives no pages")
        raise said or SegmentError(f"{SHM_DIRECTORY} gives no pages: {error}") from error


def give_back(fd: int, start: int, end: int) -> None:
    """Free the pages of these bytes; they read as zeros then, and the object stays as long as it is."""
    if start < end and _libc.fallocate(fd, _PUNCH_HOLE_KEEP_SIZE, start, end - start):
        code = ctypes.get_errno()
        raise SegmentError(f"{SHM_DIRECTORY} takes no pages back: {os.strerror(code)}")

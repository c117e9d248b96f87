"""What others make in /dev/shm, what is wrong with it, and which of that is said: nothing waits, nothing is trusted."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shm import attach, inventory, posix
from shm.errors import SegmentError, SegmentForbidden, SegmentForeign
from shm.layout import SHM_DIRECTORY, SegmentName
from shm.segment import Segment
from tests.processes import DEADLINE_S, ROOT

STRANGER = 54_321
FLOOD = 5000

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make what another user has made")


@pytest.fixture
def path(namespace: str, segment_path: Callable[..., Path]) -> Iterator[Path]:
    """Where the segment of node n0 belongs; removed at the end, whatever it is then."""
    yield (path := segment_path(namespace, "n0", "tiny"))
    if path.is_dir():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def refusals(namespace: str) -> list[type[Exception]]:
    """What attaching by name, attaching by model, and claiming end with."""
    found = []
    for ask in (
        lambda: attach("tiny", namespace=namespace, node="n0"),
        lambda: attach("tiny", namespace=namespace),
        lambda: Segment.claim(SegmentName(namespace, "tiny", "n0")),
    ):
        with pytest.raises(SegmentError) as said:
            ask()
        found.append(said.type)
    return found


# -- strangers -----------------------------------------------------------------------------------------------------


@as_root
def test_another_users_sealed_segment_is_neither_attached_nor_adopted_though_root_could(
    sealed: Callable[..., Segment], namespace: str, path: Path
) -> None:
    """Any user can make one, of any name, and go on writing to it."""
    sealed().close()
    os.chown(path, STRANGER, STRANGER)
    before = path.read_bytes()
    assert refusals(namespace) == [SegmentForbidden] * 3
    with pytest.raises(SegmentForbidden, match=rf"belongs to user {STRANGER}, and this is user 0.*run as the user"):
        attach("tiny", namespace=namespace)
    assert path.read_bytes() == before
    (info,) = [i for i in inventory.list_segments() if i.object_name == path.name]
    assert info.state == "sealed", "it is listed all the same"
    inventory.remove(path.name)
    assert not path.exists()


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_segment_that_others_may_write_to_is_neither_attached_nor_adopted(
    sealed: Callable[..., Segment], namespace: str, path: Path, mode: int
) -> None:
    sealed().close()
    path.chmod(mode)
    assert refusals(namespace) == [SegmentForbidden] * 3
    path.chmod(0o600)
    attach("tiny", namespace=namespace).close()


@as_root
def test_a_user_may_read_what_root_has_made_readable_and_owns_nothing_of_it(
    sealed: Callable[..., Segment], namespace: str, path: Path
) -> None:
    sealed().close()
    path.chmod(0o644)
    code = """
import os, sys
from shm import attach
from shm.layout import SegmentName
from shm.segment import Segment
os.setuid(54321)
print(len(attach("tiny", namespace=sys.argv[1]).rows()))
try:
    Segment.claim(SegmentName(sys.argv[1], "tiny", "n0"))
except Exception as error:
    print(type(error).__name__)
"""
    ran = subprocess.run(
        [sys.executable, "-c", code, namespace],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert ran.stdout.split() == ["10", "SegmentForbidden"], ran.stderr


@as_root
def test_a_forged_segment_beside_the_true_one_is_not_even_ambiguous(
    sealed: Callable[..., Segment], namespace: str, segment_path: Callable[..., Path]
) -> None:
    sealed("n0", seed=3)
    sealed("a-forger", seed=4).close()
    os.chown(segment_path(namespace, "a-forger", "tiny"), STRANGER, STRANGER)
    with attach("tiny", namespace=namespace) as weights:
        assert weights.name.node == "n0"


@pytest.mark.parametrize("kind", ["fifo", "directory", "link", "socket"])
def test_nothing_in_the_place_of_a_segment_holds_anybody_up(namespace: str, path: Path, kind: str) -> None:
    """Opening a FIFO waits for somebody who writes to it: every `ls`, attach and start on the host did."""
    import socket

    with socket.socket(socket.AF_UNIX) as listener:
        make: dict[str, Callable[[], object]] = {
            "fifo": lambda: os.mkfifo(path), "directory": path.mkdir, "link": lambda: path.symlink_to("/etc/hostname"),
            "socket": lambda: listener.bind(str(path)),
        }  # fmt: skip
        make[kind]()
        assert refusals(namespace) == [SegmentForeign] * 3
        (info,) = [i for i in inventory.list_segments() if i.object_name == path.name]
        assert info.state == "unreadable"


def test_thousands_of_names_hide_none(
    sealed: Callable[..., Segment], namespace: str, wait_until: Callable[..., Any]
) -> None:
    """The first 4,096 in order of name were looked at, and ours was not among them."""
    segment = sealed("zz")
    paths = [Path(SHM_DIRECTORY, f"hotspare.{namespace}.tiny.{number:05}") for number in range(FLOOD)]
    try:
        for each in paths:
            each.touch()
            if os.geteuid() == 0:
                os.chown(each, STRANGER, STRANGER)
        with attach("tiny", namespace=namespace) as weights:
            assert weights.name == segment.name
        if os.geteuid() == 0:
            assert segment.name.object_name in {info.object_name for info in inventory.list_segments()}
    finally:
        for each in paths:
            each.unlink(missing_ok=True)


# -- what is wrong with /dev/shm, or with this process ---------------------------------------------------------------

CLAIM = """
import os, sys
from shm.errors import SegmentError
from shm.layout import SegmentName
from shm.segment import Segment
from shm import attach, inventory
for ask in (lambda: Segment.claim(SegmentName("odd", "tiny", "n0")), inventory.list_segments):
    try:
        print(ask())
    except SegmentError as error:
        print(f"{type(error).__name__}: {error}")
"""
READ_ONLY = "mount -t tmpfs -o ro tmpfs /dev/shm"
MISSING = "mount -t tmpfs tmpfs /dev && mkdir -m 755 /dev/empty"
NO_INODES = "mount -t tmpfs -o nr_inodes=1 tmpfs /dev/shm"


@pytest.mark.parametrize(
    ("mount", "claimed", "listed"),
    [
        (READ_ONLY, "SegmentError: /dev/shm takes no object: it is mounted read-only: `mount -o remount,rw", "[]"),
        (MISSING, "SegmentError: there is no /dev/shm: mount it", "SegmentError: /dev/shm cannot be listed"),
        (NO_INODES, "SegmentError: /dev/shm takes no object: it has no room for another name, be it space or in", "[]"),
    ],
    ids=["read-only", "missing", "without inodes"],
)
def test_what_is_wrong_with_the_file_system_is_said_and_nothing_else(
    python: Callable[..., Any], mount: str, claimed: str, listed: str
) -> None:
    prefix = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh"]
    if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs a mount namespace")
    status, said, errors = python(CLAIM, prefix=prefix).wait()
    assert status == 0, errors
    first, second = said.splitlines()
    assert (first[: len(claimed)], second[: len(listed)]) == (claimed, listed)


def test_a_limit_on_the_size_of_files_is_said_as_that(namespace: str) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8191, before[1]))
    try:
        with pytest.raises(SegmentError, match=r"8,192 bytes is larger than .*may make a file \(8,191\).*ulimit -f"):
            Segment.claim(SegmentName(namespace, "tiny", "n0"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not [name for name in os.listdir(SHM_DIRECTORY) if namespace in name]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS])
def test_a_file_system_without_these_locks_is_said_to_be_one(
    namespace: str, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """As gVisor answers: there is none here, so its answer is put in the system's place."""

    def refuse(fd: int, command: int, *_: object) -> bytes:
        assert command in (fcntl.F_OFD_SETLK, fcntl.F_OFD_GETLK)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("shm.posix.fcntl.fcntl", refuse)
    with pytest.raises(SegmentError, match=r"no open-file-description locks .*gVisor"):
        Segment.claim(SegmentName(namespace, "tiny", "n0"))


def test_pages_that_are_given_back_are_free_and_read_as_zeros(namespace: str, path: Path) -> None:
    fd = posix.create_exclusive(path.name)
    posix.reserve(fd, 0, 1 << 20)
    os.pwrite(fd, b"x" * (1 << 20), 0)
    before = os.fstat(fd).st_blocks
    posix.give_back(fd, 1 << 18, 1 << 19)
    assert before - os.fstat(fd).st_blocks == (1 << 18) // 512
    assert os.fstat(fd).st_size == 1 << 20
    assert os.pread(fd, 1 << 20, 0) == b"x" * (1 << 18) + bytes(1 << 18) + b"x" * (1 << 19)
    os.close(fd)


# -- squatting -----------------------------------------------------------------------------------------------------

CLAIM_AS = """
import os, sys
from shm.layout import SegmentName
from shm.segment import Segment
os.setuid(int(sys.argv[2]))
try:
    Segment.claim(SegmentName(sys.argv[1], "tiny", "n0"))
except Exception as error:
    print(type(error).__name__, error)
"""


@as_root
@pytest.mark.parametrize("kind", ["object", "fifo", "sealed by another"])
def test_a_name_that_another_user_took_first_is_refused_with_all_that_can_be_done(
    sealed: Callable[..., Segment], namespace: str, path: Path, kind: str
) -> None:
    """Whoever starts a node there is not to be told to be whoever starts the node."""
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "object":
        path.touch(0o600)
    else:
        sealed().close()
    os.chown(path, STRANGER, STRANGER)
    ran = subprocess.run(
        [sys.executable, "-c", CLAIM_AS, namespace, str(STRANGER + 1)],
        cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip
    assert ran.stdout.startswith("SegmentForbidden" if kind != "fifo" else "Segment"), ran.stderr
    for remedy in ("run as the user", "remove it (`rm`", "--node-id", "--namespace"):
        assert remedy in ran.stdout
    assert path.exists(), "it is not ours to remove"

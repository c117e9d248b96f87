"""Finding a segment on this host by name, and reading its header without mapping it."""

from __future__ import annotations

import os
import time

from shm import posix
from shm.errors import (
    ManifestError,
    SegmentAmbiguous,
    SegmentCorrupt,
    SegmentError,
    SegmentForbidden,
    SegmentNotFound,
)
from shm.header import Header, corrupt
from shm.layout import MANIFEST_OFFSET, PREFIX, SHM_DIRECTORY, SegmentName, SegmentState, copy_offset, object_prefix
from shm.manifest import Manifest, check_name
from shm.rules import check_length, check_sections

SEGMENTS_MAX = 4096  # listed of one host, this user's first
HEADER_READS_MAX = 5  # both pages may be torn for who reads slowly while their owner rewrites one and the other
HEADER_RETRY_S = 0.002


def object_names() -> list[str]:
    """Names in /dev/shm that could be segments: this user's, then others', who may have made any number; sorted.

    Raises SegmentError where there is no /dev/shm.
    """
    with _directory() as entries:
        owners = [(_owner(entry) != os.geteuid(), entry.name) for entry in entries if _is_ours(entry.name)]
    return [name for _, name in sorted(owners)[:SEGMENTS_MAX]]


def _is_ours(object_name: str) -> bool:
    return object_name.startswith(PREFIX + ".")


def _directory() -> os._ScandirIterator[str]:
    try:
        return os.scandir(SHM_DIRECTORY)
    except OSError as error:
        raise SegmentError(f"{SHM_DIRECTORY} cannot be listed ({error.strerror}): mount a tmpfs there") from error


def _owner(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat(follow_symlinks=False).st_uid
    except OSError:  # removed while we looked
        return -1


def find_segment(model: str, namespace: str = "default", node: str | None = None) -> str:
    """The object name of the one segment of this model on this host.

    Raises SegmentNotFound, SegmentAmbiguous if several nodes of this host hold the model and none is named, or what is
    wrong with the only one there is.
    """
    if node is not None:
        return SegmentName(namespace, model, node).object_name
    check_name("model", model), check_name("namespace", namespace)
    found: dict[str, Header] = {}
    wrong: list[SegmentError] = []
    with _directory() as entries:
        names = sorted(entry.name for entry in entries if entry.name.startswith(object_prefix(namespace, model)))
    for object_name in names:
        try:
            header = open_header(object_name)
        except SegmentNotFound:  # removed while we looked
            continue
        except SegmentError as error:
            wrong.append(error)
            continue
        if (header.name.namespace, header.name.model) == (namespace, model):
            found[object_name] = header
    sealed = [o for o, h in found.items() if h.state is SegmentState.SEALED]
    choice = sealed or list(found)
    if len(choice) > 1:
        nodes = ", ".join(sorted(found[o].name.node for o in choice))
        raise SegmentAmbiguous(f"several nodes of this host hold {model}: say node=… ({nodes})")
    if not choice and wrong:  # what is wrong with our own says more than that others have made something, too
        raise min(wrong, key=lambda error: isinstance(error, SegmentForbidden))
    if not choice:
        raise SegmentNotFound(
            f"no segment of {model} in namespace {namespace} on this host: `hotspare ls` lists what is, "
            f"`hotspare serve --model {model} --checkpoint DIR` makes one"
        )
    return choice[0]


def open_header(object_name: str) -> Header:
    """The header of the object of this name. Raises the SegmentError that says what is wrong with it."""
    fd = posix.open_existing(object_name, read_only=True)
    try:
        return read_header(fd, object_name)
    finally:
        os.close(fd)


def read_header(fd: int, object_name: str) -> Header:
    """The header of an open object, read again while its owner is in the middle of writing it."""
    for attempt in range(HEADER_READS_MAX):
        try:
            header = Header.read(os.pread(fd, MANIFEST_OFFSET, 0), object_name, os.fstat(fd).st_size)
            check_sections(header, f"{SHM_DIRECTORY}/{object_name}")
            return header
        except SegmentCorrupt:
            if attempt + 1 == HEADER_READS_MAX:
                raise
            time.sleep(HEADER_RETRY_S)
    raise AssertionError("unreachable")


def read_manifest(view: memoryview, header: Header, where: str) -> Manifest:
    """The manifest from the first copy that is right, in memory of our own. Raises SegmentCorrupt."""
    wrong: ManifestError | None = None
    for at in (header.manifest_offset, copy_offset(header.manifest_offset, header.manifest_nbytes)):
        try:
            raw = bytes(view[at : at + header.manifest_nbytes])
            manifest = Manifest.from_bytes(raw, header.manifest_digest.hex())
        except ManifestError as error:
            wrong = wrong or error
        else:
            check_length(header, manifest, where)
            return manifest
    raise corrupt(where, str(wrong)) from wrong

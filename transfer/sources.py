"""Where a block's bytes can come from, nearest first: this host's memory, a peer's memory, the checkpoint on disk.

A source puts the bytes of a batch at the batch's addresses, and says nothing of whether they are right: the restore
takes the checksum at the destination. Only the disk has none to compare with, so it takes one as the bytes pass.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from enum import StrEnum
from typing import Protocol

import xxhash

from shm.block import TENSOR_ALIGNMENT, TensorSpec
from shm.manifest import Manifest
from transfer.checkpoint import Checkpoint
from transfer.engine import TransferEngine
from transfer.errors import CheckpointError
from transfer.memory import address_of, gather, populate, scatter
from transfer.plan import Batch, Limits, split

READ_CHUNK_NBYTES = 1 << 20  # read, then checksummed while it is still in the core's cache
DISK_BATCH_NBYTES = 64 << 20
DISK_LANES_MAX = 16
LOCAL_LANES_MAX = 8
PEER_LANES = 2  # one batch on the wire while the next one is being asked for


class SourceKind(StrEnum):
    LOCAL = "local"
    PEER = "peer"
    DISK = "disk"


class Source(Protocol):
    """One place that has blocks. `fetch` is called by up to `lanes` threads at a time."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> SourceKind: ...
    @property
    def lanes(self) -> int: ...
    @property
    def limits(self) -> Limits: ...
    @property
    def writes(self) -> bool: ...

    def fetch(self, batch: Batch) -> Mapping[int, bytes]:
        """Put the batch's bytes in place; the checksums it took on the way, by row (none for memory sources).

        Raises a HotspareError; then any of the destinations may be half-written.
        """
        ...

    def close(self) -> None:
        """Give up what it holds open. Called once, when the restore has ended."""
        ...


class InPlace:
    """Blocks that are where they belong already: nothing is moved, they are only verified."""

    kind = SourceKind.LOCAL
    limits = Limits()
    writes = False

    def __init__(self, name: str = "in place") -> None:
        self.name = name
        self.lanes = 1

    def fetch(self, batch: Batch) -> Mapping[int, bytes]:
        return {}

    def close(self) -> None:
        """Nothing is open."""


class LocalSource:
    """Blocks in memory that this process can read: an attached segment of this host."""

    kind = SourceKind.LOCAL
    limits = Limits()
    writes = True

    def __init__(self, name: str = "local") -> None:
        self.name = name
        self.lanes = max(1, min(LOCAL_LANES_MAX, os.cpu_count() or 1))

    def fetch(self, batch: Batch) -> Mapping[int, bytes]:
        for copy in batch.copies:
            ctypes.memmove(copy.destination, copy.source, copy.nbytes)
        return {}

    def close(self) -> None:
        """Nothing is open."""


class PeerSource:
    """A peer's memory, through the transfer engine. The destinations are registered with `engine`."""

    kind = SourceKind.PEER
    limits = Limits()
    lanes = PEER_LANES
    writes = True

    def __init__(self, name: str, session_id: str, engine: TransferEngine) -> None:
        self.name = name
        self.session_id = session_id
        self._engine = engine

    def fetch(self, batch: Batch) -> Mapping[int, bytes]:
        for call in split(batch.copies, self.limits):
            for copy in call:
                populate(copy.destination, copy.nbytes)
            self._engine.read(self.session_id, call)
        return {}

    def close(self) -> None:
        """Nothing is open: the engine is not ours."""


class Run:
    """Tensors of a block that lie one behind the other in one file, as they do in the block. Offsets in bytes."""

    __slots__ = ("file", "file_offset", "nbytes", "offset")

    def __init__(self, tensor: TensorSpec) -> None:
        self.file, self.file_offset = tensor.file, tensor.file_offset
        self.offset, self.nbytes = tensor.offset, tensor.nbytes

    def take(self, tensor: TensorSpec) -> bool:
        """Grow by a tensor that follows at once on both sides."""
        follows = (
            tensor.file == self.file
            and tensor.file_offset == self.file_offset + self.nbytes
            and tensor.offset == self.offset + self.nbytes
        )
        if follows:
            self.nbytes += tensor.nbytes
        return follows


def runs_of(tensors: tuple[TensorSpec, ...]) -> list[Run]:
    """The file ranges of a block, as few as can be, in order of offset in the block."""
    runs: list[Run] = []
    for tensor in tensors:
        if not runs or not runs[-1].take(tensor):
            runs.append(Run(tensor))
    return runs


def position_on_disk(manifest: Manifest, row: int) -> int:
    """A number that puts blocks in the order in which they lie in the checkpoint's files."""
    first = int(manifest.rows["first_range"][row])
    file, offset = manifest.ranges[first][["file", "offset"]].tolist()
    return int(file) << 48 | int(offset)


class DiskSource:
    """The checkpoint's files, read straight to where the blocks belong: no second copy at any time."""

    kind = SourceKind.DISK
    limits = Limits(nbytes=DISK_BATCH_NBYTES)
    writes = True

    def __init__(self, checkpoint: Checkpoint, name: str = "disk") -> None:
        self.name = name
        self.lanes = max(2, min(DISK_LANES_MAX, os.cpu_count() or 1))
        self._checkpoint = checkpoint
        self._descriptors: dict[int, int] = {}
        self._lock = threading.Lock()

    def position(self, row: int) -> int:
        """See `position_on_disk`."""
        return position_on_disk(self._checkpoint.manifest, row)

    def fetch(self, batch: Batch) -> Mapping[int, bytes]:
        checksums = {}
        for want in batch.wants:
            whole = gather(want.pieces)
            into = memoryview(bytearray(want.nbytes)) if whole is None else whole
            checksums[want.row] = self.read_block(want.row, into)
            if whole is None:
                scatter(into, want.pieces)
        return checksums

    def read_block(self, row: int, into: memoryview) -> bytes:
        """Read a block's tensors into `into` and return its checksum. Raises CheckpointError."""
        digest = xxhash.xxh3_128()
        end = 0
        for run in runs_of(self._checkpoint.manifest.block(row).tensors):
            if run.offset > end:
                assert run.offset - end < TENSOR_ALIGNMENT
                into[end : run.offset] = bytes(run.offset - end)  # alignment is zeros, whatever was there before
                digest.update(into[end : run.offset])
            self._read_run(run, into, digest)
            end = run.offset + run.nbytes
        return digest.digest()

    def _read_run(self, run: Run, into: memoryview, digest: xxhash.xxh3_128) -> None:
        descriptor = self._descriptor(run.file)
        done = 0
        while done < run.nbytes:
            size = min(READ_CHUNK_NBYTES, run.nbytes - done)
            chunk = into[run.offset + done : run.offset + done + size]
            populate(address_of(chunk), chunk.nbytes)
            try:
                got = os.preadv(descriptor, [chunk], run.file_offset + done)
            except OSError as error:
                raise CheckpointError(f"{self._checkpoint.path(run.file)} cannot be read: {error}") from error
            if got == 0:
                raise CheckpointError(
                    f"{self._checkpoint.path(run.file)} ends before byte {run.file_offset + run.nbytes:,}: was it cut "
                    "short after its header was read? Download it again"
                )
            digest.update(chunk[:got])
            done += got

    def _descriptor(self, file: int) -> int:
        with self._lock:
            if file not in self._descriptors:
                path = self._checkpoint.path(file)
                try:
                    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise CheckpointError(f"{path} cannot be opened: {error}") from error
                self._descriptors[file] = descriptor
                with suppress(OSError):  # only advice: some file systems refuse it
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            return self._descriptors[file]

    def close(self) -> None:
        """Close the files."""
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

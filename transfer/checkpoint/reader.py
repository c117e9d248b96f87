"""Blocks as they lie in a checkpoint's files: which ranges they are, and reading them with a checksum on the way.

Only the disk has no checksum to compare with, so it takes one as the bytes pass. Nor has it an owner who would say that
the files are being written to: so their identity is looked at again after every block, when its last byte is in memory.
A block is good only if every file of it still is the very file whose content was told (`transfer.checkpoint.content`).
"""

from __future__ import annotations

import os
from contextlib import suppress

import xxhash

from shm.block import TENSOR_ALIGNMENT, TensorSpec
from shm.manifest import Manifest
from transfer.checkpoint.checkpoint import Checkpoint
from transfer.checkpoint.content import Identities, identity_of
from transfer.errors import CheckpointError
from transfer.memory import address_of, populate

READ_CHUNK_NBYTES = 1 << 20  # read, then checksummed while it is still in the core's cache
FILES_OPEN_MAX = 4  # of one reader: a block's tensors mostly lie in one file, and checkpoints have hundreds


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


class BlockReader:
    """A checkpoint's blocks, read straight to where they belong: no second copy at any time. For one thread."""

    def __init__(self, checkpoint: Checkpoint, files: Identities | None = None) -> None:
        """`files` are what its files must be for as long as they are read; None where that is not known."""
        self._checkpoint = checkpoint
        self._files = files
        self._descriptors: dict[int, int] = {}

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
            self._check_unchanged(run.file)
        return digest.digest()

    def _check_unchanged(self, file: int) -> None:
        """What was read until now was the content that was told: whoever writes to a file changes its times first."""
        if self._files is not None and identity_of(os.fstat(self._descriptors[file])) != self._files[file]:
            raise CheckpointError(
                f"{self._checkpoint.path(file)} was replaced or written to while it was read: what came of it is not "
                "used; exchange files by renaming whole ones, and leave them alone then"
            )

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
        if file not in self._descriptors:
            if len(self._descriptors) >= FILES_OPEN_MAX:
                self.close()
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
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

"""What a model's bytes are, in sixteen of them: the content digest, which keeps two fine-tunes apart.

Checkpoints of one model have the same names, shapes and headers, and so the same manifest, whatever was trained into
them. Names decide nothing, then; bytes do. A digest of all bytes would take as long as loading them, so a *sample* is
taken of every tensor of every block: all of a small one, else one window at a place that the manifest alone decides.
Whoever takes it from the same content, from files or from memory, today or elsewhere, gets the same digest. Training
moves every tensor it touches, so a window tells; what it cannot tell, the checksums of whole blocks do, wherever two
parties hold the same block.

The digest is taken once, before the first byte is brought, and is then what everything that moves is held against.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial

import numpy as np
import xxhash

from shm.block import BlockSchema
from shm.manifest import Manifest
from transfer.checkpoint.checkpoint import Checkpoint
from transfer.errors import CheckpointError

WINDOW_NBYTES = 4096  # of each tensor: what a disk reads at least, and more than chance or a frozen row leaves alike
WINDOW_ALIGNMENT = 64
READ_THREADS = 16  # windows lie far apart: what is waited for is the disk, or the network behind it
DIGEST_NBYTES = 16
FRESH_S = 0.05  # a file system's clock ticks every 4 ms, or 10: two writes within one tick have one time

Read = Callable[[int, int], bytes]
"""(offset in the block, nbytes) → those bytes."""


def windows(schema: BlockSchema, row: int) -> list[tuple[int, int, int]]:
    """Of each tensor of manifest row `row`: (its number in the schema, first byte of the sample in it, nbytes)."""
    return [(number, *_window(t.name, t.nbytes, row)) for number, t in enumerate(schema.tensors)]


def _window(name: str, nbytes: int, row: int) -> tuple[int, int]:
    if nbytes <= WINDOW_NBYTES:
        return 0, nbytes
    places = (nbytes - WINDOW_NBYTES) // WINDOW_ALIGNMENT + 1
    return (_seed(name) + row * 0x9E3779B97F4A7C15) % (1 << 64) % places * WINDOW_ALIGNMENT, WINDOW_NBYTES


@lru_cache(maxsize=1 << 12)
def _seed(name: str) -> int:
    return xxhash.xxh3_64_intdigest(name.encode())


def sample(manifest: Manifest, row: int, read: Read) -> bytes:
    """The digest of a block's sample: 16 bytes."""
    schema = manifest.schema(row)
    taken = xxhash.xxh3_128()
    for number, at, nbytes in windows(schema, row):
        taken.update(read(schema.tensors[number].offset + at, nbytes))
    return taken.digest()


def sample_of(manifest: Manifest, row: int, block: memoryview) -> bytes:
    """The same of a block in memory, `manifest.nbytes[row]` bytes."""
    return sample(manifest, row, lambda offset, nbytes: bytes(block[offset : offset + nbytes]))


@dataclass(frozen=True, slots=True, eq=False)
class Content:
    """One content of a model, known from all of its blocks."""

    manifest: Manifest
    samples: bytes = field(repr=False)
    """16 bytes a manifest row."""

    @property
    def digest(self) -> bytes:
        """The content digest, 16 bytes: of the manifest, and of every block's sample."""
        return xxhash.xxh3_128_digest(bytes.fromhex(self.manifest.digest) + self.samples)

    def has(self, row: int, block: memoryview) -> bool:
        """Whether a block's bytes are of this content, as far as its sample tells."""
        at = row * DIGEST_NBYTES
        return sample_of(self.manifest, row, block) == self.samples[at : at + DIGEST_NBYTES]


def read_content(checkpoint: Checkpoint) -> Content:
    """Take the samples of all blocks of a checkpoint from its files. Raises CheckpointError."""
    with ThreadPoolExecutor(READ_THREADS, "hotspare-sample") as pool:
        rows = np.array_split(np.arange(len(checkpoint.manifest)), READ_THREADS * 4)
        parts = pool.map(partial(_samples, checkpoint), rows)
        return Content(checkpoint.manifest, b"".join(parts))


def _samples(checkpoint: Checkpoint, rows: Iterable[int]) -> bytes:
    with closing(_Files(checkpoint)) as files:
        return b"".join(files.sample(int(row)) for row in rows)


class _Files:
    """The files of a checkpoint, the one that was read last kept open. For one thread."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._open: tuple[int, int] | None = None

    def close(self) -> None:
        if self._open is not None:
            os.close(self._open[1])
            self._open = None

    def sample(self, row: int) -> bytes:
        manifest = self._checkpoint.manifest
        schema, first = manifest.schema(row), int(manifest.rows["first_range"][row])
        places = manifest.ranges[first : first + len(schema.tensors)][["file", "offset"]].tolist()
        taken = xxhash.xxh3_128()
        for number, at, nbytes in windows(schema, row):
            file, offset = places[number]
            taken.update(self._read(file, offset + at, nbytes))
        return taken.digest()

    def _read(self, file: int, offset: int, nbytes: int) -> bytes:
        try:
            read = os.pread(self._descriptor(file), nbytes, offset)
        except OSError as error:
            raise CheckpointError(f"{self._checkpoint.path(file)} cannot be read: {error}") from error
        if len(read) < nbytes:
            raise CheckpointError(
                f"{self._checkpoint.path(file)} ends before byte {offset + nbytes:,}: was it cut short after its "
                "header was read? Download it again"
            )
        return read

    def _descriptor(self, file: int) -> int:
        if self._open is not None and self._open[0] == file:
            return self._open[1]
        self.close()
        descriptor = os.open(self._checkpoint.path(file), os.O_RDONLY | os.O_CLOEXEC)
        self._open = file, descriptor
        with suppress(OSError):  # only advice: reading ahead would be for nothing
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        return descriptor


Identities = Mapping[int, tuple[int, ...]]


def identities(checkpoint: Checkpoint) -> Identities:
    """File number → what a file's identity is: it changes when the file is replaced or written to.

    Device, inode, size, and when its bytes and when its entry last changed: a copy that keeps the time of its original,
    in an inode that was used before, still has an entry of its own age. Raises CheckpointError.
    """
    found = {}
    for number in range(len(checkpoint.manifest.files)):
        path = checkpoint.path(number)
        try:
            found[number] = identity_of(os.stat(path))
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
    return found


def identity_of(stat: os.stat_result) -> tuple[int, ...]:
    """The identity in what `os.stat` or `os.fstat` says."""
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def origin_of(files: Identities) -> bytes:
    """16 bytes that differ where any file's identity does: what a segment remembers of the files it was filled from."""
    return xxhash.xxh3_128_digest(repr(sorted(files.items())).encode())


@dataclass(frozen=True, slots=True, eq=False)
class PinnedCheckpoint:
    """A checkpoint as it was when its content was told: whoever reads it later can see whether it still is."""

    checkpoint: Checkpoint
    digest: bytes
    """The content digest of what its files held then."""
    files: Identities
    content: Content | None = None
    """The samples of its blocks; None where they were not taken, since the files are those of an earlier time."""

    @property
    def origin(self) -> bytes:
        return origin_of(self.files)

    def is_unchanged(self) -> bool:
        """Whether its files still are the very files. Raises CheckpointError where one is gone."""
        return identities(self.checkpoint) == self.files


def pin(checkpoint: Checkpoint) -> PinnedCheckpoint:
    """Take the content of a checkpoint. Raises CheckpointError, also where its files change meanwhile.

    A file that was changed just now could change once more without another identity: so it is given time to grow old.
    """
    before = identities(checkpoint)
    newest_s = max((times / 1e9 for *_, written, entered in before.values() for times in (written, entered)), default=0)
    if 0 <= (age_s := time.time() - newest_s) < FRESH_S:
        time.sleep(FRESH_S - age_s)
    content = read_content(checkpoint)
    if identities(checkpoint) != before:
        raise CheckpointError(
            f"{checkpoint.directory} changed while it was read: wait until whoever writes it has finished"
        )
    return PinnedCheckpoint(checkpoint, content.digest, before, content)

"""Whether a segment's content came from the checkpoint that is on disk now.

Two checkpoints of one model, say a base and its fine-tune, have the same headers and so the same manifest. The files'
identity (device, inode, size, time of change) settles it for nothing where they are still the same files. In doubt a
sample of bytes is compared: fine-tuning moves every tensor, so a page of each block is more than enough.
"""

from __future__ import annotations

import os

import numpy as np
import xxhash

from shm.block import ExpertKey
from shm.segment import Segment
from transfer.checkpoint.checkpoint import Checkpoint
from transfer.errors import CheckpointError

SAMPLE_NBYTES = 4096  # of each sampled block
SAMPLED_BLOCKS_MAX = 4096


def identity(checkpoint: Checkpoint) -> bytes:
    """16 bytes that differ when any file was replaced, changed or touched. Raises CheckpointError."""
    digest = xxhash.xxh3_128()
    for number, file in enumerate(checkpoint.manifest.files):
        path = checkpoint.path(number)
        try:
            stat = os.stat(path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        digest.update(f"{file.name}\0{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}\n".encode())
    return digest.digest()


def first_difference(checkpoint: Checkpoint, segment: Segment) -> ExpertKey | None:
    """Compare a sample of the published blocks with the files; the first block that differs. Raises CheckpointError."""
    published = segment.published()
    step = max(1, -(-len(published) // SAMPLED_BLOCKS_MAX))
    for row in map(int, published[::step]):
        tensors = checkpoint.manifest.block(row).tensors
        tensor = max(tensors, key=lambda t: t.nbytes)
        at = (tensor.nbytes // 2) // SAMPLE_NBYTES * SAMPLE_NBYTES
        size = min(SAMPLE_NBYTES, tensor.nbytes - at)
        ours = segment.block(row)[tensor.offset + at : tensor.offset + at + size]
        if bytes(ours) != _read(checkpoint, tensor.file, tensor.file_offset + at, size):
            return checkpoint.manifest.keys[row]
    return None


def _read(checkpoint: Checkpoint, file: int, offset: int, nbytes: int) -> bytes:
    path = checkpoint.path(file)
    try:
        return np.fromfile(path, np.uint8, nbytes, offset=offset).tobytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error

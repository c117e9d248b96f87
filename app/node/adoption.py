"""The checkpoint directory that a node was given, and which content it has now.

Files may be exchanged or overwritten at any time, a minute before the node starts or in the middle of a fill. So
nothing is concluded from the directory's name: its content is told from bytes, once, and then held to by the files'
identity (`transfer.checkpoint.content`). A restart has to be quick, and parsing the headers of DeepSeek-V3 takes a
second or two: where a segment remembers the very files that are there, neither headers nor samples are read again.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

from shm.manifest import Manifest
from shm.segment import Segment
from transfer.checkpoint import Checkpoint, changed_files, read_checkpoint
from transfer.checkpoint.content import PinnedCheckpoint, identities, origin_of, pin
from transfer.errors import CheckpointError

_log = logging.getLogger("hotspare.node")


class OwnCheckpoint:
    """A node's `--checkpoint`, looked at anew whenever it is to serve. Not thread-safe."""

    def __init__(self, directory: Path | None, model: str, include: Literal["experts", "all"]) -> None:
        self.directory = directory
        self._model = model
        self._include = include
        self._pinned: PinnedCheckpoint | None = None

    def _read(self, directory: Path) -> Checkpoint:
        checkpoint = read_checkpoint(str(directory), self._model, self._include)
        for name, why in checkpoint.left_out.items():
            _log.warning("%s is left out: %s", directory / name, why)
        for note in checkpoint.notes:
            _log.warning("%s: %s", directory, note)
        return checkpoint

    def pinned(self, segment: Segment) -> PinnedCheckpoint | None:
        """The directory as it is now, beside a segment that may have been filled from it; None without one.

        Raises CheckpointError where it cannot be read now.
        """
        if self.directory is None:
            return None
        if self._pinned is None or not self._pinned.is_unchanged():
            self._pinned = self._as_remembered(self.directory, segment) or pin(self._read(self.directory))
        return self._pinned

    def _as_remembered(self, directory: Path, segment: Segment) -> PinnedCheckpoint | None:
        """Where the files are those that the segment was filled from, its content is theirs."""
        header = segment.header
        if not segment.is_allocated or not any(header.content_digest) or segment.manifest.include != self._include:
            return None
        # A copy: a manifest on the segment's own pages would keep them mapped when the segment is given up.
        manifest = Manifest.from_bytes(segment.manifest.to_bytes(), segment.manifest.digest)
        checkpoint = Checkpoint(directory, manifest)
        try:
            files = identities(checkpoint)
            is_same = origin_of(files) == header.origin and not changed_files(directory, manifest)
        except CheckpointError:  # files may have other names now
            return None
        return PinnedCheckpoint(checkpoint, header.content_digest, files) if is_same else None

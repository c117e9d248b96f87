"""The checkpoint directory that a node was given, and whether what it holds is of it.

A restart has to be quick: parsing the headers of DeepSeek-V3 takes a second or two, which it has not. So they are read
only where the files are not those that the adopted manifest was made of, and bytes are compared only where the files'
identity leaves a doubt (`transfer.checkpoint.origin`).
"""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path
from typing import Literal

from shm.block import ExpertKey
from shm.manifest import Manifest
from shm.segment import Segment
from transfer.checkpoint import Checkpoint, changed_files, read_checkpoint
from transfer.checkpoint.origin import first_difference, identity
from transfer.errors import CheckpointError

_log = logging.getLogger("hotspare.node")


class OwnCheckpoint:
    """A node's `--checkpoint`, read when it is first needed, and looked for again where it could not be read."""

    def __init__(self, directory: Path | None, model: str, include: Literal["experts", "all"]) -> None:
        self.directory = directory
        self._model = model
        self._include = include
        self.read: Checkpoint | None = None
        """What was read of it; None before, and where there is none."""

    def open(self) -> Checkpoint | None:
        """Read its headers, once; None where the node has none. Raises CheckpointError."""
        if self.read is None and self.directory is not None:
            self.read = read_checkpoint(str(self.directory), self._model, self._include)
        return self.read

    def open_beside(self, manifest: Manifest) -> None:
        """The same for a node that has this manifest: headers are parsed only if they may be others. Never raises."""
        if self.directory is None:
            return
        try:
            self.read = self._unchanged(self.directory, manifest) or self.open()
        except CheckpointError as error:
            _log.warning("adopting the sealed segment without its checkpoint: %s", error)

    def _unchanged(self, directory: Path, manifest: Manifest) -> Checkpoint | None:
        with suppress(CheckpointError):  # also where files have other names now
            if manifest.include == self._include and not changed_files(directory, manifest):
                # A copy: a manifest on the segment's own pages would keep them mapped when the segment is given up.
                return Checkpoint(directory, Manifest.from_bytes(manifest.to_bytes(), manifest.digest))
        return None

    def serving(self, manifest: Manifest) -> Checkpoint | None:
        """The checkpoint as a source of this manifest's blocks; None where it is not there now, or another's."""
        try:
            checkpoint = self.open()
        except CheckpointError as error:
            _log.warning("the disk cannot serve: %s", error)
            return None
        return checkpoint if checkpoint is not None and checkpoint.manifest.digest == manifest.digest else None


def is_content_of(checkpoint: Checkpoint, segment: Segment) -> bool:
    """Whether the segment was filled from these files, or from others with the same bytes, as far as can be seen."""
    if checkpoint.manifest.digest != segment.manifest.digest:
        return False
    if (key := difference(checkpoint, segment)) is not None:
        _log.warning("%s differs between the segment and %s", key, checkpoint.directory)
    return key is None


def difference(checkpoint: Checkpoint, segment: Segment) -> ExpertKey | None:
    """The first block that differs from the files; None, with the files' identity noted, where none is seen to."""
    try:
        origin = identity(checkpoint)
        if segment.header.origin == origin:
            return None
        key = first_difference(checkpoint, segment)
    except CheckpointError as error:
        _log.warning("the content was not compared with the checkpoint: %s", error)
        return None
    if key is None:
        segment.record_origin(origin)
    return key

"""The checkpoint directory as an engine may have it: the source of last resort, and perhaps not there."""

from __future__ import annotations

from pathlib import Path

from shm.errors import HotspareError
from shm.manifest import Manifest
from transfer.checkpoint import Checkpoint, read_checkpoint
from transfer.checkpoint.content import PinnedCheckpoint, pin
from transfer.client.pinned_content import PinnedContent
from transfer.errors import CheckpointError, RestoreError

NAMELESS = "model"  # in the manifest of a checkpoint that nobody named


class LastResort:
    """Reads the directory's headers when they are first needed. Not thread-safe."""

    def __init__(self, directory: Path | str | None) -> None:
        self.is_given = directory is not None
        self._directory = None if directory is None else Path(directory)
        self._checkpoint: Checkpoint | None = None
        self._pinned: PinnedCheckpoint | None = None

    @property
    def has_files(self) -> bool:
        """Whether there is anything to read: a directory may hold a configuration alone."""
        return self._directory is not None and any(self._directory.glob("*.safetensors"))

    def files(self) -> list[Path]:
        """The checkpoint's files, also those without experts; none without a directory. Raises CheckpointError."""
        checkpoint = self._checkpoint or self.named(None)  # which of its manifests was read last is all the same
        return [] if checkpoint is None else [checkpoint.path(n) for n in range(len(checkpoint.manifest.files))]

    def named(self, model: str | None) -> Checkpoint | None:
        """The checkpoint, its experts only; None without a directory. Raises CheckpointError."""
        return self._read(model or NAMELESS, "experts")

    def of(self, manifest: Manifest, content: PinnedContent) -> PinnedCheckpoint:
        """The checkpoint, if it is the one of `manifest` and has that content. Raises CheckpointError.

        Its content is told from a sample of every tensor, taken when it is first needed.
        """
        checkpoint = self._read(manifest.model, manifest.include)
        if checkpoint is None:
            raise CheckpointError("no checkpoint directory was given")
        if checkpoint.manifest != manifest:
            raise CheckpointError(
                f"{self._directory} is not the checkpoint that the nodes keep: give that one, for nothing is read from "
                "another"
            )
        try:
            pinned = self._pin(checkpoint)
            content.agree(pinned.digest.hex(), str(self._directory))
        except RestoreError as error:
            raise CheckpointError(str(error)) from error
        return pinned

    def _pin(self, checkpoint: Checkpoint) -> PinnedCheckpoint:
        if self._pinned is None or self._pinned.checkpoint is not checkpoint or not self._pinned.is_unchanged():
            self._pinned = pin(checkpoint)
        return self._pinned

    def _read(self, model: str, include: str) -> Checkpoint | None:
        if self._directory is None:
            return None
        held = self._checkpoint
        if held is None or (held.manifest.model, held.manifest.include) != (model, include):
            try:
                held = read_checkpoint(self._directory, model, "all" if include == "all" else "experts")
            except HotspareError as error:
                raise CheckpointError(f"the disk cannot serve: {error}") from error
            self._checkpoint = held
        return held

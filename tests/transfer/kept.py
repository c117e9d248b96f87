"""A sealed segment of a whole checkpoint, held by this process as a node's daemon would, and no node beside it."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shm.layout import SegmentName
from shm.segment import Segment
from transfer import Loader
from transfer.checkpoint import read_checkpoint
from transfer.checkpoint.content import pin
from transfer.checkpoint.reader import BlockReader

NOBODY = "http://127.0.0.1:9"  # the discard port: nothing listens


class Kept:
    """The blocks of those manifest rows."""

    def __init__(self, directory: Path, include: Any, rows: Callable[[int], bool]) -> None:
        self.directory = directory
        checkpoint = read_checkpoint(directory, "tiny", include)
        self.manifest = checkpoint.manifest
        self.name = SegmentName(f"test-{secrets.token_hex(6)}", "tiny", "here")
        self.segment = Segment.claim(self.name)
        held = [row for row in range(len(self.manifest)) if rows(row)]
        self.segment.allocate(self.manifest, held)
        reader = BlockReader(checkpoint)
        for row in held:
            self.segment.publish(row, reader.read_block(row, self.segment.block(row)))
        reader.close()
        self.content_digest = pin(checkpoint).digest
        self.segment.record_content(self.content_digest)
        self.segment.seal()

    def loader(self, checkpoint: Path | None) -> Loader:
        return Loader(NOBODY, model="tiny", namespace=self.name.namespace, checkpoint=checkpoint)

"""A sealed segment of a small model, held by this process as a node's daemon would, and no node beside it."""

from __future__ import annotations

import secrets
from collections.abc import Collection
from typing import Any

from shm.block import ExpertKey
from shm.checksum import checksum
from shm.layout import SegmentName
from shm.segment import Segment
from tests.transfer.slots.checkpoints import Model
from transfer import Restorer

NOBODY = "http://127.0.0.1:9"  # the discard port: nothing listens


class Keeper:
    """`fill` makes the segment, and again another one under its name."""

    def __init__(self, model: Model, engine: Any, absent: Collection[ExpertKey] = ()) -> None:
        self.engine = engine
        self.name = SegmentName(f"test-{secrets.token_hex(6)}", "tiny", "here")
        self.fill(model, absent)

    def fill(self, model: Model, absent: Collection[ExpertKey] = (), content: bytes = b"the first of all") -> None:
        manifest = model.manifest
        rows = [row for row, key in enumerate(manifest.keys) if key not in absent]
        self.segment = Segment.claim(self.name)
        self.segment.allocate(manifest, rows)
        for row in rows:
            block = self.segment.block(row)
            block[:] = model.block(manifest.keys[row])
            self.segment.publish(row, checksum(block))
        self.segment.record_content(content)
        self.segment.seal()

    def restorer(self, **options: Any) -> Restorer:
        # Starting an engine takes a second, so tests share one.
        options = {"engine": self.engine, **options}
        return Restorer(NOBODY, model="tiny", namespace=self.name.namespace, **options)

"""A consumer's slots as the destination of a restore, and what this node can send to them: its memory, its disk.

Peers that write to the consumer themselves are asked over HTTP: that source is in `app.restores.pushes`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

from shm.block import TENSOR_ALIGNMENT, ExpertKey
from shm.errors import BlockUnavailable, HotspareError
from transfer.engine import TransferEngine
from transfer.errors import TransferFailed
from transfer.memory import view
from transfer.plan import Batch, Limits, Piece, Want
from transfer.push.writer import BlockMemory, Health, WriteFailed, Writer, buffer, push
from transfer.sources import DiskSource, SourceKind

PUSH_NBYTES = 64 << 20  # of blocks in one push, unless one block is larger
PUSH_BLOCKS_MAX = 1024
PUSH_LANES = max(2, min(6, (os.cpu_count() or 2) // 2))  # some on the wire while the next are verified

IN_SLOTS = 0
"""The destination of a want's one piece: the consumer's slots, found by the want's row."""


def want_of(row: int, nbytes: int, expected: bytes | None) -> Want:
    """A block for the slots of a consumer."""
    return Want(row, nbytes, (Piece(IN_SLOTS, 0, nbytes),), expected)


@dataclass(slots=True)
class PushJob:
    """What the sources of one restore share. `hold` keeps the registration from being taken back during a push;
    `report_corrupt` is told the experts whose bytes in our own memory are wrong."""

    writer: Writer
    health: Health = field(default_factory=Health)
    reasons: dict[int, str] = field(default_factory=dict)
    hold: Callable[[], AbstractContextManager[None]] = nullcontext
    report_corrupt: Callable[[Sequence[ExpertKey]], None] = lambda keys: None

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Around every push: refuses it if the consumer is gone, and notes if it is."""
        self.health.check()
        with self.hold():
            try:
                yield
            except WriteFailed as error:
                self.health.note(error)
                raise

    def settle(self, pushed: Mapping[int, bytes], failed: Mapping[int, str]) -> dict[int, bytes]:
        """Note what a push came to; the checksums of what is in place."""
        self.reasons.update(failed)
        if pushed:
            self.health.note(None)
        return dict(pushed)


class PushDestination:
    """The consumer's slots as a restore sees them: what a source did not vouch for is not there."""

    def __init__(self, job: PushJob) -> None:
        self._job = job

    def begin(self, want: Want) -> None:
        """Nothing: the consumer learns from the report which slots are good."""

    def checksum(self, want: Want) -> bytes:
        raise BlockUnavailable(self._job.reasons.pop(want.row, "it was not sent"))

    def publish(self, want: Want, checksum: bytes) -> None:
        """Nothing: it is in place."""


class MemoryPush:
    """Blocks of our own segment."""

    kind = SourceKind.LOCAL
    limits = Limits(PUSH_BLOCKS_MAX, PUSH_NBYTES)
    lanes = PUSH_LANES
    writes = True

    def __init__(self, name: str, memory: BlockMemory, job: PushJob) -> None:
        self.name = name
        self._memory = memory
        self._job = job

    def fetch(self, batch: Batch) -> Mapping[int, bytes]:
        with self._job.writing():
            try:
                outcome = push(self._memory, self._job.writer, {want.row: want.checksum for want in batch.wants})
            except HotspareError:
                raise
            except Exception as error:  # the segment was renewed under us
                raise TransferFailed(f"{type(error).__name__}: {error}") from error
        if outcome.is_corrupt:
            self._job.report_corrupt([self._memory.manifest.keys[row] for row in sorted(outcome.is_corrupt)])
        return self._job.settle(outcome.pushed, outcome.failed)

    def close(self) -> None:
        """Nothing is open."""


class DiskPush:
    """Blocks of the checkpoint, by way of a registered buffer."""

    kind = SourceKind.DISK
    limits = Limits(PUSH_BLOCKS_MAX, PUSH_NBYTES)
    lanes = PUSH_LANES
    writes = True

    def __init__(self, name: str, disk: DiskSource, engine: TransferEngine, job: PushJob) -> None:
        self.name = name
        self._disk = disk
        self._engine = engine
        self._job = job

    def position(self, row: int) -> int:
        return self._disk.position(row)

    def fetch(self, batch: Batch) -> Mapping[int, bytes]:
        spans = [-(-want.nbytes // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT for want in batch.wants]
        with self._job.writing(), buffer(self._engine, sum(spans)) as address:
            good: dict[int, bytes] = {}
            wrong: dict[int, str] = {}
            blocks: list[tuple[int, int]] = []
            for want, span in zip(batch.wants, spans, strict=True):
                taken = self._disk.read_block(want.row, view(address, want.nbytes))
                if want.checksum in (None, taken):
                    good[want.row] = taken
                    blocks.append((want.row, address))
                else:
                    wrong[want.row] = f"checksum {taken.hex()} on disk: its file has changed"
                address += span
            wrong |= self._job.writer.write(blocks) if blocks else {}
        return self._job.settle({row: taken for row, taken in good.items() if row not in wrong}, wrong)

    def close(self) -> None:
        self._disk.close()

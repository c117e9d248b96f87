"""A consumer's memory as the destination of a restore: this node writes there, out of registered memory of its own.

What lies in the node's segment is sent from where it lies; what comes from elsewhere, from a registered buffer. Every
block is verified before it is sent, so that no rotten one gets into a slot, and once more after it: a node may be
stopped in between for any time, and what rots meanwhile is sent as it is, and reads back as it was sent. Peers that
write to the consumer themselves are asked over HTTP (`app.restores.pushes`), and share this destination for whether the
consumer answers, and what was said of a block.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

from shm.block import TENSOR_ALIGNMENT
from shm.checksum import checksum
from shm.errors import BlockUnavailable
from transfer.destination import Landing, Resident
from transfer.engine import TransferEngine
from transfer.memory import view
from transfer.plan import Limits, Piece, Want
from transfer.push.writer import Health, WriteFailed, Writer, buffer, keep_for_ever

PUSH_NBYTES = 64 << 20
# Of one push, unless one block is larger. Each is a request, or registers a buffer: the last ones are no smaller.
PUSH_LIMITS = Limits(1024, PUSH_NBYTES, last_nbytes=PUSH_NBYTES)
PUSH_PIECE_NBYTES = 16 << 20  # of our own memory: what is recalled ends between two of them
PUSH_LANES = max(2, min(6, (os.cpu_count() or 2) // 2))  # some on the wire while the next are verified
NOT_SENT = "it is not published there, or was withdrawn while it was sent"
CHANGED_MEANWHILE = "its bytes changed at the source while they were sent: restore that node to mend it"


class ConsumerDestination:
    """The consumer's slots as a restore sees them: what a source did not vouch for is not there.

    `hold` keeps the registration from being taken back during a push; `report_corrupt` is told the rows whose bytes in
    our own memory are wrong.
    """

    def __init__(
        self,
        writer: Writer,
        engine: TransferEngine,
        *,
        hold: Callable[[], AbstractContextManager[None]] = nullcontext,
        report_corrupt: Callable[[Sequence[int]], None] = lambda rows: None,
    ) -> None:
        self.writer = writer
        self.health = Health()
        self._engine = engine
        self._hold = hold
        self._report_corrupt = report_corrupt
        self._reasons: dict[int, str] = {}

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Around every push: refuses it if the consumer is gone, and notes if it is."""
        self.health.check()
        with self._hold():
            try:
                yield
            except WriteFailed as error:
                self.health.note(error)
                raise

    def note(self, pushed: Mapping[int, bytes], failed: Mapping[int, str]) -> dict[int, bytes]:
        """What a push came to; the checksums of what is in place."""
        self._reasons.update(failed)
        if pushed:
            self.health.note(None)
        return {row: taken for row, taken in pushed.items() if row not in failed}

    def reason(self, row: int) -> str:
        """Why a block that was asked for is not in place."""
        return self._reasons.pop(row, NOT_SENT)

    # -- as a destination ------------------------------------------------------------------------------------

    def take(self, blocks: Sequence[Resident]) -> Mapping[int, bytes]:
        """The blocks lie in registered memory of ours."""
        wrong: dict[int, str] = {}
        corrupt: list[int] = []
        with self.writing():
            for want, address, recorded, _ in blocks:
                if want.checksum not in (None, recorded):
                    said = (want.checksum or b"").hex()
                    wrong[want.row] = f"it has checksum {recorded.hex()} on record, not {said}: it is of other content"
                elif checksum(view(address, want.nbytes)) != recorded:
                    corrupt.append(want.row)
                    wrong[want.row] = "its bytes do not match its checksum at the source: restore that node to mend it"
            good = [block for block in blocks if block.want.row not in wrong]
            try:
                failed = self._write([(want, address, recorded) for want, address, recorded, _ in good])
                corrupt += [row for row, why in failed.items() if why == CHANGED_MEANWHILE]
            except WriteFailed as error:
                if error.is_unsettled:
                    keep_for_ever(kept for block in good for kept in block.kept_by)
                raise
            finally:
                if corrupt:
                    self._report_corrupt(corrupt)
        return self.note({block.want.row: block.checksum for block in good}, wrong | failed)

    def landings(self, wants: Sequence[Want], *, in_one_run: bool) -> Iterator[AbstractContextManager[Landing]]:
        yield self._in_buffer(wants)

    @contextmanager
    def _in_buffer(self, wants: Sequence[Want]) -> Iterator[Landing]:
        spans = [-(-want.nbytes // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT for want in wants]
        with self.writing(), buffer(self._engine, sum(spans)) as start:
            pieces: dict[int, tuple[Piece, ...]] = {}
            for want, span in zip(wants, spans, strict=True):
                pieces[want.row] = (Piece(start, 0, want.nbytes),)
                start += span
            yield Landing(pieces, partial(self._send, wants, pieces))

    def _send(
        self,
        wants: Sequence[Want],
        pieces: Mapping[int, tuple[Piece, ...]],
        taken: Mapping[int, bytes],
        lost: Collection[int],
    ) -> Mapping[int, bytes]:
        good: dict[int, bytes] = {}
        wrong: dict[int, str] = {}
        for want in (want for want in wants if want.row not in lost):
            (piece,) = pieces[want.row]
            has = taken.get(want.row) or checksum(view(piece.destination, piece.nbytes))
            if want.checksum in (None, has):
                good[want.row] = has
            else:
                wrong[want.row] = f"checksum {has.hex()} at its source: its file, or that node's memory, has changed"
        sent = [(want, pieces[want.row][0].destination, good[want.row]) for want in wants if want.row in good]
        return self.note(good, wrong | self._write(sent))

    def _write(self, blocks: Sequence[tuple[Want, int, bytes]]) -> dict[int, str]:
        """Write blocks given as (want, address, verified checksum); why those are not in place that are not."""
        if not blocks:
            return {}
        failed = self.writer.write([(want.row, address) for want, address, _ in blocks])
        changed = [want.row for want, at, verified in blocks if checksum(view(at, want.nbytes)) != verified]
        return failed | dict.fromkeys(changed, CHANGED_MEANWHILE)

    def checksum(self, want: Want) -> bytes:
        raise BlockUnavailable(self.reason(want.row))

    def publish(self, want: Want, checksum: bytes) -> None:
        """It is in place: the consumer learns from the report which slots are good."""

"""A rank's slots as the destination of a restore: taken from host memory, filled straight, or by way of staging.

Every way in takes the checksum where the block ends up, and leaves out a block that it could not bring whole: the
restore then asks for its checksum, and after that the next source.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial

from shm.block import TENSOR_ALIGNMENT
from shm.errors import BlockUnavailable
from transfer.destination import Landing, Resident
from transfer.engine import TransferEngine
from transfer.errors import TransferFailed
from transfer.plan import Piece, Want
from transfer.slots.host import SlotMemory
from transfer.slots.staging import Staging
from transfer.slots.table import SlotTable


class SlotDestination:
    """The slots as a restore sees them; tells `done` of each block that is in place and right."""

    def __init__(
        self,
        memory: SlotMemory,
        table: SlotTable,
        staging: Staging,
        done: Callable[[], None],
        *,
        engine: TransferEngine | None = None,
        is_straight: bool = False,
        stages_host: bool = False,
    ) -> None:
        """`engine` is the one that brings peers' bytes. With `is_straight` it writes to slots that allow it: they are
        registered, and it can be thrown away after a peer timed out, for otherwise that peer's bytes might arrive in a
        slot that has long had another expert. With `stages_host`, host memory passes through staging: for a device,
        where the segment could not be page-locked.
        """
        self._memory = memory
        self._table = table
        self._staging = staging
        self._done = done
        self._engine = engine
        self._is_straight = is_straight
        self._stages_host = stages_host

    # -- host memory -----------------------------------------------------------------------------------------

    def take(self, blocks: Sequence[Resident]) -> Mapping[int, bytes]:
        if not self._stages_host:
            return self._memory.put([(block.want.row, block.address) for block in blocks])
        checksums: dict[int, bytes] = {}
        address = {block.want.row: block.address for block in blocks}
        for group in _groups([block.want for block in blocks], self._staging.nbytes):
            with self._staging.take() as buffer:
                placed = _packed(buffer.address, group)
                for (row, to), want in zip(placed, group, strict=True):
                    ctypes.memmove(to, address[row], want.nbytes)
                checksums |= self._memory.put(placed)
        return checksums

    # -- landings --------------------------------------------------------------------------------------------

    def landings(self, wants: Sequence[Want], *, in_one_run: bool) -> Iterator[AbstractContextManager[Landing]]:
        is_straight = self._is_straight and not in_one_run
        straight = [want for want in wants if is_straight and self._table.is_direct(want.row)]
        if straight:
            yield self._in_slots(straight)
        if not in_one_run and len(straight) < len(wants):
            self._staging.prepare(self._engine)
        left = {want.row for want in straight}
        for group in _groups([want for want in wants if want.row not in left], self._staging.nbytes):
            yield self._in_buffer(group)

    @contextmanager
    def _in_slots(self, wants: Sequence[Want]) -> Iterator[Landing]:
        rows = [want.row for want in wants]
        pieces = {
            row: tuple(Piece(c.address, c.block_offset, c.run_nbytes) for c in self._table.by_slot(row)[0])
            for row in rows
        }
        yield Landing(pieces, partial(self._spread, rows))

    def _spread(self, rows: Sequence[int], taken: Mapping[int, bytes], lost: Collection[int]) -> Mapping[int, bytes]:
        here = [row for row in rows if row not in lost]
        for row in here:
            self._memory.spread(row)
        return self._memory.check(here)

    @contextmanager
    def _in_buffer(self, wants: Sequence[Want]) -> Iterator[Landing]:
        with self._staging.take() as buffer:
            placed = _packed(buffer.address, wants)
            pieces = {row: (Piece(to, 0, want.nbytes),) for (row, to), want in zip(placed, wants, strict=True)}
            try:
                yield Landing(pieces, partial(self._put, placed))
            except TransferFailed as error:
                buffer.is_retired = error.timed_out
                # Late bytes land in the buffer, never in a slot: to the restore this is a failure like any other.
                raise TransferFailed(str(error)) from error

    def _put(
        self, placed: Sequence[tuple[int, int]], taken: Mapping[int, bytes], lost: Collection[int]
    ) -> Mapping[int, bytes]:
        """What is in the slots then; of blocks with a checksum taken on the way, those that have it there too."""
        put = self._memory.put([(row, address) for row, address in placed if row not in lost])
        return {row: checksum for row, checksum in put.items() if taken.get(row, checksum) == checksum}

    # -- looking ---------------------------------------------------------------------------------------------

    def checksum(self, want: Want) -> bytes:
        """Asked for blocks that were left out, and once more for blocks that late bytes may have reached."""
        if want.checksum is None or not self._table.is_whole(want.row):
            raise BlockUnavailable("it was withdrawn while it was being copied")
        return self._memory.check([want.row])[want.row]

    def publish(self, want: Want, checksum: bytes) -> None:
        """A slot is good once the report says so."""
        self._done()


def _aligned(nbytes: int) -> int:
    return -(-nbytes // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT


def _groups(wants: Sequence[Want], nbytes: int) -> Iterator[list[Want]]:
    """The wants in as few groups as fit into `nbytes` bytes each, one behind the other."""
    group: list[Want] = []
    end = 0
    for want in wants:
        if group and end + _aligned(want.nbytes) > nbytes:
            yield group
            group, end = [], 0
        group.append(want)
        end += _aligned(want.nbytes)
    if group:
        yield group


def _packed(start: int, wants: Sequence[Want]) -> list[tuple[int, int]]:
    """(row, address) of the wanted blocks, one behind the other from `start` on."""
    placed = []
    for want in wants:
        placed.append((want.row, start))
        start += _aligned(want.nbytes)
    return placed

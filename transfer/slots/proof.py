"""Whether slots hold the bytes that they are said to hold: bytes decide, and no name of a layer, a kernel or a rank.

Which expert lies where, and how, an engine can only claim. A parameter may be named like another stack's, a map may be
of other ranks, a kernel may have shuffled rows with shape and dtype kept, and weights may be another fine-tune's: the
copy would be carried out all the same, and every checksum would match. So before the first byte is written, what lies
in the slots *now* is compared with what it is to be replaced by. One proved expert proves the layout of its layer's
parameters; all of them prove the map as well.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np

from shm.checksum import checksum
from transfer.memory import view
from transfer.slots.host import SlotMemory
from transfer.slots.mismatch import Reference, explain
from transfer.slots.plan import Layout
from transfer.slots.table import SlotTable

SAMPLE_EXPERTS = 4  # of each layout: its first, its last, and two between them
THREADS_MAX = 16  # a checksum reaches the memory's speed before that
BATCH_NBYTES_MAX = 256 << 20  # what a device takes the checksums of side by side
BATCHES_PER_THREAD = 4  # so that all end at about the same time


class Findings(NamedTuple):
    """Manifest rows by what was found: the slots hold the block, hold something else, or there was nothing to tell."""

    right: tuple[int, ...]
    wrong: tuple[int, ...]
    unknown: tuple[int, ...]


def sample(table: SlotTable, rows: Iterable[int]) -> list[int]:
    """A few of the rows of each layout, evenly spread."""
    alike: dict[Layout, list[int]] = defaultdict(list)
    for row in rows:
        alike[table.layout(row)].append(row)
    spread = (np.linspace(0, len(each) - 1, min(SAMPLE_EXPERTS, len(each))).round() for each in alike.values())
    chosen = zip(alike.values(), spread, strict=True)
    return sorted(each[at] for each, places in chosen for at in places.astype(int).tolist())


def compare(table: SlotTable, memory: SlotMemory, references: Mapping[int, Reference], rows: Sequence[int]) -> Findings:
    """Look at every slot of these rows. Raises EngineError for a device that fails.

    Of a block that the slots hold whole, the checksum on record is enough. Of parts there is none: those are compared
    with the block itself, where it lies in this host's memory.
    """
    told = {row for row in rows if row in references and (table.is_whole(row) or references[row].address is not None)}
    known = [row for row in rows if row in told]
    threads = max(1, min(THREADS_MAX, memory.lanes))
    verdicts: dict[int, bool | None] = dict.fromkeys(rows)
    with ThreadPoolExecutor(threads, "hotspare-prove") as pool:
        for part in pool.map(partial(_verdicts, table, memory, references), _batches(table, known, threads)):
            verdicts.update(part)
    return Findings(
        *(tuple(row for row, verdict in verdicts.items() if verdict is wanted) for wanted in (True, False, None))
    )


def _batches(table: SlotTable, rows: Sequence[int], threads: int) -> Iterator[list[int]]:
    sizes = table.manifest.nbytes[list(rows)].tolist()
    limit = min(BATCH_NBYTES_MAX, sum(sizes) // (threads * BATCHES_PER_THREAD))
    batch: list[int] = []
    nbytes = 0
    for row, size in zip(rows, sizes, strict=True):
        if batch and nbytes + size > limit:
            yield batch
            batch, nbytes = [], 0
        batch.append(row)
        nbytes += size
    if batch:
        yield batch


def _verdicts(
    table: SlotTable, memory: SlotMemory, references: Mapping[int, Reference], rows: Sequence[int]
) -> dict[int, bool | None]:
    taken = memory.check([row for row in rows if table.is_whole(row)])
    found: dict[int, bool | None] = {row: taken[row] == references[row].checksum for row in taken}
    for row in rows:
        if row not in taken:
            found[row] = _holds(table, memory, row, references[row])
    return found


def _holds(table: SlotTable, memory: SlotMemory, row: int, reference: Reference) -> bool | None:
    """Of parts of a block; None where the block that they were compared with is not right itself."""
    assert reference.address is not None
    if memory.holds(row, reference.address):
        return True
    block = view(reference.address, int(table.manifest.nbytes[row]))
    return False if checksum(block) == reference.checksum else None


class Proofs:
    """The layouts that were proved, of one content after the other. Not thread-safe."""

    def __init__(self) -> None:
        self._content: str | None = None
        self._layouts: set[Layout] = set()

    def begin(self, content: str | None) -> None:
        """What was proved of this very content stays so, for parameters that are where they were; all else is void."""
        if content is None or content != self._content:
            self._layouts.clear()
        self._content = content

    def prove(
        self, table: SlotTable, memory: SlotMemory, references: Mapping[int, Reference], rows: Sequence[int]
    ) -> Findings:
        """Look at these rows. Raises SlotMismatch, with what is wrong where, and then takes nothing for proved."""
        findings = compare(table, memory, references, rows)
        if findings.wrong:
            raise explain(table, memory, references, findings.wrong, len(findings.right))
        self.vouch(table, findings.right)
        return findings

    def vouch(self, table: SlotTable, rows: Iterable[int]) -> None:
        """Take the layouts of these rows for proved."""
        self._layouts.update(map(table.layout, rows))

    def lacking(self, table: SlotTable, rows: Iterable[int]) -> list[int]:
        """Those of the rows whose layout is not proved."""
        return [row for row in rows if table.layout(row) not in self._layouts]

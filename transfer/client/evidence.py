"""What speaks for a rank's slots: what their owner said when they were bound, and what their bytes have shown.

At bind everything is looked at that is not known to be lost. Where no node could be asked then, the first restore looks
at what it was not asked for: those experts are still in place. A layout that nothing speaks for is not written to.

Of slots with parts of each block, the block itself has to be at hand. Where none of a layer's is in this host's memory,
one is brought from a peer to be compared, or a second one where that cannot be had.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, get_args

from shm.block import ExpertKey
from shm.errors import InvalidInput
from transfer.client.bound_slots import BoundSlots
from transfer.client.report import ProofReport
from transfer.slots.mismatch import Reference
from transfer.slots.proof import Proofs, sample

BORROWED_MAX = 2  # blocks of each layout that are tried for: they come over the network

Borrow = Callable[[Sequence[int]], Iterable[tuple[int, Reference]]]
"""Brings blocks here by manifest row, each good until the next is asked for; leaves out what it cannot have."""
HowMuch = Literal["whole", "sample", "none"]
Lost = Literal["all"] | Iterable[tuple[int, int]] | Callable[[str], bool]
"""All experts, these (layer, expert), or those with a tensor whose checkpoint name is wanted."""

UNPROVED = (
    "nothing proves that the slots of this layer are laid out as described, so nothing is written there: bind while "
    "experts of it are in place and a node has them, and name in bind(…, lost=…) those that are lost, and no others; "
    "or vouch for the layout with bind(…, proof='none')"
)


class Evidence:
    """Of one rank's slots. `begin`, then `examine` once a model is known, then `lacking` before each restore."""

    def __init__(self) -> None:
        self._proofs = Proofs()
        self._how_much: HowMuch = "whole"
        self._lost: Callable[[BoundSlots, int], bool] = lambda bound, row: False

    def begin(self, lost: Lost, how_much: HowMuch) -> None:
        """What the owner says. Raises InvalidInput."""
        if how_much not in get_args(HowMuch):
            raise InvalidInput(f"proof={how_much!r}: give one of {', '.join(get_args(HowMuch))}")
        self._how_much, self._lost = how_much, _telling(lost)

    def examine(
        self,
        bound: BoundSlots,
        references: Callable[[], Mapping[int, Reference]],
        content: Callable[[], str | None],
        borrow: Borrow = lambda rows: (),
    ) -> ProofReport:
        """Look at all slots that are not lost. Raises SlotMismatch, EngineError.

        `references` gives what they should hold, and `content` its identity, which may be known only after that.
        """
        started, table = time.monotonic(), bound.table
        kept = [row for row in table.rows if not self._lost(bound, row)]
        looked: Sequence[int] = () if self._how_much == "none" else self._chosen(bound, kept)
        told = {} if self._how_much == "none" else references()
        self._proofs.begin(content())
        bound.memory.follow(wait=False)
        findings = self._proofs.prove(table, bound.memory, told, looked)
        right = [*findings.right, *self._prove_by_borrowed(bound, looked, borrow)]
        unproved = [] if self._how_much == "none" else self._proofs.lacking(table, table.rows)
        return ProofReport(
            experts_total=len(table.rows),
            experts_proved=len(right),
            experts_lost=len(table.rows) - len(kept),
            experts_unknown=len(set(findings.unknown).difference(right)),
            bytes_proved=int(bound.manifest.nbytes[right].sum()),
            seconds=time.monotonic() - started,
            unproved_layers=tuple(sorted({bound.manifest.keys[row].layer for row in unproved})),
        )

    def forget(self) -> None:
        """No model is known: whatever was proved was of another time."""
        self._proofs.begin(None)

    def lacking(
        self,
        bound: BoundSlots,
        rows: Sequence[int],
        references: Callable[[], Mapping[int, Reference]],
        asked: Iterable[int] = (),
        borrow: Borrow = lambda rows: (),
    ) -> list[int]:
        """Those of the rows whose layout nothing speaks for, once its slots that were not asked for are looked at.

        Raises SlotMismatch, EngineError.
        """
        table = bound.table
        lacking = [] if self._how_much == "none" else self._proofs.lacking(table, rows)
        if not lacking:
            return []
        layouts, taken = set(map(table.layout, lacking)), set(asked)
        others = [row for row in table.rows if row not in taken and table.layout(row) in layouts]
        looked = self._chosen(bound, [row for row in others if not self._lost(bound, row)])
        if looked:
            bound.memory.follow(wait=False)
            self._proofs.prove(table, bound.memory, references(), looked)
            self._prove_by_borrowed(bound, looked, borrow)
        return self._proofs.lacking(table, lacking)

    def _prove_by_borrowed(self, bound: BoundSlots, rows: Sequence[int], borrow: Borrow) -> list[int]:
        """Compare parts of blocks, of layouts that nothing spoke for yet, with blocks that are brought here.

        Returns the rows that were right. Raises SlotMismatch, EngineError.
        """
        table, right = bound.table, list[int]()
        untried = [row for row in rows if not table.is_whole(row)]
        for _ in range(BORROWED_MAX):
            chosen = {table.layout(row): row for row in reversed(self._proofs.lacking(table, untried))}
            for row, reference in borrow(list(chosen.values())) if chosen else ():
                right += self._proofs.prove(table, bound.memory, {row: reference}, [row]).right
            untried = [row for row in untried if row not in chosen.values()]
        return right

    def _chosen(self, bound: BoundSlots, rows: list[int]) -> list[int]:
        return sample(bound.table, rows) if self._how_much == "sample" else rows


def _telling(lost: Lost) -> Callable[[BoundSlots, int], bool]:
    """Whether the expert of a manifest row is lost."""
    if lost == "all":
        return lambda bound, row: True
    if callable(lost):
        return lambda bound, row: any(map(lost, bound.manifest.tensor_names(row)))
    keys = {ExpertKey(*key) for key in lost}
    return lambda bound, row: bound.manifest.keys[row] in keys

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from app.node.proofs import Proofs
from tests.clocks import Clock

ROWS = np.array([0, 2, 3])


@pytest.fixture
def proofs(clock: Clock) -> Proofs:
    return Proofs(5, clock)


def test_what_was_never_proved_comes_first_and_then_the_oldest(proofs: Proofs, clock: Clock) -> None:
    order = []
    for _ in range(6):
        row = proofs.next(ROWS)
        assert row is not None
        order.append(row)
        clock.now_s += 1
        proofs.note(row)
    assert order == [0, 2, 3, 0, 2, 3]


def test_of_no_rows_there_is_no_next(proofs: Proofs) -> None:
    assert proofs.next(ROWS[:0]) is None


def test_there_is_no_oldest_proof_while_one_is_missing(proofs: Proofs, clock: Clock) -> None:
    assert proofs.oldest(ROWS[:0]) is None
    proofs.note(0), proofs.note(2)
    assert (proofs.oldest(ROWS), proofs.unproved(ROWS)) == (None, 1)
    clock.now_s += 33
    proofs.note(3)
    assert proofs.unproved(ROWS) == 0
    oldest = proofs.oldest(ROWS)
    assert oldest is not None
    assert timedelta(seconds=33) <= datetime.now(UTC) - oldest < timedelta(seconds=333)
    assert proofs.unproved(np.arange(5)) == 2

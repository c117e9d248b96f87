"""What the ledger costs over a whole restore of DeepSeek-V3's size: 14,848 blocks on two nodes each."""

# ruff: noqa: T201 - what it prints is what it is for
from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transfer.ledger import Ledger
from transfer.plan import Limits, Offer, Want
from transfer.standing import Party

BLOCKS = 14_848
NBYTES = 44_050_944
NODES = 8
RUNS = 7
LANES = 2


def main() -> None:
    wants = [Want(row, NBYTES, bytes(16)) for row in range(BLOCKS)]
    offers = {
        w.row: [Offer(f"n{w.row % NODES}", w.row * NBYTES), Offer(f"n{(w.row + 3) % NODES}", w.row * NBYTES)]
        for w in wants
    }
    parties = {f"n{number}": Party(f"n{number}", 0, LANES, Limits()) for number in range(NODES)}
    taken = dict.fromkeys(range(BLOCKS), bytes(16))
    seconds = []
    for _ in range(RUNS):
        started = time.perf_counter()
        ledger = Ledger(wants, offers, parties)
        made = 0
        while batches := ledger.next(0.0).move:
            made += len(batches)
            for batch in batches:
                ledger.moved(batch, taken, 0.0)
        seconds.append(time.perf_counter() - started)
    print(f"{BLOCKS:,} blocks x 2 offers: {statistics.median(seconds) * 1e3:.0f} ms, best {min(seconds) * 1e3:.0f} ms")
    print(f"{made:,} batches, {len(parties)} sources")


if __name__ == "__main__":
    main()

"""What the ledger costs over a whole restore, DeepSeek-V3's by default: 14,848 blocks on two nodes each.

    python tests/bench/plan_figures.py [--blocks 14848] [--runs 7]

Counted is the processor's time of the one thread that there is: another process beside it changes that by little.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Hashable

from workbench import Figure, arguments, tell

from transfer.ledger import Ledger
from transfer.plan import Limits, Offer, Want
from transfer.standing import Party

NBYTES = 44_050_944
NODES = 8
LANES = 2


def main() -> None:
    options = arguments(__doc__, blocks=(14_848, "blocks to restore"), runs=(7, "runs, of which the median counts"))
    wants = [Want(row, NBYTES, bytes(16)) for row in range(options.blocks)]
    offers = {
        w.row: [Offer(f"n{w.row % NODES}", w.row * NBYTES), Offer(f"n{(w.row + 3) % NODES}", w.row * NBYTES)]
        for w in wants
    }
    parties: dict[Hashable, Party] = {f"n{number}": Party(f"n{number}", 0, LANES, Limits()) for number in range(NODES)}
    taken = dict.fromkeys(range(options.blocks), bytes(16))
    seconds = []
    for _ in range(options.runs):
        started = time.process_time()
        ledger = Ledger(wants, offers, parties)
        made = 0
        while batches := ledger.next(0.0).move:
            made += len(batches)
            for batch in batches:
                ledger.moved(batch, taken, 0.0)
        seconds.append(time.process_time() - started)
    median_s = statistics.median(seconds)
    what = f"the ledger, {options.blocks:,} blocks at 2 of {NODES} nodes, {made:,} batches"
    note = f"best {min(seconds) * 1e3:.0f} ms; {median_s / options.blocks * 1e6:.1f} us a block"
    tell([Figure(what, f"{median_s * 1e3:.0f} ms", note=note)], {"ledger_s": seconds}, as_json=options.json)


if __name__ == "__main__":
    main()

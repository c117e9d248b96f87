"""The stretches of a restore add up to the whole, and overlapping lanes are not counted twice."""

from __future__ import annotations

import runpy
from typing import Any

from tests.processes import ROOT

TIMELINE: dict[str, Any] = runpy.run_path(str(ROOT / "tests" / "bench" / "timeline.py"))
Times, stretches, tell = TIMELINE["Times"], TIMELINE["stretches"], TIMELINE["tell"]


def test_the_stretches_add_up_to_the_whole_and_the_bus_is_counted_once() -> None:
    of = stretches([Times(3, 10, 12, 13), Times(9, 15, 18, 18.5), Times(21, 30, 31, 31.25)], 33.0)
    assert (of.before_the_first_copy, of.bus_busy, of.bus_idle_between_copies) == (3, 21, 6)
    assert (of.checksums_after_the_last_copy, of.after_the_last_checksum) == (1, 2)
    assert sum(of[:5]) == 33
    assert (of.a_batch_from_copied_to_checked, of.a_batch_from_checked_to_noticed, of.batches) == (2, 0.5, 3)


def test_medians_are_told_beside_the_bare_copy() -> None:
    runs = [stretches([Times(begun, 20, 21, 22)], 25) for begun in (1, 2, 9)]
    lines = tell(runs, 17.5).splitlines()
    assert lines[1].split() == [*["before", "the", "first", "copy"], "2.00", "ms"]
    assert lines[-1].split()[-2:] == ["17.50", "ms"]

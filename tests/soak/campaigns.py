"""The campaigns by name, and what a run of one is: rounds, each drawn from (campaign, seed, its number) alone."""

from __future__ import annotations

import random
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from tests.soak import contents, flips, hostile, kills, objects, pauses
from tests.soak.ground import Ground
from tests.soak.tally import Tally

ROUND_S = 40.0  # of those campaigns whose rounds go on for as long as they are told

Round = Callable[[Ground, random.Random, Tally, float, Path | None], None]

CAMPAIGNS: Mapping[str, Round] = {
    "pauses": pauses.run_round,
    "given-back": partial(pauses.run_round, word="unregister"),
    "deleted": partial(pauses.run_round, word="DELETE"),
    "slow": pauses.run_slow_round,
    "flips": flips.run_round,
    "contents": contents.run_round,
    "kills": kills.run_round,
    "hostile": hostile.run_round,
    "objects": objects.run_round,
}


def run_campaign(
    ground: Ground,
    name: str,
    seed: int,
    *,
    minutes: float = 0.0,
    only: int | None = None,
    round_s: float = ROUND_S,
    keep: Path | None = None,
) -> Tally:
    """Rounds until the minutes are over, one at least; or `only` that one. The history of those that found something
    wrong is printed."""
    tally = Tally(name, seed)
    end = time.monotonic() + 60 * minutes
    number = only or 0
    try:
        while True:
            _run_round(ground, tally, number, round_s, keep)
            number += 1
            if only is not None or time.monotonic() > end:
                return tally
    finally:
        tally.tell()


def _run_round(ground: Ground, tally: Tally, number: int, round_s: float, keep: Path | None) -> None:
    tally.begin(number)
    found = len(tally.violations)
    chance = random.Random(f"{tally.campaign} {tally.seed} {number}")
    try:
        CAMPAIGNS[tally.campaign](ground, chance, tally, round_s, keep and keep / f"{tally.campaign}-{number}")
    except Exception as error:  # a process that ended, or something that never became so
        traceback.print_exc()
        tally.violation(f"{type(error).__name__}: {error}")
    if len(tally.violations) > found:
        tally.tell_history()

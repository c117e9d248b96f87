"""Randomised campaigns from a seed: rounds of one, one after the other, until their minutes are over.

    python -m tests.soak [CAMPAIGN…] [--seed N] [--minutes M] [--round N]

Each round is drawn from seed and number alone, so that one can be run again without those before it. Ends with 1 where
anything was found wrong.
"""

# ruff: noqa: T201 - what it prints is what it is for
from __future__ import annotations

import argparse
import secrets
import sys
from pathlib import Path

from tests.soak.campaigns import CAMPAIGNS, run_campaign
from tests.soak.ground import Ground, interrupt_on_sigterm
from tests.soak.slow_link import why_not

SEED_MAX = 1 << 32
INTERRUPTED = 130


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("campaigns", nargs="*", default=[], help=f"of {', '.join(CAMPAIGNS)} [default: all]")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(SEED_MAX))
    parser.add_argument("--minutes", type=float, default=5.0, help="of each campaign [default: 5]")
    parser.add_argument("--round", type=int, help="only this round")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where to put the nodes' logs")
    options = parser.parse_args()
    if unknown := set(options.campaigns) - set(CAMPAIGNS):
        parser.error(f"no campaign called {', '.join(sorted(unknown))}: choose of {', '.join(CAMPAIGNS)}")
    names = list(options.campaigns or CAMPAIGNS)
    if "slow" in names and (reason := why_not()):
        print(f"slow: left out: {reason}", flush=True)
        names.remove("slow")
    interrupt_on_sigterm()
    found = 0
    with Ground() as ground:
        for name in names:
            tally = run_campaign(
                ground, name, options.seed, minutes=options.minutes, only=options.round, keep=options.keep
            )
            found += len(tally.violations)
    return 1 if found else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)

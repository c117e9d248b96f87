"""What a campaign did, what it compared, and what it found wrong: printed for people, one line a violation."""

# ruff: noqa: T201 - what it prints is what it is for
from __future__ import annotations

import time
from collections import Counter

VIOLATION_CHARS_MAX = 2000


class Tally:
    """One campaign's. Each violation says in which round and when, so that it can be seen again."""

    def __init__(self, campaign: str, seed: int) -> None:
        self.campaign = campaign
        self.seed = seed
        self.done: Counter[str] = Counter()
        self.compared: Counter[str] = Counter()
        self.violations: list[str] = []
        self._round = 0
        self._history: list[str] = []
        self._began_s = time.monotonic()
        print(f"{campaign}: seed {seed}", flush=True)

    def begin(self, number: int) -> None:
        """A round begins."""
        self._round, self._history, self._began_s = number, [], time.monotonic()
        self.did("rounds")

    @property
    def _moment(self) -> str:
        return f"{time.monotonic() - self._began_s:.2f} s"

    def did(self, what: str, count: int = 1) -> None:
        self.done[what] += count

    def note(self, what: str) -> None:
        """For the history of a violation: what was done before it. Also counted, by its first word."""
        self.did(what.split()[0])
        self._history.append(f"{self._moment} {what}")

    def compare(self, what: str, count: int = 1) -> None:
        self.compared[what] += count

    def violation(self, what: str) -> None:
        line = (
            f"VIOLATION {self.campaign} at {self._moment} of round {self._round}: {' '.join(what.split())}"
        )[:VIOLATION_CHARS_MAX]  # fmt: skip
        again = f"make soak CAMPAIGNS={self.campaign} SEED={self.seed} ROUND={self._round}"
        self.violations.append(f"{line} [again: {again}]")
        self._history.append(self.violations[-1])
        print(self.violations[-1], flush=True)

    def tell_history(self) -> None:
        """Print what the round did until now."""
        for line in self._history:
            print(f"    {line}", flush=True)

    def tell(self) -> None:
        """The counts, at the end."""
        print(f"{self.campaign}: did {_listed(self.done)}")
        print(f"{self.campaign}: compared {_listed(self.compared)}")
        print(f"{self.campaign}: {len(self.violations)} violations", flush=True)


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in sorted(counts.items())) or "nothing"

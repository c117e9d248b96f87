"""What the demo shows: a line for each step as it ends, bars meanwhile on a terminal, and one table at the end."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from app.demo.interruption import Interruption
from app.terminal.units import duration, size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SOURCES = ("local", "peer", "disk")


@dataclass
class Act:
    """One thing that was done. `verified` is what the comparison after it found; without blocks nothing came back.

    `is_copied`: what came from this host's memory was copied too, and not only found there.
    """

    what: str
    seconds: float = 0.0
    blocks: int = 0
    bytes_by_source: dict[str, int] = field(default_factory=dict)
    note: str = ""
    verified: str = ""
    is_copied: bool = False

    @property
    def moved_nbytes(self) -> int:
        """Bytes that were brought to where they were wanted."""
        return sum(nbytes for source, nbytes in self.bytes_by_source.items() if self.is_copied or source != "local")

    @property
    def gb_per_s(self) -> float | None:
        return self.moved_nbytes / self.seconds / 1e9 if self.moved_nbytes and self.seconds else None


class Stage:
    """Shows acts as they end."""

    def __init__(self, console: Console, interruption: Interruption) -> None:
        self.console = console
        self._interruption = interruption
        self.acts: list[Act] = []

    @contextmanager
    def act(self, what: str, *, spin: bool = True) -> Iterator[Act]:
        """Time what is done inside; it may change what the act says. With `spin` False it draws a bar of its own."""
        self._interruption.check()
        made = Act(what)
        started = time.monotonic()
        if spin and self.console.is_terminal:
            with self.console.status(what):
                yield made
        else:
            yield made
        made.seconds = made.seconds or time.monotonic() - started
        self.acts.append(made)
        note = f": {made.note}" if made.note else ""
        self.console.print(_line(duration(made.seconds), made.what + note))

    def show_table(self, title: str) -> None:
        """Every act that brought blocks back."""
        from app.terminal.console import Listing

        columns = ("what was done~", "local>", "peers>", "disk>", "time>", "GB/s>", "tensors~")
        self.console.print()
        self.console.print(Listing(title, columns, [_row(act) for act in self.acts if act.blocks]))


def _line(seconds: str, said: str) -> Table:
    """What took how long; what does not fit goes on below its beginning."""
    from rich.table import Table
    from rich.text import Text

    line = Table.grid(padding=(0, 2))
    line.add_column(justify="right", min_width=9, no_wrap=True)
    line.add_column(overflow="fold")
    line.add_row(seconds, Text(said))
    return line


def _row(act: Act) -> Sequence[str]:
    moved = act.bytes_by_source
    return (
        act.what,
        *(size(moved[source]) if moved.get(source) else "-" for source in SOURCES),
        duration(act.seconds),
        "-" if act.gb_per_s is None else f"{act.gb_per_s:.2f}",
        act.verified,
    )

"""What the commands write for people: tables and bars; and for programs: one JSON document."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

PIPE_WIDTH = 200  # columns where the output is no terminal, so that nothing is cut
WRAPPED_WIDTH_MIN = 10  # of a column of sentences, before a table is no table any more
UNLIMITED_WIDTH = 10_000
TITLE_STYLE = "bold"
SENTENCES, FLUSH_RIGHT = "~", ">"


def stdout() -> Console:
    """The console that commands write to: as wide as its terminal, or as COLUMNS says."""
    from rich.console import Console

    has_width = sys.stdout.isatty() or bool(os.environ.get("COLUMNS"))
    return Console(width=None if has_width else PIPE_WIDTH, highlight=False)


class Listing:
    """Rows under names, for rich to print: a table where it fits, and where it does not, a paragraph for each row.

    A column whose name ends with `>` is flush right, one with `~` has sentences, which may go on in the next line.
    Without any name there is no head.
    """

    def __init__(self, title: str | None, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
        self._title = title
        self._columns = list(columns)
        self._rows = [[str(cell) for cell in row] for row in rows]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        if not any(self._columns) or self._least_width(console, options) <= options.max_width:
            yield self._table()
            return
        if self._title:
            yield Text(self._title, style=TITLE_STYLE)
        for row in self._rows:
            yield self._paragraph(row)

    @property
    def _names(self) -> list[str]:
        return [column.rstrip(SENTENCES + FLUSH_RIGHT) for column in self._columns]

    def _least_width(self, console: Console, options: ConsoleOptions) -> int:
        """In columns of the terminal, with sentences broken as often as that makes sense."""
        from rich.measure import Measurement

        narrow = self._table(sentences_width=WRAPPED_WIDTH_MIN)
        return Measurement.get(console, options.update(max_width=UNLIMITED_WIDTH), narrow).maximum

    def _table(self, sentences_width: int | None = None) -> Table:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        made = Table(
            title=self._title, title_justify="left", title_style=TITLE_STYLE,
            box=box.SIMPLE_HEAD, pad_edge=False, show_header=any(self._columns),
        )  # fmt: skip
        for column, name in zip(self._columns, self._names, strict=True):
            is_text = column.endswith(SENTENCES) or not any(self._columns)
            made.add_column(
                name,
                justify="right" if column.endswith(FLUSH_RIGHT) else "left",
                overflow="fold",
                no_wrap=not is_text,
                max_width=sentences_width if is_text else None,
            )
        for row in self._rows:
            made.add_row(*map(Text, row))
        return made

    def _paragraph(self, row: Sequence[str]) -> Table:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=False)
        made.add_column(no_wrap=True)
        made.add_column(overflow="fold")
        for name, cell in zip(self._names, row, strict=True):
            if cell:
                made.add_row(name, Text(cell))
        return made


def write_json(document: Any) -> None:
    """One JSON document on stdout."""
    import orjson

    typer.echo(orjson.dumps(document, option=orjson.OPT_INDENT_2).decode())

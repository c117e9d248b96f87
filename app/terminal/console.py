"""What the commands write for people: tables and bars; and for programs: one JSON document."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PIPE_WIDTH = 200  # columns where the output is no terminal, so that nothing is cut


def stdout() -> Console:
    """The console that commands write to."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)


def table(title: str | None, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> Table:
    """A plain table; a column whose name ends with `>` is flush right. Without any name there is no head."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    columns = list(columns)
    made = Table(
        title=title, title_justify="left", title_style="bold",
        box=box.SIMPLE_HEAD, pad_edge=False, show_header=any(columns),
    )  # fmt: skip
    for column in columns:
        made.add_column(column.removesuffix(">"), justify="right" if column.endswith(">") else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(str(cell)) for cell in row))
    return made


def write_json(document: Any) -> None:
    """One JSON document on stdout."""
    import orjson

    typer.echo(orjson.dumps(document, option=orjson.OPT_INDENT_2).decode())

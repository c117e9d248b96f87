"""Watching a restore until it ends: its document again and again, and a bar with bytes, speed and sources."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

POLL_S = 0.05
FINAL = ("succeeded", "failed", "cancelled")
SOURCES = ("local", "peer", "disk")

Document = Mapping[str, Any]
Show = Callable[[Document], None]


def seconds_of(document: Document) -> float:
    """From start to finish, or to now while it runs; 0 before it starts."""
    if document["started_at"] is None:
        return 0.0
    end = document["finished_at"]
    until = datetime.now(UTC) if end is None else datetime.fromisoformat(end)
    return (until - datetime.fromisoformat(document["started_at"])).total_seconds()


def came_from(document: Document) -> str:
    """`1.20 GB from peer, 0.10 GB from disk`; of a restore that moved nothing yet, an empty text."""
    from app.terminal.units import size

    by_source = document["bytes_by_source"]
    return ", ".join(f"{size(by_source[source])} from {source}" for source in SOURCES if by_source[source])


def watch(fetch: Callable[[], Document], show: Show) -> Document:
    """Fetch and show the document until the restore has ended; the last one."""
    while True:
        document = fetch()
        show(document)
        if document["state"] in FINAL:
            return document
        time.sleep(POLL_S)


@contextmanager
def bar(console: Console, title: str) -> Iterator[Show]:
    """A bar on a terminal; elsewhere nothing is drawn."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
        TextColumn("{task.fields[sources]}"),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=None, sources="")

        def show(document: Document) -> None:
            progress.update(
                task,
                total=document["bytes_total"] or None,
                completed=document["bytes_done"],
                sources=came_from(document),
            )

        yield show

"""Watching a restore until it ends."""

from __future__ import annotations

import io
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from rich.console import Console

from app.terminal import restore_bar
from app.terminal.restore_bar import bar, came_from, seconds_of, watch

STARTED = datetime(2026, 11, 3, 3, 33, 33, tzinfo=UTC)


def document(state: str = "running", **changes: Any) -> dict[str, Any]:
    return {
        "state": state, "started_at": STARTED.isoformat(), "finished_at": None, "bytes_total": 3333, "bytes_done": 333,
        "bytes_by_source": {"local": 0, "peer": 1_200_000_000, "disk": 0}, **changes,
    }  # fmt: skip


@pytest.mark.parametrize("last", ["succeeded", "failed", "cancelled"])
def test_it_is_watched_until_it_has_ended(monkeypatch: pytest.MonkeyPatch, last: str) -> None:
    monkeypatch.setattr(restore_bar, "POLL_S", 0)
    said = iter([document("queued"), document(), document(last), document("never asked for")])
    shown: list[str] = []
    ended = watch(lambda: next(said), lambda each: shown.append(each["state"]))
    assert ended["state"] == last
    assert shown == ["queued", "running", last]


def test_it_takes_from_its_start_to_its_end_or_to_now() -> None:
    finished = (STARTED + timedelta(seconds=3.25)).isoformat()
    assert seconds_of(document(finished_at=finished)) == 3.25
    assert seconds_of(document(started_at=None)) == 0
    started = datetime.now(UTC) - timedelta(seconds=33)
    assert seconds_of(document(started_at=started.isoformat())) >= 33


def test_only_sources_that_brought_something_are_named() -> None:
    assert came_from(document()) == "1.20 GB from peer"
    both = {"local": 3000, "peer": 0, "disk": 5}
    assert came_from(document(bytes_by_source=both)) == "3.00 kB from local, 5 B from disk"
    assert came_from(document(bytes_by_source=dict.fromkeys(both, 0))) == ""


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_bar_is_drawn_on_terminals_only(is_terminal: bool) -> None:
    drawn = io.StringIO()
    with bar(Console(file=drawn, force_terminal=is_terminal, width=133), "restoring node-b") as show:
        show(document())
    assert ("restoring node-b" in drawn.getvalue()) == is_terminal
    assert ("1.20 GB from peer" in drawn.getvalue()) == is_terminal

"""What commands write."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from app.terminal.console import PIPE_WIDTH, Listing, stdout, write_json


def drawn(made: object, width: int = PIPE_WIDTH) -> str:
    written = io.StringIO()
    Console(file=written, width=width).print(made)
    return written.getvalue()


def test_a_table_shows_what_it_is_given_as_it_is() -> None:
    said = drawn(Listing("Nodes", ("node", "blocks>"), [("[red]n0[/red]", 7), ("n1", 3333)]))
    title, head, _, first, second = (line.rstrip() for line in said.splitlines() if line.strip())
    assert title == "Nodes"
    assert head.split() == ["node", "blocks"]
    assert first.split() == ["[red]n0[/red]", "7"], "what nodes say is no markup"
    assert len(first) == len(second), "numbers are flush right"


def test_a_table_without_names_has_no_head() -> None:
    assert [line.split() for line in drawn(Listing(None, ("", ""), [("id", "n0")])).splitlines() if line.strip()] == [
        ["id", "n0"]
    ]


def test_a_table_that_is_too_wide_becomes_a_paragraph_a_row_and_nothing_is_cut() -> None:
    columns, long = ("model", "size>", "object", "~"), "hotspare.default." + "x" * 33
    rows = [("moe", "3.33 MB", long, ""), ("other", "5 B", long[::-1], "no header")]
    shown = drawn(Listing("Segments", columns, rows), width=66)
    lines = [line.split() for line in shown.splitlines() if line.strip()]
    assert max(map(len, shown.splitlines())) <= 66
    assert lines == [
        ["Segments"], ["model", "moe"], ["size", "3.33", "MB"], ["object", long],
        ["model", "other"], ["size", "5", "B"], ["object", long[::-1]], ["no", "header"],
    ]  # fmt: skip
    assert len(drawn(Listing("Segments", columns, rows), width=133).splitlines()) < len(lines)


def test_sentences_in_a_table_go_on_in_the_next_line_before_it_is_taken_apart() -> None:
    rows = [("three nodes filled from files", "1.29 GB")]
    shown = drawn(Listing(None, ("what was done~", "disk>"), rows), width=33)
    assert "what was done" in shown
    assert "1.29 GB" in shown
    assert [word for word in shown.split() if word in rows[0][0].split()] == rows[0][0].split()
    assert max(map(len, shown.splitlines())) <= 33


def test_a_pipe_is_as_wide_as_columns_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "77")
    assert stdout().width == 77


def test_lines_are_not_cut_where_the_output_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    stdout().print("x" * PIPE_WIDTH)
    assert capsys.readouterr().out == "x" * PIPE_WIDTH + "\n"


def test_json_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    write_json({"model": "ä", "blocks": [3, 5]})
    assert json.loads(capsys.readouterr().out) == {"model": "ä", "blocks": [3, 5]}

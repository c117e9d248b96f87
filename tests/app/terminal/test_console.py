"""What commands write."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from app.terminal.console import PIPE_WIDTH, stdout, table, write_json


def drawn(made: object) -> str:
    written = io.StringIO()
    Console(file=written, width=PIPE_WIDTH).print(made)
    return written.getvalue()


def test_a_table_shows_what_it_is_given_as_it_is() -> None:
    said = drawn(table("Nodes", ("node", "blocks>"), [("[red]n0[/red]", 7), ("n1", 3333)]))
    title, head, _, first, second = (line.rstrip() for line in said.splitlines() if line.strip())
    assert title == "Nodes"
    assert head.split() == ["node", "blocks"]
    assert first.split() == ["[red]n0[/red]", "7"], "what nodes say is no markup"
    assert len(first) == len(second), "numbers are flush right"


def test_a_table_without_names_has_no_head() -> None:
    assert [line.split() for line in drawn(table(None, ("", ""), [("id", "n0")])).splitlines() if line.strip()] == [
        ["id", "n0"]
    ]


def test_lines_are_not_cut_where_the_output_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    stdout().print("x" * PIPE_WIDTH)
    assert capsys.readouterr().out == "x" * PIPE_WIDTH + "\n"


def test_json_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    write_json({"model": "ä", "blocks": [3, 5]})
    assert json.loads(capsys.readouterr().out) == {"model": "ä", "blocks": [3, 5]}

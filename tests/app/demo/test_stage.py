"""What the demo shows of each step."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from app.demo.interruption import Interrupted, Interruption
from app.demo.stage import Act, Stage


@pytest.fixture
def written() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def stage(written: io.StringIO) -> Stage:
    return Stage(Console(file=written, width=133), Interruption())


def test_each_step_is_a_line_as_it_ends(stage: Stage, written: io.StringIO) -> None:
    with stage.act("node-b killed") as act:
        assert written.getvalue() == ""
        act.note, act.seconds = "3.33 MB lost [sic]", 0.333
    assert written.getvalue().strip() == "0.33 s  node-b killed: 3.33 MB lost [sic]"


def test_a_step_goes_on_below_its_beginning_where_the_terminal_is_narrow(
    stage: Stage, written: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage.console, "width", 36)
    with stage.act("node-b killed (SIGKILL)") as act:
        act.note, act.seconds = "3.33 MB", 0.333
    first, second = written.getvalue().splitlines()
    assert len(first) <= 36
    assert (first.split()[0], first.index("node-b")) == ("0.33", len(second) - len(second.lstrip()))


def test_a_step_that_fails_is_no_act(stage: Stage, written: io.StringIO) -> None:
    with pytest.raises(ZeroDivisionError), stage.act("node-b killed"):
        raise ZeroDivisionError
    assert (stage.acts, written.getvalue()) == ([], "")


def test_no_step_begins_after_an_interruption(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage._interruption, "_asked", True)
    with pytest.raises(Interrupted), stage.act("node-b killed"):
        pytest.fail("it began")


def test_what_was_in_this_hosts_memory_counts_as_moved_only_where_it_was_copied() -> None:
    moved = {"local": 3_000_000_000, "peer": 500_000_000, "disk": 0}
    assert Act("adopted", 2.0, 39, moved).gb_per_s == 0.25
    assert Act("into slots", 2.0, 39, moved, is_copied=True).gb_per_s == 1.75
    assert Act("adopted", 2.0, 39, {"local": 3_000_000_000}).gb_per_s is None


def test_the_table_has_what_brought_blocks(stage: Stage, written: io.StringIO) -> None:
    with stage.act("a checkpoint written"):
        pass
    with stage.act("three nodes filled") as act:
        act.blocks, act.bytes_by_source, act.seconds, act.verified = 39, {"disk": 1_500_000_000}, 3.0, "234 identical"
    written.truncate(0)
    stage.show_table("The nodes")
    (row,) = [line.split() for line in written.getvalue().splitlines() if "three" in line]
    assert row == ["three", "nodes", "filled", "-", "-", "1.50", "GB", "3.00", "s", "0.50", "234", "identical"]
    assert "a checkpoint written" not in written.getvalue()

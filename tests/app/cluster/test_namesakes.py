"""When two hosts go by one node id, and when it is one that was started again."""

from __future__ import annotations

import pytest

from app.cluster.namesakes import STARTS_MAX, TOLD_FOR_S, Asker, Namesakes


@pytest.fixture
def namesakes() -> Namesakes:
    return Namesakes("a", ["b", "c"])


def test_a_start_that_is_heard_again_after_another_is_a_second_host(namesakes: Namesakes) -> None:
    assert namesakes.hear("b", "one", "10.3.3.1", 1.0) is None
    assert namesakes.hear("b", "two", "10.3.3.2", 1.5) is None, "it may be one that was started again"
    said = namesakes.hear("b", "one", "10.3.3.1", 2.0)
    assert said is not None
    assert "10.3.3.1, 10.3.3.2" in said
    assert "node b" in said
    assert "--node-id" in said
    assert namesakes.hear("b", "two", "10.3.3.2", 2.5) is None, "that was told already"
    assert namesakes.warning("b", 2.5) == said
    assert namesakes.warning("c", 2.5) is None


def test_restarts_one_after_the_other_are_none(namesakes: Namesakes) -> None:
    for number in range(3 * STARTS_MAX):
        for second in range(3):
            assert namesakes.hear("b", f"start-{number}", "10.3.3.1", number + second / 10) is None
    assert namesakes.warning("b", 1000.0) is None


def test_another_start_under_our_own_id_is_one_at_once(namesakes: Namesakes) -> None:
    assert namesakes.hear("a", namesakes.own_start, "10.3.3.1", 1.0) is None
    said = namesakes.hear("a", "another", "10.3.3.2", 1.5)
    assert said is not None
    assert "another process" in said


def test_it_is_told_until_nothing_was_heard_of_it_for_a_while(namesakes: Namesakes) -> None:
    for at, start in enumerate(("one", "two", "one")):
        namesakes.hear("b", start, "10.3.3.1", float(at))
    assert namesakes.warning("b", 2.0 + TOLD_FOR_S) is not None
    assert namesakes.warning("b", 2.1 + TOLD_FOR_S) is None
    assert namesakes.hear("b", "two", "10.3.3.1", 3.0 + TOLD_FOR_S) is not None, "and then it is news again"


def test_ids_that_nobody_named_are_not_remembered(namesakes: Namesakes) -> None:
    for start in ("one", "two", "one"):
        assert namesakes.hear("stranger", start, "10.3.3.1", 1.0) is None
    assert namesakes.warning("stranger", 1.0) is None


def test_a_header_says_who_asks_whatever_the_id_is() -> None:
    for node_id in ("node-b", "org/ä b"):
        asker = Asker(node_id, "0123456789abcdef")
        assert str(asker).isascii()
        assert Asker.read(str(asker)) == asker
    for odd in ("", "node-b", "node-b 0123", " ", "node-b 0123456789abcdeg", "b " + "0" * 99):
        assert Asker.read(odd) is None

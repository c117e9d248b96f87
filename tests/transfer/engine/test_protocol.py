"""Pieces: where memory is cut, the same on both sides without a word between them."""

from __future__ import annotations

import pytest

from transfer.engine import Copy, protocol, session_host
from transfer.engine.protocol import pieces, pieces_to_register, within_pieces
from transfer.errors import EngineRefused


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "REGISTER_PIECE_NBYTES", 1000)


def test_registration_is_cut_at_absolute_multiples() -> None:
    assert pieces([(2500, 2100), (7000, 1000), (9999, 2)]) == [
        (2500, 500), (3000, 1000), (4000, 600), (7000, 1000), (9999, 1), (10_000, 1),
    ]  # fmt: skip
    assert pieces([(3333, 0)]) == []


def test_copies_are_cut_where_either_side_has_a_border() -> None:
    assert within_pieces([Copy(900, 5300, 1000), Copy(0, 0, 10)]) == [
        Copy(900, 5300, 100), Copy(1000, 5400, 600), Copy(1600, 6000, 300), Copy(0, 0, 10),
    ]  # fmt: skip


def test_more_pieces_than_can_be_registered_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "RANGES_MAX", 3)
    assert len(pieces_to_register([(500, 2000)])) == 3
    with pytest.raises(EngineRefused, match="4 ranges of memory are too many to register, 3 at most"):
        pieces_to_register([(500, 2000), (7000, 1)])


@pytest.mark.parametrize(
    ("session_id", "host"), [("10.0.0.7:15001", "10.0.0.7"), ("[fd91::1]:15001", "fd91::1"), ("nowhere", ""), ("", "")]
)
def test_the_host_of_a_session(session_id: str, host: str) -> None:
    assert session_host(session_id) == host

"""The demo's nodes."""

from __future__ import annotations

import pytest

from app.demo.fleet import environment, free_ports


def test_free_ports_are_distinct() -> None:
    assert len(set(free_ports(33))) == 33


def test_nodes_get_none_of_the_users_own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOTSPARE_TOKEN", "t0ken")
    monkeypatch.setenv("MC_TRANSFER_TIMEOUT", "33")
    passed_on = environment()
    assert "HOTSPARE_TOKEN" not in passed_on
    assert passed_on["MC_TRANSFER_TIMEOUT"] == "33"

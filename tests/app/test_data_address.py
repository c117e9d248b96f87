"""Which address peers are told to read from, and what is said of those that they cannot reach."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest

from app.data_address import data_host, warnings
from app.settings import Settings, load_settings
from shm.errors import InvalidInput

ELSEWHERE = "node-b=http://198.51.100.3:8470"  # of no host
BY_NAME = "node-b=http://node-b.example:8470"
HERE = "node-b=http://127.0.0.1:8471"


def settings(**options: Any) -> Settings:
    return load_settings(None, {"insecure": True, "node_id": "node-a", **options})


def said(**options: Any) -> str:
    made = settings(**options)
    return "\n".join(warnings(made, data_host(made)))


def test_it_is_the_listen_address_or_else_one_of_this_host() -> None:
    assert data_host(settings(listen="127.0.0.3:1")) == "127.0.0.3"
    assert data_host(settings(listen="127.0.0.1:1", data_host="10.3.3.3")) == "10.3.3.3"
    assert not ipaddress.ip_address(data_host(settings(listen="0.0.0.0:0"))).is_unspecified


def test_a_listen_name_without_an_address_says_what_to_give() -> None:
    with pytest.raises(InvalidInput, match="give --data-host"):
        data_host(settings(listen="nowhere.invalid:1"))


@pytest.mark.parametrize("peer", [ELSEWHERE, BY_NAME])
def test_loopback_is_refused_where_others_are_to_read_from_it(peer: str) -> None:
    with pytest.raises(InvalidInput, match=r"127\.0\.0\.1, which only this host can reach, and node-b is on another"):
        data_host(settings(listen="0.0.0.0:8470", data_host="127.0.0.1", peers=[peer]))
    assert data_host(settings(listen="0.0.0.0:8470", data_host="127.0.0.1", peers=[HERE])) == "127.0.0.1"


def test_a_link_local_address_is_refused() -> None:
    with pytest.raises(InvalidInput, match="link-local"):
        data_host(settings(listen="[::1]:8470", data_host="fe80::3"))


def test_what_may_be_meant_is_warned_of() -> None:
    assert "203.0.113.3 is not an address of this host" in said(data_host="203.0.113.3")
    assert "--listen 127.0.0.1:8470 cannot be reached" in said(peers=[ELSEWHERE])
    assert "only this host can reach" in said(listen="0.0.0.0:8470", data_host="127.0.0.1")
    assert "IPv6, and node-b" in said(listen="[::1]:8470", peers=[ELSEWHERE])


def test_one_host_alone_is_warned_of_nothing() -> None:
    assert said() == ""
    assert said(peers=[HERE]) == ""
    assert said(listen="[::1]:8470", peers=["node-b=http://[::1]:8471"]) == ""


def test_on_a_host_without_a_route_the_address_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.data_address._towards", lambda host: None)
    with pytest.raises(InvalidInput, match="no default route"):
        data_host(settings(listen="0.0.0.0:8470", peers=[BY_NAME]))
    assert "only this host can reach" in said(listen="0.0.0.0:8470")

"""A node as a process: it answers whoever asks beside more strangers than it has descriptors."""

from __future__ import annotations

import resource
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.processes import DEADLINE_S

DESCRIPTORS = 1024  # as many as a service is given by default
STRANGERS = 1500


@pytest.fixture
def descriptors() -> Iterator[None]:
    """Enough of them for this process, until the end of the test."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2 * STRANGERS:
        pytest.skip(f"a process may have {hard} descriptors here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2 * STRANGERS), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("descriptors")
def test_it_answers_beside_more_silent_and_slow_connections_than_it_has_descriptors(
    serve: Callable[..., Any], free_port: Callable[[], int]
) -> None:
    node = serve("a", {"a": free_port()}, fill="none").wait_live()
    resource.prlimit(node.pid, resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
    where = urlsplit(node.url)
    with ExitStack() as stack:
        for number in range(STRANGERS):
            stranger = stack.enter_context(socket.create_connection((where.hostname, where.port)))
            with suppress(OSError):  # it may have had to make room already
                if number % 2:
                    stranger.sendall(b"GET /livez HTTP/1.1\r\nHo")
        for _ in range(5):  # by connections of their own: one that was idle since before may have had to make room
            assert httpx.get(f"{node.url}/livez", timeout=DEADLINE_S).status_code == 200
        assert httpx.get(f"{node.url}/v1/node", timeout=DEADLINE_S).json()["state"] == "waiting"
    assert node.process.poll() is None

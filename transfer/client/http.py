"""Bounded HTTP to nodes: every answer has an end, in seconds and in bytes, also of a node that trickles or rambles.

The only place outside `app` with HTTP in it. Everything here blocks: it is for threads, never for an event loop.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import httpx
import orjson

from shm.errors import HotspareError, InvalidInput

CONNECT_TIMEOUT_S = 1.0
ANSWER_TIMEOUT_S = 2.0
DOCUMENT_TIMEOUT_S = 30.0  # a manifest or shard map of a large model
DOCUMENT_NBYTES_MAX = 1 << 30
CONNECTIONS_MAX = 64
# A host that lost its power answers nothing, not even that the connection is gone: ask it, and give it up after 5 s.
NOTICE_DEAD_HOSTS = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 2),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 5000),
)
DEFAULT_PORTS: Mapping[str, int] = {"http": 80, "https": 443}


class NodeUnreachable(HotspareError):
    """A node did not answer, or not like one."""


class NodeRefused(HotspareError):
    """A node answered with an error: `status` and its problem document."""

    def __init__(self, message: str, status: int, problem: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.status = status
        self.problem = problem


class NodeHttp:
    """HTTP to nodes, with one pool of connections. Thread-safe."""

    def __init__(self, token: str | None = None) -> None:
        self._http = httpx.Client(
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=httpx.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            transport=httpx.HTTPTransport(
                limits=httpx.Limits(max_connections=CONNECTIONS_MAX),
                socket_options=NOTICE_DEAD_HOSTS,
                trust_env=False,
            ),
            trust_env=False,  # nodes are asked directly, never through a proxy
        )

    def close(self) -> None:
        self._http.close()

    def request(self, method: str, url: str, *, timeout: float = ANSWER_TIMEOUT_S, **options: Any) -> httpx.Response:
        """One request; raises NodeUnreachable, or NodeRefused for a status of 400 and above.

        `timeout` (s) is for the whole answer, so that one that trickles in holds nobody up.
        """
        deadline = time.monotonic() + timeout
        limits = httpx.Timeout(timeout, connect=min(timeout, CONNECT_TIMEOUT_S))
        try:
            with self._http.stream(method, url, timeout=limits, **options) as answer:
                body = _read(answer, deadline)
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:  # the last: a name that cannot be one
            raise NodeUnreachable(f"{url}: {type(error).__name__}: {error}") from error
        response = httpx.Response(answer.status_code, content=body, request=answer.request)
        if response.status_code >= 400:
            problem = _problem(response)
            raise NodeRefused(
                f"{url}: {response.status_code} {problem.get('detail') or response.reason_phrase}",
                response.status_code,
                problem,
            )
        return response

    def document(
        self, url: str, *, timeout: float = ANSWER_TIMEOUT_S, params: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """The JSON object at `url`. Raises NodeUnreachable or NodeRefused."""
        response = self.request("GET", url, timeout=timeout, params=params)
        try:
            document = orjson.loads(response.content)
        except orjson.JSONDecodeError as error:
            raise NodeUnreachable(f"{url} does not answer like a Hotspare node: {error}") from error
        if not isinstance(document, dict):
            raise NodeUnreachable(f"{url} does not answer like a Hotspare node")
        return document


def host_and_port(url: str) -> tuple[str, int]:
    """Where a node's URL leads. Raises InvalidInput."""
    try:
        parts = httpx.URL(url)
    except httpx.InvalidURL:
        parts = httpx.URL()
    if parts.scheme not in DEFAULT_PORTS or not parts.host:
        raise InvalidInput(f"{url!r} is not a node's URL: write http://HOST:PORT")
    return parts.host, parts.port or DEFAULT_PORTS[parts.scheme]


def quoted(name: str) -> str:
    """A name as one part of a URL's path."""
    return quote(name, safe="")


def _read(answer: httpx.Response, deadline: float) -> bytes:
    """The whole body; raises NodeUnreachable where it is too large or not there by the deadline."""
    body = bytearray()
    for chunk in answer.iter_bytes():
        body += chunk
        if len(body) > DOCUMENT_NBYTES_MAX:
            raise NodeUnreachable(f"{answer.url}: over {DOCUMENT_NBYTES_MAX:,} bytes, more than any document of ours")
        if time.monotonic() > deadline:
            raise NodeUnreachable(f"{answer.url}: the answer comes too slowly")
    return bytes(body)


def _problem(response: httpx.Response) -> dict[str, Any]:
    try:
        document = orjson.loads(response.content)
    except orjson.JSONDecodeError:
        return {}
    return document if isinstance(document, dict) else {}

"""Bounded HTTP to nodes: every exchange has an end, in seconds and in bytes, also with a node that trickles or rambles.

httpx puts requests into words and httpcore speaks them, over connections of ours (`transfer.client.wire`): their own
timeouts are for one read each, and a node that sends a byte now and then would never run into one.

The only place outside `app` with HTTP in it. Everything here blocks: it is for threads, never for an event loop.
"""

from __future__ import annotations

import logging
import re
import socket
import time
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

import httpcore
import httpx
import orjson

from shm.block import ExpertKey
from shm.errors import HotspareError, InvalidInput
from transfer.client.wire import Wire

ANSWER_TIMEOUT_S = 2.0
DOCUMENT_TIMEOUT_S = 30.0  # a manifest or shard map of a large model
ANSWER_NBYTES_MAX = 8 << 20  # a list of 1,024 nodes is 1 MB at most, a restore with 1,000 failed blocks half of one
REPORT_NBYTES_MAX = 64 << 10  # what a node says of itself is under 2 KB
MANIFEST_NBYTES_MAX = 64 << 20  # Kimi-K2's, of 23,040 blocks, is 5 MB
MAP_BLOCK_NBYTES_MAX = 1 << 10  # an entry of one replica has 230 bytes, with the longest names 700
MAP_REPLICAS_MAX = 8  # for whose entries there is room, each with the longest names; with usual ones for 40
MAP_NBYTES_MIN = 1 << 20  # allowed to any map
CONNECTIONS_MAX = 64
IDLE_S = 2.0  # for which an idle connection is kept: less than nodes keep it, who would hang up as we ask
# A host that lost its power answers nothing, not even that the connection is gone: ask it, and give it up after 5 s.
NOTICE_DEAD_HOSTS = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 2),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 5000),
)
TOKEN = re.compile(r"[!-~]{1,1024}")
DEFAULT_PORTS: Mapping[str, int] = {"http": 80, "https": 443}

_log = logging.getLogger("hotspare.http")


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
        """Raises InvalidInput for a token that no header can carry, and does not say what it is."""
        self._headers = {"Accept-Encoding": "identity", "User-Agent": "hotspare"}
        if token:
            if not TOKEN.fullmatch(token):
                raise InvalidInput("the token is not 1 to 1,024 visible ASCII characters: no header can carry it")
            self._headers["Authorization"] = f"Bearer {token}"
        self._wire = Wire(NOTICE_DEAD_HOSTS)
        self._pool = httpcore.ConnectionPool(
            max_connections=CONNECTIONS_MAX, keepalive_expiry=IDLE_S, network_backend=self._wire
        )  # which asks nodes directly, whatever proxy the environment names

    def close(self) -> None:
        """End what is under way in other threads too: it fails with NodeUnreachable, and so does all from now on."""
        self._wire.close()
        self._pool.close()

    def request(
        self,
        method: str,
        url: str,
        *,
        timeout: float = ANSWER_TIMEOUT_S,
        nbytes_max: int = ANSWER_NBYTES_MAX,
        **options: Any,
    ) -> httpx.Response:
        """One request; raises NodeUnreachable, or NodeRefused for a status of 400 and above.

        `timeout` (s) is for the whole exchange, `nbytes_max` for the answer's body: neither a node that trickles nor
        one that rambles holds anybody up. `options` are those of an `httpx.Request`: `json`, `params`, `headers`.
        """
        try:
            answer = self._exchange(self._request(method, url, options), time.monotonic() + timeout, nbytes_max)
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException) as error:
            raise NodeUnreachable(f"{url}: {type(error).__name__}: {error}") from error
        except (httpcore.UnsupportedProtocol, httpx.InvalidURL, OSError, ValueError) as error:
            raise NodeUnreachable(f"{url}: {error}") from error
        if answer.status_code >= HTTPStatus.BAD_REQUEST:
            problem = _problem(answer)
            said = problem.get("detail") or answer.reason_phrase
            raise NodeRefused(f"{url}: {answer.status_code} {said}", answer.status_code, problem)
        return answer

    def _request(self, method: str, url: str, options: Mapping[str, Any]) -> httpx.Request:
        given: Mapping[str, str] = options.get("headers") or {}
        return httpx.Request(method, url, **{**options, "headers": {**self._headers, **given}})

    def _exchange(self, request: httpx.Request, deadline: float, nbytes_max: int) -> httpx.Response:
        sent = httpcore.Request(
            request.method,
            httpcore.URL(
                scheme=request.url.raw_scheme,
                host=request.url.raw_host,
                port=request.url.port,
                target=request.url.raw_path,
            ),
            headers=request.headers.raw,
            content=request.read(),
            extensions={"timeout": {"pool": deadline - time.monotonic()}},
        )
        with self._wire.until(deadline):
            answer = self._pool.handle_request(sent)
            try:
                body = _read(answer, request.url, nbytes_max)
            finally:
                answer.close()
        return httpx.Response(answer.status, content=body, request=request)

    def document(
        self,
        url: str,
        *,
        timeout: float = ANSWER_TIMEOUT_S,
        nbytes_max: int = ANSWER_NBYTES_MAX,
        params: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """The JSON object at `url`. Raises NodeUnreachable or NodeRefused."""
        response = self.request("GET", url, timeout=timeout, nbytes_max=nbytes_max, params=params)
        try:
            document = orjson.loads(response.content)
        except orjson.JSONDecodeError as error:
            raise NodeUnreachable(f"{url} does not answer like a Hotspare node: {error}") from error
        if not isinstance(document, dict):
            raise NodeUnreachable(f"{url} does not answer like a Hotspare node")
        return document

    def doubt(self, url: str, content_digest: str, blocks: Iterable[ExpertKey]) -> None:
        """Tell the node at `url` that these blocks of its arrived wrong. Raises nothing: it will find out by itself."""
        named = [key._asdict() for key in blocks]
        try:
            self.request("POST", f"{url}/v1/doubts", json={"content_digest": content_digest, "blocks": named})
        except HotspareError as error:
            _log.warning("a node that sent %d blocks wrong could not be told: %s", len(named), error)


def host_and_port(url: str) -> tuple[str, int]:
    """Where a node's URL leads. Raises InvalidInput."""
    try:
        parts = httpx.URL(url)
    except httpx.InvalidURL:
        parts = httpx.URL()
    if parts.scheme not in DEFAULT_PORTS or not parts.host:
        raise InvalidInput(f"{url!r} is not a node's URL: write http://HOST:PORT")
    return parts.host, parts.port or DEFAULT_PORTS[parts.scheme]


def map_nbytes_max(blocks: int, replicas: int = MAP_REPLICAS_MAX) -> int:
    """How large a shard map of so many blocks may be: what it has to say, and not what a node makes of it."""
    return MAP_NBYTES_MIN + blocks * replicas * MAP_BLOCK_NBYTES_MAX


def quoted(name: str) -> str:
    """A name as one part of a URL's path."""
    return quote(name, safe="")


def _read(answer: httpcore.Response, url: httpx.URL, nbytes_max: int) -> bytes:
    """The whole body of a document. Raises NodeUnreachable for what is none of a node, or too large.

    A redirect is not followed and nothing is unpacked: nodes send neither, and a kilobyte of gzip can be a gigabyte.
    """
    if answer.status // 100 == 3:
        raise NodeUnreachable(f"{url} sends us elsewhere ({answer.status}): nodes are asked directly, give its own URL")
    if any(name.lower() == b"content-encoding" and said.lower() != b"identity" for name, said in answer.headers):
        raise NodeUnreachable(f"{url} answers in a compressed form, which was not asked for: let nothing compress it")
    body = bytearray()
    for chunk in answer.iter_stream():
        body += chunk
        if len(body) > nbytes_max:
            raise NodeUnreachable(f"{url}: over {nbytes_max:,} bytes, more than such a document of ours has")
    return bytes(body)


def _problem(response: httpx.Response) -> dict[str, Any]:
    try:
        document = orjson.loads(response.content)
    except orjson.JSONDecodeError:
        return {}
    return document if isinstance(document, dict) else {}

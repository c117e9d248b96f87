"""Asking other nodes, over HTTP: who they are, what they hold, and to restore something.

Everything here blocks: it is for threads, never for the event loop.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
import orjson
from pydantic import BaseModel, ValidationError

from app.problems import PeerFailed
from shm.block import DENSE
from shm.checksum import CHECKSUM_NBYTES
from shm.errors import HotspareError, ManifestError
from shm.manifest import Manifest

CONNECT_TIMEOUT_S = 1.0
POLL_TIMEOUT_S = 2.0
DOCUMENT_TIMEOUT_S = 30.0  # a manifest or shard map of a large model
DOCUMENT_NBYTES_MAX = 1 << 30
CONNECTIONS_MAX = 64

Model = TypeVar("Model", bound=BaseModel)


class PeerUnreachable(HotspareError):
    """The peer did not answer."""


class PeerRefused(HotspareError):
    """The peer answered with an error: `status` and its problem document."""

    def __init__(self, message: str, status: int, problem: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.status = status
        self.problem = problem


@dataclass(frozen=True, slots=True)
class PeerBlocks:
    """What a peer has published, in one session: manifest row → (address in its process, xxh3-128)."""

    session_id: str
    revision: str
    blocks: Mapping[int, tuple[int, bytes]]


class PeerClient:
    """HTTP to other nodes, with one pool of connections. Thread-safe."""

    def __init__(self, token: str | None = None) -> None:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.Client(
            headers=headers,
            timeout=httpx.Timeout(POLL_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=CONNECTIONS_MAX),
            trust_env=False,  # nodes talk to each other directly, never through a proxy
        )

    def close(self) -> None:
        self._http.close()

    def request(self, method: str, url: str, *, timeout: float = POLL_TIMEOUT_S, **options: Any) -> httpx.Response:
        """One request; raises PeerUnreachable, or PeerRefused for a status of 400 and above.

        `timeout` (s) is for the whole answer, so that one that trickles in holds nobody up.
        """
        deadline = time.monotonic() + timeout
        limits = httpx.Timeout(timeout, connect=min(timeout, CONNECT_TIMEOUT_S))
        try:
            with self._http.stream(method, url, timeout=limits, **options) as answer:
                body = _read(answer, deadline)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise PeerUnreachable(f"{url}: {type(error).__name__}: {error}") from error
        response = httpx.Response(answer.status_code, content=body, request=answer.request)
        if response.status_code >= 400:
            problem = _problem(response)
            raise PeerRefused(
                f"{url}: {response.status_code} {problem.get('detail') or response.reason_phrase}",
                response.status_code,
                problem,
            )
        return response

    def node(self, url: str) -> dict[str, Any]:
        """The peer's `/v1/node`."""
        return self._json(self.request("GET", f"{url}/v1/node"))

    def manifest(self, url: str) -> Manifest:
        """The peer's manifest, checked against its digest. Raises ManifestError."""
        return Manifest.from_json(self._json(self.request("GET", f"{url}/v1/manifest", timeout=DOCUMENT_TIMEOUT_S)))

    def blocks(self, url: str, node_id: str, manifest: Manifest) -> PeerBlocks:
        """What the peer has published, from its shard map. Raises ManifestError if it is of another manifest."""
        answer = self.request("GET", f"{url}/v1/shard-map", params={"scope": "node"}, timeout=DOCUMENT_TIMEOUT_S)
        document = self._json(answer)
        if document.get("manifest_digest") != manifest.digest:
            raise ManifestError(f"{node_id} has manifest {document.get('manifest_digest')}, we have {manifest.digest}")
        try:
            return self._blocks(document, node_id, manifest)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ManifestError(f"{url}: not a shard map: {error!r}") from error

    @staticmethod
    def _blocks(document: Mapping[str, Any], node_id: str, manifest: Manifest) -> PeerBlocks:
        blocks: dict[int, tuple[int, bytes]] = {}
        session_id = ""
        for entry in (*document["experts"], *document.get("dense", ())):
            for replica in entry["replicas"]:
                if replica["node_id"] == node_id:
                    layer = DENSE if entry["layer"] is None else entry["layer"]
                    row = manifest.index(layer, entry.get("expert", DENSE))
                    blocks[row] = (int(replica["address"]), _checksum(entry["checksum"]))
                    session_id = str(replica["session_id"])
        return PeerBlocks(session_id, str(document["revision"]), blocks)

    @staticmethod
    def _json(response: httpx.Response) -> dict[str, Any]:
        try:
            document = orjson.loads(response.content)
        except orjson.JSONDecodeError as error:
            raise PeerUnreachable(f"{response.url} does not answer like a Hotspare node: {error}") from error
        if not isinstance(document, dict):
            raise PeerUnreachable(f"{response.url} does not answer like a Hotspare node")
        return document


def parsed(model: type[Model], answer: httpx.Response) -> Model:
    """The document in a peer's answer. Raises PeerFailed."""
    try:
        return model.model_validate_json(answer.content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        raise PeerFailed(
            f"{answer.url} does not answer like a Hotspare node ({where}: {first['msg']}): is it of another version?"
        ) from None


def _checksum(digits: str) -> bytes:
    checksum = bytes.fromhex(digits)
    if len(checksum) != CHECKSUM_NBYTES:
        raise ValueError(f"{digits!r} is no checksum")
    return checksum


def _read(answer: httpx.Response, deadline: float) -> bytes:
    """The whole body; raises PeerUnreachable where it is too large or not there by the deadline."""
    body = bytearray()
    for chunk in answer.iter_bytes():
        body += chunk
        if len(body) > DOCUMENT_NBYTES_MAX:
            raise PeerUnreachable(f"{answer.url}: over {DOCUMENT_NBYTES_MAX:,} bytes, more than any document of ours")
        if time.monotonic() > deadline:
            raise PeerUnreachable(f"{answer.url}: the answer comes too slowly")
    return bytes(body)


def _problem(response: httpx.Response) -> dict[str, Any]:
    try:
        document = orjson.loads(response.content)
    except orjson.JSONDecodeError:
        return {}
    return document if isinstance(document, dict) else {}

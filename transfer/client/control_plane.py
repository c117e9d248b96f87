"""The nodes' HTTP side, as an engine asks it: what a node is, its manifest, who has which block, who answers.

The only place outside `app` with HTTP in it.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import orjson

from shm.errors import BlockUnavailable, HotspareError, InvalidInput
from shm.manifest import Manifest
from transfer.client.whereabouts import Mapped, Replica

CONNECT_TIMEOUT_S = 1.0
ASK_TIMEOUT_S = 2.0
DOCUMENT_TIMEOUT_S = 30.0  # a manifest or shard map of a large model
DOCUMENT_NBYTES_MAX = 1 << 30
URLS_MAX = 1024  # nodes remembered
ASK_THREADS_MAX = 16


class NodeUnreachable(HotspareError):
    """A node's control plane did not answer, or not like one."""


class ControlPlane:
    """The nodes' HTTP side, our own node's first. Remembers every node that one of them named. Thread-safe."""

    def __init__(self, url: str, token: str | None) -> None:
        try:
            parts = httpx.URL(url)
        except httpx.InvalidURL:
            parts = httpx.URL()
        if parts.scheme not in ("http", "https") or not parts.host:
            raise InvalidInput(f"{url!r} is not a node's URL: write http://HOST:PORT")
        self.address = (parts.host, parts.port or {"http": 80, "https": 443}[parts.scheme])
        self.urls = [url.rstrip("/")]
        self._by_node: dict[str, str] = {}
        self._http = httpx.Client(
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=httpx.Timeout(ASK_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            trust_env=False,  # nodes are asked directly, never through a proxy
        )

    def close(self) -> None:
        self._http.close()

    def node(self, url: str) -> dict[str, Any]:
        """A node's own account of itself. Raises NodeUnreachable."""
        return self._get(f"{url}/v1/node")

    def learn(self, url: str) -> str:
        """Remember the nodes that this one knows; returns its own id. Raises NodeUnreachable."""
        own = ""
        for node in self._get(f"{url}/v1/nodes").get("nodes", ()):
            node_id, peer = str(node.get("node_id")), str(node.get("url", "")).rstrip("/")
            if node.get("self"):
                own = node_id
            elif peer and len(self.urls) < URLS_MAX:
                self._by_node[node_id] = peer
                if peer not in self.urls:
                    self.urls.append(peer)
        return own

    def silent(self, node_ids: Iterable[str]) -> set[str]:
        """Those of the nodes that are known not to answer now: asking takes ASK_TIMEOUT_S at most, all at once.

        The transfer engine would wait a minute for the first word of a process that is stopped.
        """
        asked = sorted(node_ids)
        with ThreadPoolExecutor(ASK_THREADS_MAX, thread_name_prefix="hotspare-ask") as pool:
            return {node for node, silent in zip(asked, pool.map(self._is_silent, asked), strict=True) if silent}

    def _is_silent(self, node_id: str) -> bool:
        url = self._by_node.get(node_id)
        if url is None:  # nobody said where it is
            return False
        try:
            self.node(url)
        except NodeUnreachable:
            return True
        return False

    def manifest(self, url: str) -> Manifest:
        """A node's manifest, checked against its digest. Raises NodeUnreachable or ManifestError."""
        return Manifest.from_json(self._get(f"{url}/v1/manifest", timeout=DOCUMENT_TIMEOUT_S))

    def shard_map(self, url: str, manifest: Manifest) -> dict[int, Mapped]:
        """Manifest row → who has the block, as this node knows it. Raises NodeUnreachable."""
        document = self._get(f"{url}/v1/shard-map", params={"scope": "cluster"}, timeout=DOCUMENT_TIMEOUT_S)
        if document.get("manifest_digest") != manifest.digest:
            raise NodeUnreachable(
                f"{url} keeps {document.get('model')} from another checkpoint: nothing is taken of it"
            )
        try:
            return {
                manifest.index(entry["layer"], entry["expert"]): Mapped(
                    bytes.fromhex(entry["checksum"]),
                    tuple(
                        Replica(str(r["node_id"]), str(r["session_id"]), int(r["address"]))
                        for r in entry["replicas"]
                        if r["session_id"]
                    ),
                )
                for entry in document["experts"]
            }
        except (KeyError, TypeError, ValueError, BlockUnavailable) as error:
            raise NodeUnreachable(f"{url}: not a shard map: {error!r}") from error

    def _get(self, url: str, **options: Any) -> dict[str, Any]:
        try:
            response = self._http.get(url, **options)
            document = orjson.loads(response.content) if len(response.content) <= DOCUMENT_NBYTES_MAX else None
        except httpx.HTTPError as error:
            raise NodeUnreachable(f"{url}: {type(error).__name__}: {error}") from error
        except orjson.JSONDecodeError as error:
            raise NodeUnreachable(f"{url} does not answer like a Hotspare node: {error}") from error
        if not isinstance(document, dict):
            raise NodeUnreachable(f"{url} does not answer like a Hotspare node")
        if response.status_code >= 400:
            raise NodeUnreachable(f"{url}: {response.status_code} {document.get('detail') or response.reason_phrase}")
        return document

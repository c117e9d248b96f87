"""The nodes' HTTP side, as an engine asks it: what a node is, its manifest, who has which block, who answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from shm.block import ExpertKey
from shm.errors import ManifestError
from shm.manifest import Manifest
from transfer.client.http import DOCUMENT_TIMEOUT_S, NodeHttp, NodeRefused, NodeUnreachable, host_and_port, quoted
from transfer.client.pinned_content import PinnedContent
from transfer.shard_map import Mapped, read_shard_map

URLS_MAX = 1024  # nodes remembered
ASK_THREADS_MAX = 16


class ControlPlane:
    """The nodes' HTTP side, our own node's first. Remembers every node that one of them named. Thread-safe."""

    def __init__(self, url: str, token: str | None) -> None:
        self.address = host_and_port(url)
        self.urls = [url.rstrip("/")]
        self._by_node: dict[str, str] = {}
        self._http = NodeHttp(token)

    def close(self) -> None:
        self._http.close()

    def node(self, url: str) -> dict[str, Any]:
        """A node's own account of itself. Raises NodeUnreachable."""
        return self._http.document(f"{url}/v1/node")

    def learn(self, url: str) -> str:
        """Remember the nodes that this one knows; returns its own id. Raises NodeUnreachable."""
        own = ""
        for node in self._http.document(f"{url}/v1/nodes").get("nodes", ()):
            node_id, peer = str(node.get("node_id")), str(node.get("url", "")).rstrip("/")
            if node.get("self"):
                own = node_id
            elif peer and len(self.urls) < URLS_MAX:
                self._by_node[node_id] = peer
                if peer not in self.urls:
                    self.urls.append(peer)
        return own

    def silent(self, node_ids: Iterable[str]) -> set[str]:
        """Those of the nodes that are known not to answer now: asking takes ANSWER_TIMEOUT_S at most, all at once.

        The transfer engine would wait a minute for the first word of a process that is stopped.
        """
        asked = sorted(node_ids)
        with ThreadPoolExecutor(ASK_THREADS_MAX, thread_name_prefix="hotspare-ask") as pool:
            return {node for node, silent in zip(asked, pool.map(self._is_silent, asked), strict=True) if silent}

    def doubt(self, node_id: str | None, content_digest: str, blocks: Iterable[ExpertKey]) -> None:
        """Tell a node that blocks of its were read wrong; our own with None. One that cannot be told is passed over."""
        url = self.urls[0] if node_id is None else self._by_node.get(node_id)
        if url is not None:
            self._http.doubt(url, content_digest, blocks)

    def put_consumer(self, consumer_id: str, document: Mapping[str, Any]) -> None:
        """Register with our own node. Raises NodeUnreachable or NodeRefused, as the next two do."""
        self._ask_own("PUT", consumer_id, json=dict(document), timeout=DOCUMENT_TIMEOUT_S)

    def renew_consumer(self, consumer_id: str) -> None:
        self._ask_own("POST", consumer_id, "/renew")

    def remove_consumer(self, consumer_id: str) -> None:
        """Waits for writes under way."""
        self._ask_own("DELETE", consumer_id, timeout=DOCUMENT_TIMEOUT_S)

    def _ask_own(self, method: str, consumer_id: str, suffix: str = "", **options: Any) -> None:
        path = f"/v1/consumers/{quoted(consumer_id)}{suffix}"
        self._http.request(method, self.urls[0] + path, **options)

    def _is_silent(self, node_id: str) -> bool:
        url = self._by_node.get(node_id)
        if url is None:  # nobody said where it is
            return False
        try:
            self.node(url)
        except NodeUnreachable:
            return True
        except NodeRefused:  # it lives, whatever it thinks of us
            return False
        return False

    def manifest(self, url: str) -> Manifest:
        """A node's manifest, checked against its digest. Raises NodeUnreachable or ManifestError."""
        return Manifest.from_json(self._http.document(f"{url}/v1/manifest", timeout=DOCUMENT_TIMEOUT_S))

    def shard_map(self, url: str, manifest: Manifest, content: PinnedContent) -> dict[int, Mapped]:
        """Manifest row → who has the block, as this node knows it.

        Raises NodeUnreachable, RestoreError for a node of other content.
        """
        document = self._http.document(f"{url}/v1/shard-map", params={"scope": "cluster"}, timeout=DOCUMENT_TIMEOUT_S)
        if document.get("manifest_digest") != manifest.digest:
            raise NodeUnreachable(
                f"{url} keeps {document.get('model')} from another checkpoint: nothing is taken of it"
            )
        content.agree(document.get("content_digest"), url)
        try:
            return read_shard_map(document, manifest)
        except ManifestError as error:
            raise NodeUnreachable(f"{url}: {error}") from error

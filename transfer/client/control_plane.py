"""The nodes' HTTP side, as an engine asks it: what a node is, its manifest, who has which block, who answers."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from shm.block import ExpertKey
from shm.errors import ManifestError
from shm.manifest import Manifest
from transfer.client.http import (
    DOCUMENT_TIMEOUT_S,
    MANIFEST_NBYTES_MAX,
    REPORT_NBYTES_MAX,
    NodeHttp,
    NodeRefused,
    NodeUnreachable,
    host_and_port,
    map_nbytes_max,
    quoted,
)
from transfer.client.pinned_content import PinnedContent
from transfer.shard_map import Mapped, read_shard_map, read_text

TOKEN_VARIABLE = "HOTSPARE_TOKEN"
URLS_MAX = 1024  # nodes remembered
ASK_THREADS_MAX = 16
BLOCKS_ASKED_MAX = 256  # by name, in one request: what nodes take


class NodeAccount(NamedTuple):
    """What a node says of itself, as far as an engine goes by it."""

    model: str
    namespace: str
    node_id: str
    session_id: str
    """Empty while it has no transfer engine."""
    segment: str
    content_digest: str | None
    """None while it has pinned none."""
    blocks_unproved: int
    started_at: str = ""
    """Its start, as it tells it: compared, never counted with. Empty of a node that does not say."""


def _text(document: Mapping[str, Any], name: str, url: str) -> str:
    try:
        return read_text(document, name)
    except ManifestError as error:
        raise NodeUnreachable(f"{url} does not answer like a Hotspare node: {error}") from error


def _digest(document: Mapping[str, Any], url: str) -> str | None:
    """The content digest, in hex; None where the node does not know it yet."""
    if document.get("content_digest") is None:
        return None
    if not re.fullmatch("[0-9a-f]{32}", digest := _text(document, "content_digest", url)):
        raise NodeUnreachable(f"{url} does not answer like a Hotspare node: {digest!r:.40} is no content digest")
    return digest


class ControlPlane:
    """The nodes' HTTP side, our own node's first. Remembers every node that one of them named. Thread-safe."""

    def __init__(self, url: str, token: str | None) -> None:
        """`token` is what the nodes want to be shown: that of HOTSPARE_TOKEN where it is None."""
        self.address = host_and_port(url)
        self.urls = [url.rstrip("/")]
        self._by_node: dict[str, str] = {}
        self._http = NodeHttp(os.environ.get(TOKEN_VARIABLE) if token is None else token)

    def close(self) -> None:
        self._http.close()

    def node(self, url: str) -> NodeAccount:
        """What a node says of itself. Raises NodeUnreachable, also where it says it otherwise than a node does."""
        said = self._http.document(f"{url}/v1/node", nbytes_max=REPORT_NBYTES_MAX)
        texts = {name: _text(said, name, url) for name in ("model", "namespace", "node_id", "session_id", "segment")}
        unproved = said.get("blocks_unproved")
        if type(unproved) is not int:
            raise NodeUnreachable(f"{url} does not answer like a Hotspare node: blocks_unproved is {unproved!r:.40}")
        started_at = _text(said, "started_at", url) if "started_at" in said else ""
        return NodeAccount(**texts, content_digest=_digest(said, url), blocks_unproved=unproved, started_at=started_at)

    def learn(self, url: str) -> str:
        """Remember the nodes that this one knows; returns its own id. Raises NodeUnreachable."""
        own = ""
        for node in self._nodes(url):
            node_id, peer = _text(node, "node_id", url), _text(node, "url", url).rstrip("/")
            if node.get("self"):
                own = node_id
            elif peer and len(self.urls) < URLS_MAX:
                self._by_node[node_id] = peer
                if peer not in self.urls:
                    self.urls.append(peer)
        return own

    def _nodes(self, url: str) -> list[dict[str, Any]]:
        nodes = self._http.document(f"{url}/v1/nodes").get("nodes")
        if not isinstance(nodes, list) or not all(isinstance(node, dict) for node in nodes):
            raise NodeUnreachable(f"{url} does not answer like a Hotspare node: its nodes are no list of objects")
        return nodes

    def silent(self, node_ids: Collection[str], told_by: str) -> set[str]:
        """Those of the nodes that are known not to answer now: asking takes ANSWER_TIMEOUT_S at most, all at once.

        `told_by` is the URL that they were heard of from, which knows where they are. The transfer engine would wait a
        minute for the first word of a process that is stopped.
        """
        if not self._by_node.keys() >= set(node_ids):
            self.learn(told_by)
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
        path, limit = f"{url}/v1/manifest", MANIFEST_NBYTES_MAX
        return Manifest.from_json(self._http.document(path, timeout=DOCUMENT_TIMEOUT_S, nbytes_max=limit))

    def shard_map(
        self, url: str, manifest: Manifest, content: PinnedContent, rows: Collection[int]
    ) -> tuple[str, Mapping[int, Mapped]]:
        """The id of the node that answers, and manifest row → who has the block, as it knows it.

        Of these rows at least: a whole map of a large model takes both sides half a second, so that few blocks are
        asked for by name. Raises NodeUnreachable, RestoreError for a node of other content.
        """
        blocks = [f"{layer}.{expert}" for layer, expert in map(manifest.keys.__getitem__, sorted(rows))]
        is_whole = len(blocks) > BLOCKS_ASKED_MAX or any(not manifest.keys[row].is_expert for row in rows)
        document = self._http.document(
            f"{url}/v1/shard-map",
            params={"scope": "cluster"} if is_whole else {"scope": "cluster", "block": blocks},
            timeout=DOCUMENT_TIMEOUT_S,
            nbytes_max=map_nbytes_max(len(manifest) if is_whole else len(blocks)),
        )
        if document.get("manifest_digest") != manifest.digest:
            raise NodeUnreachable(
                f"{url} keeps {document.get('model')!r:.200} from another checkpoint: nothing is taken of it"
            )
        if (digest := _digest(document, url)) is None:
            raise NodeUnreachable(f"{url} does not answer like a Hotspare node: its map names no content")
        content.agree(digest, url)
        try:
            return _text(document, "node_id", url), read_shard_map(document, manifest)
        except ManifestError as error:
            raise NodeUnreachable(f"{url}: {error}") from error

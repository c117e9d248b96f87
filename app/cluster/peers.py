"""Asking other nodes, over HTTP: who they are, what they hold, and to restore something.

Everything here blocks: it is for threads, never for the event loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from app.cluster.namesakes import ASKER_HEADER, Asker
from app.errors import PeerFailed
from shm.errors import ManifestError
from shm.manifest import Manifest
from transfer.client.http import (
    DOCUMENT_TIMEOUT_S,
    MANIFEST_NBYTES_MAX,
    REPORT_NBYTES_MAX,
    NodeHttp,
    NodeRefused,
    NodeUnreachable,
    map_nbytes_max,
    quoted,
)
from transfer.shard_map import read_shard_map, read_text

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class PeerBlocks:
    """What a peer has published, in one session: manifest row → (address in its process, xxh3-128)."""

    session_id: str
    revision: str
    blocks: Mapping[int, tuple[int, bytes]]


class PeerClient(NodeHttp):
    """What nodes ask of each other. Thread-safe."""

    def __init__(self, token: str | None = None, asker: Asker | None = None) -> None:
        """`asker` is the node that asks; None for who is none. Raises as `NodeHttp` does."""
        super().__init__(token)
        if asker is not None:
            self._headers[ASKER_HEADER] = str(asker)

    def node(self, url: str) -> dict[str, Any]:
        """The peer's `/v1/node`."""
        return self.document(f"{url}/v1/node", nbytes_max=REPORT_NBYTES_MAX)

    def manifest(self, url: str) -> Manifest:
        """The peer's manifest, checked against its digest. Raises ManifestError."""
        document = self.document(f"{url}/v1/manifest", timeout=DOCUMENT_TIMEOUT_S, nbytes_max=MANIFEST_NBYTES_MAX)
        return Manifest.from_json(document)

    def blocks(self, url: str, node_id: str, manifest: Manifest) -> PeerBlocks:
        """What the peer has published, from its shard map. Raises ManifestError if it is of another manifest."""
        document = self.document(
            f"{url}/v1/shard-map",
            params={"scope": "node"},
            timeout=DOCUMENT_TIMEOUT_S,
            nbytes_max=map_nbytes_max(len(manifest), replicas=1),
        )
        try:
            mapped = read_shard_map(document, manifest)
            revision = read_text(document, "revision")
        except ManifestError as error:
            raise ManifestError(f"the shard map of {node_id} at {url} is of no use: {error}") from error
        own = [
            (row, block.checksum, replica)
            for row, block in mapped.items()
            for replica in block.replicas
            if replica.node_id == node_id
        ]
        session_id = own[-1][2].session_id if own else ""
        return PeerBlocks(session_id, revision, {row: (replica.address, said) for row, said, replica in own})

    def has_consumer(self, url: str, consumer_id: str) -> bool:
        """Whether the peer answers, and that consumer is registered with it."""
        try:
            self.request("GET", f"{url}/v1/consumers/{quoted(consumer_id)}")
        except (NodeUnreachable, NodeRefused):
            return False
        return True


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

"""Asking other nodes, over HTTP: who they are, what they hold, and to restore something.

Everything here blocks: it is for threads, never for the event loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from app.errors import PeerFailed
from shm.block import DENSE
from shm.checksum import CHECKSUM_NBYTES
from shm.errors import ManifestError
from shm.manifest import Manifest
from transfer.client.http import DOCUMENT_TIMEOUT_S, NodeHttp, NodeRefused, NodeUnreachable, quoted

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class PeerBlocks:
    """What a peer has published, in one session: manifest row → (address in its process, xxh3-128)."""

    session_id: str
    revision: str
    blocks: Mapping[int, tuple[int, bytes]]


class PeerClient(NodeHttp):
    """What nodes ask of each other. Thread-safe."""

    def node(self, url: str) -> dict[str, Any]:
        """The peer's `/v1/node`."""
        return self.document(f"{url}/v1/node")

    def manifest(self, url: str) -> Manifest:
        """The peer's manifest, checked against its digest. Raises ManifestError."""
        return Manifest.from_json(self.document(f"{url}/v1/manifest", timeout=DOCUMENT_TIMEOUT_S))

    def blocks(self, url: str, node_id: str, manifest: Manifest) -> PeerBlocks:
        """What the peer has published, from its shard map. Raises ManifestError if it is of another manifest."""
        document = self.document(f"{url}/v1/shard-map", params={"scope": "node"}, timeout=DOCUMENT_TIMEOUT_S)
        if document.get("manifest_digest") != manifest.digest:
            raise ManifestError(f"{node_id} has manifest {document.get('manifest_digest')}, we have {manifest.digest}")
        try:
            return self._blocks(document, node_id, manifest)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ManifestError(f"{url}: not a shard map: {error!r}") from error

    def has_consumer(self, url: str, consumer_id: str) -> bool:
        """Whether the peer answers, and that consumer is registered with it."""
        try:
            self.request("GET", f"{url}/v1/consumers/{quoted(consumer_id)}")
        except (NodeUnreachable, NodeRefused):
            return False
        return True

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

"""Reading a shard map: who has which block, as a node tells it over HTTP. Nothing in it is trusted.

One parser for nodes, which ask each other what each has itself, and for engines, which ask one what it knows of all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from shm.block import DENSE
from shm.checksum import CHECKSUM_NBYTES
from shm.errors import BlockUnavailable, ManifestError
from shm.manifest import Manifest


class Replica(NamedTuple):
    """Where a block is: `address` in the memory of that session's process."""

    node_id: str
    session_id: str
    address: int


class Mapped(NamedTuple):
    """A block that nodes have, and its xxh3-128."""

    checksum: bytes
    replicas: tuple[Replica, ...]


def read_shard_map(document: Mapping[str, Any], manifest: Manifest) -> dict[int, Mapped]:
    """Manifest row → who has the block. Raises ManifestError for the map of another manifest, and for what is none."""
    if document.get("manifest_digest") != manifest.digest:
        raise ManifestError(f"it has manifest {document.get('manifest_digest')}, not {manifest.digest}")
    try:
        return dict(_mapped(entry, manifest) for entry in _entries(document))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, BlockUnavailable) as error:
        raise ManifestError(f"not a shard map: {error!r}") from error


def _entries(document: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield from document["experts"]
    yield from document.get("dense", ())


def _mapped(entry: Mapping[str, Any], manifest: Manifest) -> tuple[int, Mapped]:
    layer = DENSE if entry["layer"] is None else entry["layer"]
    replicas = tuple(Replica(str(r["node_id"]), str(r["session_id"]), int(r["address"])) for r in entry["replicas"])
    return manifest.index(layer, entry.get("expert", DENSE)), Mapped(_checksum(entry["checksum"]), replicas)


def _checksum(digits: str) -> bytes:
    checksum = bytes.fromhex(digits)
    if len(checksum) != CHECKSUM_NBYTES:
        raise ValueError(f"{digits!r} is no checksum")
    return checksum

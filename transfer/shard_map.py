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

TEXT_CHARS_MAX = 600  # names have at most 200 characters, a session is a host name of 253 and a port
ADDRESS_END = 1 << 64


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
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, BlockUnavailable) as error:
        raise ManifestError(f"not a shard map: {error!r}") from error


def _entries(document: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield from document["experts"]
    yield from document.get("dense", ())


def _mapped(entry: Mapping[str, Any], manifest: Manifest) -> tuple[int, Mapped]:
    layer = DENSE if entry["layer"] is None else entry["layer"]
    replicas = tuple(Replica(r["node_id"], r["session_id"], r["address"]) for r in entry["replicas"])
    for replica in replicas:
        _check(replica)
    return manifest.index(layer, entry.get("expert", DENSE)), Mapped(_checksum(entry["checksum"]), replicas)


def _check(replica: Replica) -> None:
    node_id, session_id, address = replica
    if (
        not (isinstance(node_id, str) and isinstance(session_id, str))
        or len(node_id) + len(session_id) > TEXT_CHARS_MAX
    ):
        raise ValueError(f"a replica at {node_id!r:.40} ({session_id!r:.40}) is none")
    if type(address) is not int or not 0 <= address < ADDRESS_END:
        raise ValueError(f"{address!r:.40} is no address")


def read_text(document: Mapping[str, Any], name: str) -> str:
    """A text of a document that somebody else wrote. Raises ManifestError."""
    value = document.get(name)
    if not isinstance(value, str) or len(value) > TEXT_CHARS_MAX:
        raise ManifestError(f"not a node's document: {name} is {value!r:.40}, not a text of {TEXT_CHARS_MAX} at most")
    return value


def _checksum(digits: str) -> bytes:
    checksum = bytes.fromhex(digits)
    if len(checksum) != CHECKSUM_NBYTES:
        raise ValueError(f"{digits!r} is no checksum")
    return checksum

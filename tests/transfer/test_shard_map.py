"""A shard map that makes sense, and the ways in which one does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from shm.errors import ManifestError
from shm.manifest import Manifest
from transfer.shard_map import Mapped, Replica, read_shard_map

CHECKSUM = "3a" * 16


def document(manifest: Manifest, **changes: Any) -> dict[str, Any]:
    entry = {
        "layer": 1, "expert": 3, "checksum": CHECKSUM,
        "replicas": [
            {"node_id": "n0", "session_id": "h:1", "address": 33}, {"node_id": "n1", "session_id": "h:2", "address": 7},
        ],
    }  # fmt: skip
    return {"manifest_digest": manifest.digest, "experts": [entry | changes], "dense": []}


@pytest.fixture
def manifest(make_manifest: Callable[..., Manifest]) -> Manifest:
    return make_manifest()


def test_every_replica_of_a_block_is_read_by_row(manifest: Manifest) -> None:
    assert read_shard_map(document(manifest), manifest) == {
        manifest.index(1, 3): Mapped(bytes.fromhex(CHECKSUM), (Replica("n0", "h:1", 33), Replica("n1", "h:2", 7)))
    }


def test_dense_blocks_are_read_too_and_need_not_be_there(manifest: Manifest) -> None:
    told = document(manifest)
    told["dense"] = [{**told["experts"][0], "layer": None}]
    del told["dense"][0]["expert"]
    with pytest.raises(ManifestError, match="no expert -1 in layer -1"):  # of this manifest
        read_shard_map(told, manifest)
    del told["dense"]
    assert len(read_shard_map(told, manifest)) == 1


def test_a_map_of_another_manifest_is_refused(manifest: Manifest) -> None:
    with pytest.raises(ManifestError, match="it has manifest 33, not"):
        read_shard_map(document(manifest) | {"manifest_digest": "33"}, manifest)


@pytest.mark.parametrize(
    "changed",
    [
        {"layer": 9}, {"layer": "x"}, {"layer": [1]}, {"checksum": "00"}, {"checksum": "no hex"}, {"checksum": None},
        {"replicas": [{}]}, {"replicas": 3}, {"replicas": [3]}, {"replicas": None},
        {"replicas": [{"node_id": "p", "session_id": "s", "address": "x"}]},
        {"replicas": [{"node_id": "p", "session_id": "s", "address": 1 << 64}]},
        {"replicas": [{"node_id": "p", "session_id": "s", "address": -1}]},
        {"replicas": [{"node_id": "p", "session_id": "s", "address": 1e300}]},
        {"replicas": [{"node_id": ["p"], "session_id": "s", "address": 3}]},
        {"replicas": [{"node_id": "p", "session_id": "s" * 601, "address": 3}]},
        {"layer": 1e300}, {"layer": True, "expert": 1 << 70},
    ],
    ids=str,
)  # fmt: skip
def test_a_map_that_makes_no_sense_is_refused(manifest: Manifest, changed: dict[str, Any]) -> None:
    with pytest.raises(ManifestError, match="not a shard map"):
        read_shard_map(document(manifest, **changed), manifest)


@pytest.mark.parametrize("experts", [None, 3, [3], "x"], ids=str)
def test_a_list_that_is_none_is_refused(manifest: Manifest, experts: Any) -> None:
    with pytest.raises(ManifestError, match="not a shard map"):
        read_shard_map(document(manifest) | {"experts": experts}, manifest)

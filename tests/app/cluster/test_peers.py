"""What the client makes of peers that answer oddly, slowly or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import orjson
import pytest

from app.cluster.peers import PeerClient
from shm.errors import ManifestError
from shm.manifest import Manifest
from transfer.client.http import NodeRefused, NodeUnreachable

CHECKSUM = "0123456789abcdef" * 2


@pytest.fixture
def client() -> Iterator[PeerClient]:
    made = PeerClient()
    yield made
    made.close()


@pytest.fixture
def manifest(make_manifest: Callable[..., Manifest]) -> Manifest:
    return make_manifest()


def shard_map(manifest: Manifest, **changed: Any) -> dict[str, Any]:
    replica = {"node_id": "p", "session_id": "127.0.0.1:33", "address": 3333}
    entry = {"layer": 1, "expert": 3, "nbytes": 7, "checksum": CHECKSUM, "replicas": [replica]}
    return {
        "model": manifest.model, "manifest_digest": manifest.digest, "revision": "r1", "experts": [entry | changed],
        "dense": [],
    }  # fmt: skip


def test_what_a_peer_published_is_read_by_manifest_row(
    client: PeerClient, odd_peer: Callable[[], Any], manifest: Manifest
) -> None:
    peer = odd_peer()
    peer.answers["GET /v1/shard-map"] = 200, orjson.dumps(shard_map(manifest))
    found = client.blocks(peer.url, "p", manifest)
    assert found.blocks == {manifest.index(1, 3): (3333, bytes.fromhex(CHECKSUM))}
    assert (found.session_id, found.revision) == ("127.0.0.1:33", "r1")


def test_replicas_of_other_nodes_are_not_the_peers(
    client: PeerClient, odd_peer: Callable[[], Any], manifest: Manifest
) -> None:
    peer = odd_peer()
    peer.answers["GET /v1/shard-map"] = 200, orjson.dumps(shard_map(manifest))
    assert client.blocks(peer.url, "q", manifest).blocks == {}


@pytest.mark.parametrize(
    "changed",
    [
        {"layer": 9}, {"layer": "x"}, {"checksum": "00"}, {"checksum": "no hex"}, {"checksum": None},
        {"replicas": [{}]}, {"replicas": 3}, {"replicas": [{"node_id": "p", "session_id": "s", "address": "x"}]},
    ],
    ids=str,
)  # fmt: skip
def test_a_map_that_makes_no_sense_is_refused(
    client: PeerClient, odd_peer: Callable[[], Any], manifest: Manifest, changed: dict[str, Any]
) -> None:
    peer = odd_peer()
    peer.answers["GET /v1/shard-map"] = 200, orjson.dumps(shard_map(manifest, **changed))
    with pytest.raises(ManifestError, match="not a shard map"):
        client.blocks(peer.url, "p", manifest)


def test_a_map_of_another_manifest_is_refused(
    client: PeerClient, odd_peer: Callable[[], Any], manifest: Manifest
) -> None:
    peer = odd_peer()
    peer.answers["GET /v1/shard-map"] = 200, orjson.dumps(shard_map(manifest) | {"manifest_digest": "33"})
    with pytest.raises(ManifestError, match=r"p .*has manifest 33"):
        client.blocks(peer.url, "p", manifest)


def test_a_manifest_that_was_changed_on_the_way_is_refused(
    client: PeerClient, odd_peer: Callable[[], Any], manifest: Manifest
) -> None:
    peer = odd_peer()
    document = manifest.to_json()
    peer.answers["GET /v1/manifest"] = 200, orjson.dumps(document)
    assert client.manifest(peer.url) == manifest
    document["family"] = "another"
    peer.answers["GET /v1/manifest"] = 200, orjson.dumps(document)
    with pytest.raises(ManifestError, match="does not match its digest"):
        client.manifest(peer.url)


def test_a_refusal_carries_status_and_problem(client: PeerClient, odd_peer: Callable[[], Any]) -> None:
    peer = odd_peer()
    peer.answers["*"] = 409, orjson.dumps({"detail": "it is so"})
    with pytest.raises(NodeRefused, match="409 it is so") as refused:
        client.node(peer.url)
    assert (refused.value.status, refused.value.problem) == (409, {"detail": "it is so"})
    peer.answers["*"] = 500, b"<html>"
    with pytest.raises(NodeRefused, match="500") as refused:
        client.node(peer.url)
    assert refused.value.problem == {}


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'"x"', b"\xff"])
def test_another_kind_of_server_is_told_from_a_node(
    client: PeerClient, odd_peer: Callable[[], Any], body: bytes
) -> None:
    peer = odd_peer()
    peer.answers["*"] = 200, body
    with pytest.raises(NodeUnreachable, match="does not answer like a Hotspare node"):
        client.node(peer.url)


def test_nobody_there_is_unreachable(client: PeerClient, odd_peer: Callable[[], Any]) -> None:
    peer = odd_peer()
    peer.close()
    with pytest.raises(NodeUnreachable, match="ConnectError"):
        client.node(peer.url)


def test_an_address_that_is_none_is_unreachable(client: PeerClient) -> None:
    with pytest.raises(NodeUnreachable):
        client.node("http://exa mple:\x00")


def test_a_map_of_more_replicas_than_the_peer_can_have_is_cut_off(
    client: PeerClient, odd_peer: Callable[[], Any], manifest: Manifest
) -> None:
    peer = odd_peer()
    replica = {"node_id": "p", "session_id": "127.0.0.1:33", "address": 3333}
    peer.answers["*"] = 200, orjson.dumps(shard_map(manifest, replicas=[replica] * 100_000))
    with pytest.raises(NodeUnreachable, match="more than such a document of ours has"):
        client.blocks(peer.url, "p", manifest)


def test_the_token_is_shown_to_peers(odd_peer: Callable[[], Any]) -> None:
    peer = odd_peer()
    peer.answers["*"] = 200, b"{}"
    for token, shown in (("t33", "Bearer t33"), (None, None)):
        client = PeerClient(token)
        client.node(peer.url)
        client.close()
        assert peer.headers[-1].get("authorization") == shown


def test_proxies_of_the_environment_are_not_for_peers(
    odd_peer: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    peer = odd_peer()
    peer.answers["*"] = 200, b'{"a": 33}'
    client = PeerClient()
    assert client.node(peer.url) == {"a": 33}
    client.close()

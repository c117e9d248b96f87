"""What nodes say to an engine: read if it makes sense, else an error of ours, whatever it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import orjson
import pytest

from shm.errors import HotspareError
from shm.manifest import Manifest
from tests.liars import OK, lying, says
from transfer.client.control_plane import ControlPlane
from transfer.client.http import NodeUnreachable
from transfer.client.pinned_content import PinnedContent

NODE = {
    "node_id": "n", "model": "moe", "namespace": "default", "session_id": "127.0.0.1:33", "segment": "hotspare.moe.n",
    "blocks_unproved": 0,
}  # fmt: skip
OTHER = {"node_id": "p", "url": "http://127.0.0.1:9/", "state": "alive"}
ODD = (None, 3.3, 1e300, True, [], {}, "x" * 4000, [[]] * 33)


@pytest.fixture
def ask() -> Iterator[Callable[..., Any]]:
    """`ask(document, what)` → what `what(control, url)` makes of a node that answers everything with the document."""

    def with_answer(document: Any, what: Callable[[ControlPlane, str], Any]) -> Any:
        body = orjson.dumps(document)
        with lying(says(OK, b"Content-Length: %d\r\n\r\n" % len(body), body)) as url:
            control = ControlPlane(url, None)
            try:
                return what(control, url)
            finally:
                control.close()

    return with_answer


def test_a_node_and_those_that_it_knows_are_remembered(ask: Callable[..., Any]) -> None:
    assert ask(NODE | {"more": 3}, lambda control, url: control.node(url).session_id) == "127.0.0.1:33"
    own = {"node_id": "n", "url": "http://127.0.0.1:8/", "self": True}

    def learn(control: ControlPlane, url: str) -> tuple[str, list[str]]:
        return control.learn(url), control.urls[1:]

    assert ask({"nodes": [own, OTHER]}, learn) == ("n", ["http://127.0.0.1:9"])


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: repr(odd)[:20])
@pytest.mark.parametrize("field", NODE)
def test_an_account_that_makes_no_sense_is_an_error_of_ours(ask: Callable[..., Any], field: str, odd: Any) -> None:
    with pytest.raises(NodeUnreachable, match=f"not answer like a Hotspare node.*{field}"):
        ask(NODE | {field: odd}, lambda control, url: control.node(url))


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: repr(odd)[:20])
def test_a_list_of_nodes_that_makes_no_sense_is_an_error_of_ours(ask: Callable[..., Any], odd: Any) -> None:
    lists = [{"nodes": odd}, {"nodes": [odd]}, {"nodes": [OTHER | {"node_id": odd}]}, {"nodes": [OTHER | {"url": odd}]}]
    for said in [odd, *lists]:
        if said == {"nodes": []}:  # it knows nobody
            continue
        with pytest.raises(NodeUnreachable, match="not answer like a Hotspare node"):
            ask(said, lambda control, url: control.learn(url))


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: repr(odd)[:20])
def test_maps_and_manifests_that_make_no_sense_are_errors_of_ours(
    ask: Callable[..., Any], make_manifest: Callable[..., Manifest], odd: Any
) -> None:
    manifest = make_manifest()
    right = {
        "node_id": "n", "manifest_digest": manifest.digest, "content_digest": "33" * 16, "experts": [], "dense": [],
    }  # fmt: skip
    for field in right:
        if field == "dense" and odd in ([], {}):
            continue
        if field == "experts" and odd in ([], {}):
            continue
        with pytest.raises(HotspareError):
            ask(right | {field: odd}, lambda control, url: control.shard_map(url, manifest, PinnedContent(), [0]))
    for field in manifest.to_json():
        with pytest.raises(HotspareError):
            ask(manifest.to_json() | {field: odd}, lambda control, url: control.manifest(url))

"""Other weights under the same name, node by node: what docs/upgrades.md promises.

A and B have the same names, shapes and headers, and so the same manifest. They are never replicas of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from shm import ExpertKey

Blocks = Mapping[ExpertKey, bytes]
NODES = ("n0", "n1", "n2")


@pytest.fixture
def ports(free_port: Callable[[], int]) -> dict[str, int]:
    return {node: free_port() for node in NODES}


@pytest.fixture
def other(write_moe: Callable[..., Path], tmp_path: Path) -> Path:
    """B: other bytes under the headers of `moe_checkpoint`, which is A."""
    return write_moe(tmp_path / "b", seed=4)


@pytest.fixture
def cluster(serve: Callable[..., Any], ports: dict[str, int], moe_checkpoint: Path) -> dict[str, Any]:
    """Three nodes with A, each block on two of them."""
    nodes = {node: serve(node, ports, checkpoint=moe_checkpoint, replicas=2) for node in NODES}
    for node in nodes.values():
        node.wait_ready().wait_alive(*(set(NODES) - {node.node_id}))
    return nodes


def content_of(node: Any) -> str:
    return str(node.get("/v1/node")["content_digest"])


def test_a_node_with_other_weights_is_in_conflict_and_no_replica(
    cluster: dict[str, Any],
    serve: Callable[..., Any],
    ports: dict[str, int],
    other: Path,
    namespace: str,
    held: Callable[..., Blocks],
    expected_blocks: Callable[..., Blocks],
    wait_until: Callable[..., Any],
) -> None:
    first = content_of(cluster["n0"])
    cluster["n2"].stop()
    second = serve("n2", ports, checkpoint=other, replicas=2).wait_ready()
    assert second.get("/v1/node")["manifest_digest"] == cluster["n0"].get("/v1/node")["manifest_digest"]
    assert content_of(second) != first
    assert held(namespace, "n2").items() <= expected_blocks(other).items()

    def conflict() -> Any:
        return next(n["conflict"] for n in cluster["n0"].get("/v1/nodes")["nodes"] if n["node_id"] == "n2")

    assert "other weights under the same names" in wait_until(conflict, "n0 sees that n2 has other weights")
    counts = cluster["n0"].get("/v1/coverage")["total"]["by_replicas"]
    assert counts["2"] < 39, "what n2 has of B is no replica of A"
    checksums = {e["checksum"] for e in cluster["n0"].get("/v1/shard-map")["experts"]}
    replicas = {r["node_id"] for e in cluster["n0"].get("/v1/shard-map")["experts"] for r in e["replicas"]}
    assert replicas == {"n0", "n1"}
    assert not checksums & {e["checksum"] for e in second.get("/v1/shard-map")["experts"]}


def test_an_empty_node_takes_what_most_have(
    cluster: dict[str, Any],
    serve: Callable[..., Any],
    free_port: Callable[[], int],
    ports: dict[str, int],
    other: Path,
    namespace: str,
    held: Callable[..., Blocks],
    expected_blocks: Callable[..., Blocks],
    moe_checkpoint: Path,
) -> None:
    """It filled itself from both, and sealed that."""
    cluster["n2"].stop()
    serve("n2", ports, checkpoint=other, replicas=2).wait_ready()
    empty = serve("n3", {**ports, "n3": free_port()}, replicas=2).wait_ready()
    assert content_of(empty) == content_of(cluster["n0"])
    assert held(namespace, "n3").items() <= expected_blocks(moe_checkpoint).items()
    assert "n2: other weights than most" in empty.said()


def test_rolling_node_by_node_ends_with_the_new_weights_everywhere(
    cluster: dict[str, Any],
    serve: Callable[..., Any],
    ports: dict[str, int],
    other: Path,
    namespace: str,
    held: Callable[..., Blocks],
    expected_blocks: Callable[..., Blocks],
    moe_checkpoint: Path,
    wait_until: Callable[..., Any],
) -> None:
    old, new = expected_blocks(moe_checkpoint), expected_blocks(other)
    for done, node in enumerate(NODES, 1):
        cluster[node].stop()
        cluster[node] = serve(node, ports, checkpoint=other, replicas=2).wait_ready()
        for number, each in enumerate(NODES):
            assert held(namespace, each).items() <= (new if number < done else old).items()
    assert len({content_of(node) for node in cluster.values()}) == 1
    wait_until(lambda: cluster["n0"].get("/v1/coverage")["total"]["by_replicas"].get("2") == 39, "two replicas of all")
    assert set().union(*(held(namespace, node) for node in NODES)) == set(new)
    from_disk = sum(node.bytes_by_source()["disk"] for node in cluster.values())
    assert from_disk == sum(map(len, new.values())), "no byte was read twice: the second replica came from the first"

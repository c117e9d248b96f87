"""Where a starting node's bytes come from: peers, else the disk, as it was told; and whose weights win."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from shm import ExpertKey, HotspareError

Blocks = Mapping[ExpertKey, bytes]
Held = Callable[..., Blocks]


@pytest.fixture
def ports(free_port: Callable[[], int]) -> dict[str, int]:
    return {f"n{i}": free_port() for i in range(2)}


def test_a_node_without_a_checkpoint_has_everything_from_its_peers(
    serve: Callable[..., Any],
    ports: dict[str, int],
    namespace: str,
    moe_checkpoint: Path,
    expected_blocks: Callable[..., Blocks],
    held: Held,
) -> None:
    empty = serve("n1", ports).wait_live()  # first: it waits for a peer that has a manifest
    assert empty.ask("GET", "/readyz").status_code == 503
    serve("n0", ports, checkpoint=moe_checkpoint).wait_ready()
    empty.wait_ready()
    expected = expected_blocks(moe_checkpoint)
    assert held(namespace, "n1") == expected
    assert empty.bytes_by_source() == {"local": 0, "peer": sum(map(len, expected.values())), "disk": 0}


def test_peers_come_before_the_disk(
    serve: Callable[..., Any],
    ports: dict[str, int],
    namespace: str,
    moe_checkpoint: Path,
    held: Held,
) -> None:
    serve("n0", ports, checkpoint=moe_checkpoint).wait_ready()
    second = serve("n1", ports, checkpoint=moe_checkpoint).wait_ready()
    assert second.bytes_by_source()["disk"] == 0
    assert held(namespace, "n1") == held(namespace, "n0")


def test_the_disk_alone_when_told_so(
    serve: Callable[..., Any], ports: dict[str, int], namespace: str, moe_checkpoint: Path
) -> None:
    serve("n0", ports, checkpoint=moe_checkpoint).wait_ready()
    second = serve("n1", ports, checkpoint=moe_checkpoint, fill="disk").wait_ready()
    assert second.bytes_by_source()["peer"] == 0


def test_nothing_until_a_restore_is_asked_for(
    serve: Callable[..., Any], ports: dict[str, int], namespace: str, moe_checkpoint: Path
) -> None:
    serve("n0", ports, checkpoint=moe_checkpoint).wait_ready()
    second = serve("n1", ports, checkpoint=moe_checkpoint, fill="none").wait_live().wait_alive("n0")
    assert second.get("/v1/restores")["restores"] == []
    assert second.get("/v1/node")["state"] == "waiting"
    document = second.wait_restore(second.restore())
    assert document["state"] == "succeeded"
    second.wait_ready()


def test_peers_with_other_weights_never_win_over_the_checkpoint(
    serve: Callable[..., Any],
    ports: dict[str, int],
    namespace: str,
    moe_checkpoint: Path,
    tmp_path: Path,
    expected_blocks: Callable[..., Blocks],
    held: Held,
    write_moe: Callable[..., Path],
) -> None:
    """Same names, same headers, other bytes: peers still hold the model as it was before it was exchanged."""
    other = write_moe(tmp_path / "other", seed=4)
    serve("n0", ports, checkpoint=moe_checkpoint).wait_ready()
    second = serve("n1", ports, checkpoint=other)
    expected = expected_blocks(other)
    sealed_with: list[Blocks] = []
    second.wait_live()
    while True:  # nobody may attach to the wrong ones meanwhile
        with suppress(HotspareError):
            sealed_with.append(held(namespace, "n1"))
        if second.ask("GET", "/readyz").status_code == 200:
            break
    assert all(found == expected for found in sealed_with)
    assert held(namespace, "n1") == expected
    assert second.bytes_by_source()["peer"] == 0
    (peer,) = (n for n in second.get("/v1/nodes")["nodes"] if n["node_id"] == "n0")
    assert "other weights under the same names" in peer["conflict"]


def test_a_checkpoint_that_comes_back_serves_again(
    serve: Callable[..., Any],
    free_port: Callable[[], int],
    namespace: str,
    moe_checkpoint: Path,
    tmp_path: Path,
    expected_blocks: Callable[..., Blocks],
    held: Held,
) -> None:
    """It went between the headers and the bytes; the node goes on by itself when it is there again."""
    directory = Path(shutil.copytree(moe_checkpoint, tmp_path / "there"))
    ports = {"n0": free_port()}
    daemon = serve("n0", ports, checkpoint=directory, fill="none").wait_live()
    directory.rename(tmp_path / "away")
    document = daemon.wait_restore(daemon.restore())
    assert document["state"] == "failed"
    assert len(document["failed"]) == 39
    assert "cannot be opened" in document["failed"][0]["reason"]
    assert daemon.ask("GET", "/readyz").status_code == 503
    (tmp_path / "away").rename(directory)
    assert daemon.wait_restore(daemon.restore())["state"] == "succeeded"
    daemon.wait_ready()
    assert held(namespace, "n0") == expected_blocks(moe_checkpoint)

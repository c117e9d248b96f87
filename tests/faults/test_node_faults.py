"""Nodes that die, stop, lie or lose their memory in the middle of a restore. Real processes, over loopback.

What is stopped with SIGSTOP holds its connections and answers nothing: so a restore is caught in the middle for sure,
and whatever happens next happens there.
"""

from __future__ import annotations

import http.server
import mmap
import os
import random
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.cluster.placement import Placement
from shm import ExpertKey, attach, posix
from shm.errors import BlockUnavailable, SegmentUnsealed
from shm.layout import BlockState, SegmentName
from shm.segment import Segment
from tests.processes import DEADLINE_S
from transfer.checkpoint import read_checkpoint

Blocks = Mapping[ExpertKey, bytes]
Held = Callable[..., Blocks]
PATIENT_S = 77  # what the engine may wait; for the first word of a stopped process it waits a minute anyhow
RESTORED_WITHIN_S = 40  # far less than that, and far more than a restore takes on a busy machine
QUICK = {"MC_TRANSFER_TIMEOUT": "5"}  # seconds; the least that Mooncake takes


def knows(daemon: Any, *nodes: str, replicas: int) -> bool:
    """Whether the daemon has the maps of these peers: every block with that many replicas."""
    experts = daemon.get("/v1/shard-map?scope=cluster")["experts"]
    holders = [{replica["node_id"] for replica in expert["replicas"]} for expert in experts]
    return bool(holders) and all(len(h & set(nodes)) >= replicas for h in holders)


@pytest.fixture
def ports(free_port: Callable[[], int]) -> dict[str, int]:
    return {f"n{i}": free_port() for i in range(4)}


class Echo:
    """A node's control plane that goes on saying what it last said while its process is stopped.

    Otherwise peers would notice at their next look, before a restore could be caught in the middle of a transfer.
    """

    def __init__(self, port: int) -> None:
        self._is_frozen = False
        self._asking = threading.Lock()
        said: dict[str, bytes] = {}
        echo = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with echo._asking:
                    if not echo._is_frozen:
                        answer = httpx.get(f"http://127.0.0.1:{port}{self.path}", trust_env=False, timeout=DEADLINE_S)
                        said[self.path] = answer.content
                self.send_response(200)
                self.send_header("Content-Length", str(len(said[self.path])))
                self.end_headers()
                self.wfile.write(said[self.path])

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def freeze(self) -> None:
        """Ask the node no more: once this returns, no question is on its way to it either."""
        with self._asking:
            self._is_frozen = True

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@dataclass
class Trio:
    """n0 and n1 hold every block; n2, the target, should, has one block from each, and knows both."""

    bad: Any
    good: Any
    target: Any
    ports: Mapping[str, int]
    _echo: Echo
    _wait_until: Callable[..., Any]

    def catch(self) -> str:
        """Start a restore of all of n2 and stop n0 in the middle of it; the restore's id."""
        self._echo.freeze()
        self.bad.pause()
        restore_id = str(self.target.restore(sources=["peer"]))

        def is_in_the_middle() -> bool:
            document = self.target.get(f"/v1/restores/{restore_id}")
            return bool(document["state"] == "running" and 0 < document["blocks_done"] < document["blocks_total"])

        self._wait_until(is_in_the_middle, "the restore is in the middle")
        return restore_id


def has_scrubbed(daemon: Any) -> bool:
    found = re.search(r'^hotspare_scrubbed_blocks_total{found="right"} (\S+)', daemon.ask("GET", "/metrics").text, re.M)
    return found is not None and float(found[1]) > 0


@pytest.fixture
def trio(
    serve: Callable[..., Any], ports: dict[str, int], moe_checkpoint: Path, wait_until: Callable[..., Any]
) -> Iterator[Trio]:
    three = {node: ports[node] for node in ("n0", "n1", "n2")}
    options: dict[str, Any] = {"checkpoint": moe_checkpoint, "replicas": 3, "env": QUICK, "scrub_rate": 1}
    bad, good = (serve(node, three, fill="disk", **options).wait_ready() for node in ("n0", "n1"))
    echo = Echo(three["n0"])
    target = serve("n2", {**three, "n0": echo.port}, fill="none", **options).wait_live()
    try:
        wait_until(lambda: knows(target, "n0", "n1", replicas=2), "the target has both maps")
        for node in (bad, good):
            wait_until(lambda node=node: has_scrubbed(node), f"{node.node_id} has proved a block, and rests for days")
        warm = target.wait_restore(target.restore(experts=[{"layer": 3, "expert": e} for e in (0, 1)]))
        assert warm["state"] == "succeeded", warm  # and the engine has a connection to both
        yield Trio(bad, good, target, three, echo, wait_until)
    finally:
        bad.resume()
        echo.close()


@pytest.mark.parametrize("fault", ["killed", "stopped"])
def test_a_source_that_goes_in_the_middle_is_replaced_by_the_other_replica(
    trio: Trio,
    namespace: str,
    moe_checkpoint: Path,
    expected_blocks: Callable[..., Blocks],
    fault: str,
    held: Held,
) -> None:
    restore_id = trio.catch()
    if fault == "killed":
        trio.bad.kill()
    document = trio.target.wait_restore(restore_id)
    expected = expected_blocks(moe_checkpoint)
    assert document["state"] == "succeeded", document
    there = sum(len(expected[3, expert]) for expert in (0, 1))
    brought = sum(map(len, expected.values())) - there
    assert document["bytes_by_source"] == {"local": there, "peer": brought, "disk": 0}
    assert held(namespace, "n2") == expected
    trio.target.wait_ready()


def test_a_peer_that_does_not_answer_is_left_aside_and_costs_no_timeout(
    serve: Callable[..., Any],
    ports: dict[str, int],
    namespace: str,
    moe_checkpoint: Path,
    expected_blocks: Callable[..., Blocks],
    wait_until: Callable[..., Any],
    held: Held,
) -> None:
    """The engine would wait a minute for the first word of a stopped process, and move nothing else meanwhile."""
    patient = {"MC_TRANSFER_TIMEOUT": str(PATIENT_S)}
    three = {node: ports[node] for node in ("n0", "n1", "n2")}
    options: dict[str, Any] = {"checkpoint": moe_checkpoint, "replicas": 3, "env": patient}
    stopped, _ = (serve(node, three, fill="disk", **options).wait_ready() for node in ("n0", "n1"))
    target = serve("n2", three, fill="none", **options).wait_live()
    wait_until(lambda: knows(target, "n0", "n1", replicas=2), "the target has both maps")
    stopped.pause()
    document = target.wait_restore(target.restore())
    assert document["state"] == "succeeded", document
    # From whom is not said: on a busy machine the other peer may be late with its answer too, and the disk is next.
    assert seconds(document) < RESTORED_WITHIN_S
    assert held(namespace, "n2") == expected_blocks(moe_checkpoint)


def seconds(document: Mapping[str, Any]) -> float:
    started, finished = (datetime.fromisoformat(document[f"{moment}_at"]) for moment in ("started", "finished"))
    return (finished - started).total_seconds()


def flip(namespace: str, node: str, rows: list[int], manifest_rows: Mapping[int, tuple[int, int]]) -> None:
    """Flip one bit of each of these blocks in the node's memory, behind its back."""
    fd = posix.open_existing(SegmentName(namespace, "moe", node).object_name, read_only=False)
    with mmap.mmap(fd, 0) as memory:
        for row in rows:
            offset, nbytes = manifest_rows[row]
            memory[offset + nbytes // 3] ^= 4
    os.close(fd)


def test_a_replica_that_rotted_is_never_served_as_good_and_can_be_mended(
    trio: Trio,
    namespace: str,
    moe_checkpoint: Path,
    expected_blocks: Callable[..., Blocks],
    held: Held,
) -> None:
    target = trio.target
    expected = expected_blocks(moe_checkpoint)
    keys = sorted(expected)
    rows = random.Random(3).sample(range(len(keys)), 17)
    with attach("moe", namespace=namespace, node="n0") as weights:
        start = weights._address
        places = {row: (weights.address(row) - start, len(weights.block(row))) for row in range(len(keys))}
        flip(namespace, "n0", rows, places)
        assert sorted(weights.verify()) == sorted(keys[row] for row in rows)
    document = target.wait_restore(target.restore(sources=["peer"]))
    assert document["state"] == "succeeded", document
    assert held(namespace, "n2") == expected
    mended = trio.bad.wait_restore(trio.bad.restore(sources=["peer"]))
    rotten = sum(len(expected[keys[row]]) for row in rows)
    assert mended["bytes_by_source"] == {
        "local": sum(map(len, expected.values())) - rotten, "peer": rotten, "disk": 0,
    }  # fmt: skip
    assert held(namespace, "n0") == expected


@pytest.mark.parametrize("may_use_disk", [True, False], ids=["disk", "peers alone"])
def test_a_block_that_rotted_everywhere_comes_from_disk_or_is_named_and_its_holder_mends_it(
    trio: Trio,
    namespace: str,
    moe_checkpoint: Path,
    expected_blocks: Callable[..., Blocks],
    held: Held,
    may_use_disk: bool,
    wait_until: Callable[..., Any],
) -> None:
    target = trio.target
    expected = expected_blocks(moe_checkpoint)
    keys = sorted(expected)
    rows = random.Random(5).sample(range(2, len(keys)), 5)  # of those that the target has not
    for node in ("n0", "n1"):
        with attach("moe", namespace=namespace, node=node) as weights:
            start = weights._address
            places = {row: (weights.address(row) - start, len(weights.block(row))) for row in range(len(keys))}
        flip(namespace, node, rows, places)
    if may_use_disk:
        document = target.wait_restore(target.restore())
        assert document["bytes_by_source"]["disk"] == sum(len(expected[keys[row]]) for row in rows)
    else:
        document = target.wait_restore(target.restore(sources=["peer"]))
        assert document["state"] == "failed"
        assert sorted((f["layer"], f["expert"]) for f in document["failed"]) == sorted(keys[row] for row in rows)
        assert all("checksum" in failed["reason"] for failed in document["failed"])
        with pytest.raises(SegmentUnsealed):
            held(namespace, "n2")
    # Its own scrubber would come by in hours: but whoever read it there told it (n0 is behind an echo, and hears none).

    def is_mended() -> bool:
        with suppress(BlockUnavailable):  # hidden while it is being mended
            return held(namespace, "n1") == expected
        return False

    wait_until(is_mended, "n1 has mended its own")
    assert "arrived wrong somewhere" in trio.good.said()
    document = target.wait_restore(target.restore(sources=["peer"]))
    assert document["state"] == "succeeded"
    assert held(namespace, "n2") == expected


def test_a_target_killed_in_the_middle_starts_over_and_completes(
    trio: Trio,
    serve: Callable[..., Any],
    namespace: str,
    moe_checkpoint: Path,
    expected_blocks: Callable[..., Blocks],
    held: Held,
    segment_path: Callable[..., Path],
) -> None:
    trio.catch()
    trio.target.kill()
    with pytest.raises(SegmentUnsealed):
        held(namespace, "n2")
    before = segment_path(namespace, "n2").stat().st_ino
    trio.bad.resume()
    again = serve("n2", trio.ports, replicas=3, env=QUICK).wait_ready()
    assert segment_path(namespace, "n2").stat().st_ino != before
    assert held(namespace, "n2") == expected_blocks(moe_checkpoint)
    assert again.get("/v1/restores")["restores"][0]["bytes_by_source"]["disk"] == 0


def test_a_cancelled_restore_leaves_nothing_half_written(
    trio: Trio,
    namespace: str,
    moe_checkpoint: Path,
    expected_blocks: Callable[..., Blocks],
    held: Held,
) -> None:
    target = trio.target
    restore_id = trio.catch()
    assert target.ask("POST", f"/v1/restores/{restore_id}/cancel").status_code == 200
    document = target.wait_restore(restore_id)
    assert document["state"] == "cancelled"
    assert 0 < document["blocks_done"] < document["blocks_total"]
    with pytest.raises(SegmentUnsealed):
        held(namespace, "n2")
    expected = expected_blocks(moe_checkpoint)
    for expert in target.get("/v1/shard-map?scope=node")["experts"]:
        assert expert["replicas"], expert
    published = len(target.get("/v1/shard-map?scope=node")["experts"])
    assert published == document["blocks_done"]
    trio.bad.resume()
    document = target.wait_restore(target.restore())
    assert document["state"] == "succeeded"
    assert document["bytes_by_source"]["local"] > 0, "what was published before the cancellation is kept"
    assert held(namespace, "n2") == expected


def test_blocks_whose_replicas_are_all_gone_come_from_disk_and_only_those(
    serve: Callable[..., Any],
    ports: dict[str, int],
    namespace: str,
    moe_checkpoint: Path,
    expected_blocks: Callable[..., Blocks],
    wait_until: Callable[..., Any],
    held: Held,
    segment_path: Callable[..., Path],
) -> None:
    expected = expected_blocks(moe_checkpoint)
    manifest = read_checkpoint(moe_checkpoint, "moe").manifest
    placement = Placement.compute(manifest, ports, 2)
    options: dict[str, Any] = {"checkpoint": moe_checkpoint, "replicas": 2, "env": QUICK}
    nodes = {node: serve(node, ports, fill="none" if node == "n3" else "disk", **options) for node in ports}
    for node in ("n0", "n1", "n2"):
        nodes[node].wait_ready()
    target = nodes["n3"].wait_live().wait_alive("n0", "n1", "n2")
    for node in ("n0", "n1"):
        nodes[node].kill()
        segment_path(namespace, node).unlink()
    rows = placement.rows_of("n3").tolist()
    lost = [manifest.keys[row] for row in rows if "n2" not in placement.nodes_of(row)]
    assert 0 < len(lost) < len(rows)
    document = target.wait_restore(target.restore(sources=["peer"]))
    assert document["state"] == "failed"
    assert sorted((f["layer"], f["expert"]) for f in document["failed"]) == lost
    document = target.wait_restore(target.restore())
    assert document["state"] == "succeeded"
    assert document["bytes_by_source"]["disk"] == sum(len(expected[key]) for key in lost)
    assert held(namespace, "n3") == {manifest.keys[row]: expected[manifest.keys[row]] for row in rows}


def test_any_nodes_but_one_replica_may_die_and_come_back_from_memory(
    serve: Callable[..., Any],
    ports: dict[str, int],
    namespace: str,
    moe_checkpoint: Path,
    expected_blocks: Callable[..., Blocks],
    held: Held,
    segment_path: Callable[..., Path],
) -> None:
    """Four nodes, three replicas: any two die with their memory, and return without a checkpoint. Twice."""
    expected = expected_blocks(moe_checkpoint)
    manifest = read_checkpoint(moe_checkpoint, "moe").manifest
    placement = Placement.compute(manifest, ports, 3)
    chance = random.Random(7)
    nodes = {node: serve(node, ports, checkpoint=moe_checkpoint, replicas=3, fill="disk", env=QUICK) for node in ports}
    for node in nodes.values():
        node.wait_ready()
    for _ in range(2):
        victims = chance.sample(sorted(ports), 2)
        for node in victims:
            nodes[node].kill()
            segment_path(namespace, node).unlink()
        for node in victims:
            nodes[node] = serve(node, ports, replicas=3, env=QUICK)
        for node in victims:
            nodes[node].wait_ready()
            rows = placement.rows_of(node).tolist()
            assert held(namespace, node) == {manifest.keys[row]: expected[manifest.keys[row]] for row in rows}
            restores = nodes[node].get("/v1/restores")["restores"]
            assert sum(r["bytes_by_source"]["disk"] for r in restores) == 0


def test_a_daemon_that_crashes_serves_its_readers_on_and_adopts_a_block_that_was_being_mended(
    serve: Callable[..., Any],
    ports: dict[str, int],
    namespace: str,
    moe_checkpoint: Path,
    expected_blocks: Callable[..., Blocks],
    held: Held,
) -> None:
    """Killed while it rewrote a block of its sealed segment: the block is half-written, and known to be."""
    alone = {"n0": ports["n0"]}
    serve("n0", alone, checkpoint=moe_checkpoint).wait_ready().kill()
    with attach("moe", namespace=namespace, node="n0") as weights:
        segment = Segment.claim(SegmentName(namespace, "moe", "n0"))
        segment.quarantine(5)
        segment.block(5)[:99] = bytes(99)
        segment.close()
        assert not weights.holds(5)
        assert len(weights.rows()) == 38
        assert weights.verify() == []
        again = serve("n0", alone, checkpoint=moe_checkpoint).wait_ready()
        assert weights.holds(5), "the reader finds it again in the same mapping"
        assert weights.verify() == []
    assert held(namespace, "n0") == expected_blocks(moe_checkpoint)
    (restore,) = again.get("/v1/restores")["restores"]
    assert restore["blocks_total"] == 1
    again.stop()
    segment = Segment.claim(SegmentName(namespace, "moe", "n0"))
    assert len(segment.rows(BlockState.PUBLISHED)) == 39
    segment.close()

"""What a node publishes can be written by nobody, and what comes late reaches nothing that was published."""

from __future__ import annotations

import mmap
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shm import ExpertKey
from transfer.engine import Copy, MooncakeEngine
from transfer.errors import TransferFailed

Blocks = Mapping[ExpertKey, bytes]


@pytest.fixture(scope="module")
def stranger() -> MooncakeEngine:
    """Some process's transfer engine, that knows a node's session and addresses."""
    return MooncakeEngine("127.0.0.1")


def spellings(session_id: str) -> list[str]:
    """Other names of the same session: comparing text protects nothing."""
    port = session_id.rpartition(":")[2]
    return [session_id, *(f"{host}:{port}" for host in ("localhost", "127.0.0.2", "127.1", "0.0.0.0"))]


def test_published_blocks_can_be_read_and_not_written_by_a_peer(
    serve: Callable[..., Any],
    free_port: Callable[[], int],
    namespace: str,
    moe_checkpoint: Path,
    expected_blocks: Callable[..., Blocks],
    held: Callable[..., Blocks],
    stranger: MooncakeEngine,
    wait_until: Callable[..., Any],
) -> None:
    node = serve("n0", {"n0": free_port()}, checkpoint=moe_checkpoint).wait_ready()
    memory = np.frombuffer(mmap.mmap(-1, 4096), np.uint8)
    ours = int(memory.ctypes.data)
    blocks = node.get("/v1/shard-map")["experts"]
    replica = blocks[7]["replicas"][0]
    stranger.read(replica["session_id"], [Copy(ours, replica["address"], 3333)])
    key = ExpertKey(blocks[7]["layer"], blocks[7]["expert"])
    assert memory[:3333].tobytes() == expected_blocks(moe_checkpoint)[key][:3333]
    memory[:] = 0xA5
    for session_id in spellings(replica["session_id"]):
        with pytest.raises(TransferFailed):
            stranger.write(session_id, [Copy(replica["address"], ours, 3333)])
    assert held(namespace) == expected_blocks(moe_checkpoint)

    def is_read() -> bool:
        with suppress(TransferFailed):  # the refusals cut connections, and new ones take the engine a moment
            stranger.read(replica["session_id"], [Copy(ours, replica["address"], 3333)])
            return True
        return False

    wait_until(is_read, "it lives, and serves on")
    assert memory[:3333].tobytes() == expected_blocks(moe_checkpoint)[key][:3333]


def test_what_a_paused_peer_sends_late_reaches_no_published_block(
    serve: Callable[..., Any],
    free_port: Callable[[], int],
    namespace: str,
    moe_checkpoint: Path,
    expected_blocks: Callable[..., Blocks],
    held: Callable[..., Blocks],
    wait_until: Callable[..., Any],
) -> None:
    """It pauses with reads of ours waiting in its sockets; the blocks come from elsewhere, and are published; it wakes
    with other bytes in that memory than it had."""
    ports = {node: free_port() for node in ("n0", "n1")}
    environment = {"MC_TRANSFER_TIMEOUT": "1"}
    peer = serve("n0", ports, checkpoint=moe_checkpoint, replicas=2, env=environment).wait_ready()
    node = serve("n1", ports, checkpoint=moe_checkpoint, replicas=2, fill="none", env=environment)
    node.wait_live().wait_alive("n0")
    some = [{"layer": 3, "expert": expert} for expert in range(3)]
    assert node.wait_restore(node.restore(experts=some, sources=["peer"]))["bytes_by_source"]["peer"]  # it is connected
    peer.pause()
    restored = node.wait_restore(node.restore())
    assert restored["state"] == "succeeded"
    node.wait_ready()
    path = Path("/dev/shm") / peer_segment(peer, namespace)
    with path.open("r+b") as file:  # what lies in the peer's memory when it wakes is not what we asked for
        file.seek(path.stat().st_size // 2)
        file.write(bytes(path.stat().st_size - path.stat().st_size // 2))
    peer.signal(signal.SIGCONT)
    wait_until(lambda: peer.ask("GET", "/livez").status_code == 200, "it is awake")
    assert held(namespace, "n1") == expected_blocks(moe_checkpoint)


def test_what_a_paused_peer_sends_late_reaches_no_segment_that_took_the_place_of_the_one_it_was_for(
    serve: Callable[..., Any],
    free_port: Callable[[], int],
    namespace: str,
    moe_checkpoint: Path,
    expected_blocks: Callable[..., Blocks],
    held: Callable[..., Blocks],
    wait_until: Callable[..., Any],
) -> None:
    """The name is lost while a stopped peer is being read from: what was mapped is let go, and its addresses used."""
    ports = {node: free_port() for node in ("n0", "n1")}
    environment = {"MC_TRANSFER_TIMEOUT": "1"}
    peer = serve("n0", ports, checkpoint=moe_checkpoint, replicas=2, env=environment).wait_ready()
    node = serve("n1", ports, checkpoint=moe_checkpoint, replicas=2, env=environment).wait_ready()
    path, theirs = (Path("/dev/shm") / peer_segment(each, namespace) for each in (node, peer))
    with path.open("r+b") as file:  # every block is to come anew
        file.seek(path.stat().st_size // 2)
        file.write(bytes(path.stat().st_size - path.stat().st_size // 2))
    peer.pause()
    restore_id = node.restore()
    path.unlink()
    assert node.wait_restore(restore_id)["state"] == "succeeded"
    wait_until(lambda: path.exists() and node.ask("GET", "/readyz").status_code == 200, "it has its name again")
    with theirs.open("r+b") as file:
        file.seek(theirs.stat().st_size // 2)
        file.write(bytes(theirs.stat().st_size - theirs.stat().st_size // 2))
    peer.signal(signal.SIGCONT)
    wait_until(lambda: peer.ask("GET", "/livez").status_code == 200, "it is awake")
    assert held(namespace, "n1") == expected_blocks(moe_checkpoint)


def peer_segment(peer: Any, namespace: str) -> str:
    return next(p.name for p in Path("/dev/shm").glob(f"hotspare.{namespace}.*.{peer.node_id}*"))

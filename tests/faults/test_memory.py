"""No room: what is good goes on being served, the shortage is told, and put right by itself once there is room.

Each test is a process in a mount namespace with a /dev/shm of its own size, where a node is opened as usual.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

NODE = """
import os, sys, time
from pathlib import Path
from app.api.context import Context
from app.api.routes.node import node_document
from app.node import upkeep
from app.settings import Settings
from shm import attach
from shm.errors import HotspareError, SharedMemoryFull
from tests.processes import wait_until
from transfer.checkpoint import read_checkpoint

upkeep.RETRY_INTERVAL_S = 0.3

def start(checkpoint, **options):
    settings = {"model": "moe", "node_id": "n0", "namespace": "small", "checkpoint": checkpoint, **options}
    context = Context.open(Settings.model_validate(settings))
    context.start()
    return context

def ready(context):
    return all(context.node.checks().values())

def held():
    with attach("moe", namespace="small", node="n0") as weights:
        assert weights.verify() == []
        return {weights.manifest.keys[row]: bytes(weights.block(row)) for row in weights.rows().tolist()}

def take_all_but(nbytes):
    there = os.statvfs("/dev/shm")
    with open("/dev/shm/fat", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, there.f_bavail * there.f_frsize - nbytes)
"""


@pytest.fixture
def in_a_small_shm(python: Callable[..., Any]) -> Callable[..., str]:
    """`in_a_small_shm(code, mib, *arguments)` → what it said, after NODE."""

    def run(code: str, mib: int, *arguments: object) -> str:
        prefix = ["unshare", "-m", "sh", "-c", f'mount -t tmpfs -o size={mib}m tmpfs /dev/shm && exec "$@"', "sh"]
        if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
            pytest.skip("needs a mount namespace")
        status, said, errors = python(NODE + code + "\nos._exit(0)", *arguments, prefix=prefix).wait()
        assert status == 0, errors
        return str(said) + str(errors)

    return run


def test_a_share_that_grew_without_room_is_told_and_what_is_there_is_served(
    in_a_small_shm: Callable[..., str], moe_checkpoint: Path
) -> None:
    """The daemon exited, with a good segment in memory: its peer had left the list."""
    in_a_small_shm(
        """
peers = {"peers": {"n1": "http://127.0.0.1:9"}, "replicas": 1}
context = start(sys.argv[1], **peers)
wait_until(lambda: ready(context))
half = held()
assert 0 < len(half) < 39
context.stop()

take_all_but(1 << 20)
context = start(sys.argv[1])
node = context.node
assert node.state == "degraded" and not node.checks()["published"] and node.checks()["attachable"]
assert held() == half, "attached as before"
document = node_document(context)
assert document.blocks == len(half)
assert "no room for all of this node's share: /dev/shm has" in document.shortage, document.shortage
assert "bytes free" in document.shortage and "enlarge it" in node.problem()
failed = wait_until(lambda: [d for d in context.restores.documents() if d.state.is_final])[0].failed
assert len(failed) == 10 or len(failed) == 39 - len(half)
assert all("no room for all of this node's share" in f.reason for f in failed), failed[0]
assert len(context.restores.documents()) > 0 and held() == half
os.unlink("/dev/shm/fat")
wait_until(lambda: ready(context))
assert node.shortage is None and len(held()) == 39
context.stop()
""",
        16,
        moe_checkpoint,
    )


def test_a_new_checkpoint_without_room_leaves_the_old_weights_served_until_there_is_some(
    in_a_small_shm: Callable[..., str], moe_checkpoint: Path, write_moe: Callable[..., Path], tmp_path: Path
) -> None:
    """The old ones were thrown away first, and the daemon exited without either."""
    other = write_moe(tmp_path / "other", seed=4)
    in_a_small_shm(
        """
context = start(sys.argv[1])
wait_until(lambda: ready(context))
old, digest = held(), node_document(context).content_digest
inode = os.stat("/dev/shm/hotspare.small.moe.n0").st_ino
context.stop()

context = start(sys.argv[2])
node = context.node
assert ready(context) and held() == old
document = node_document(context)
assert (document.content_digest, document.state) == (digest, "ready")
assert "no room for the checkpoint's weights beside those that are here" in document.shortage, document.shortage
wait_until(lambda: len(context.restores.documents()) > 2)
assert os.stat("/dev/shm/hotspare.small.moe.n0").st_ino == inode and ready(context)
os.system("mount -o remount,size=32m /dev/shm")
wait_until(lambda: ready(context) and node_document(context).content_digest != digest)
assert node.shortage is None
new = held()
assert new.keys() == old.keys() and all(new[key] != old[key] for key in new)
assert os.listdir("/dev/shm") == ["hotspare.small.moe.n0"]
context.stop()
""",
        12,
        moe_checkpoint,
        other,
    )


def test_without_room_for_another_a_segment_that_lost_its_name_is_served_to_peers_and_told(
    in_a_small_shm: Callable[..., str], moe_checkpoint: Path
) -> None:
    in_a_small_shm(
        """
context = start(sys.argv[1])
wait_until(lambda: ready(context))
expected = held()
os.unlink("/dev/shm/hotspare.small.moe.n0")
wait_until(lambda: context.node.shortage)
assert "in place of the one that lost its name" in context.node.shortage
assert not ready(context) and os.listdir("/dev/shm") == []
assert len(context.node.holding.held()) == 39, "peers read on"
os.system("mount -o remount,size=32m /dev/shm")
wait_until(lambda: ready(context))
assert held() == expected
read = context.restores.bytes_by_source()
assert read["disk"] == read["local"] == sum(map(len, expected.values())), "each byte once from disk, once from memory"
context.stop()
""",
        12,
        moe_checkpoint,
    )


def test_a_node_that_has_nothing_yet_and_no_room_says_so_and_leaves_nothing(
    in_a_small_shm: Callable[..., str], moe_checkpoint: Path
) -> None:
    in_a_small_shm(
        """
try:
    start(sys.argv[1])
except SharedMemoryFull as error:
    assert error.free < error.needed
else:
    raise SystemExit("it fitted")
assert os.listdir("/dev/shm") == []
""",
        4,
        moe_checkpoint,
    )

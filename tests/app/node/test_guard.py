"""What is done to a living node's object in /dev/shm is noticed, told, and put right; READY is what readers find."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app.node.guard import Guard
from app.node.holding import Holding
from app.node.node import Node
from app.restores.store import ALL_KINDS
from shm import ExpertKey, attach
from shm.errors import SegmentBusy
from shm.layout import HEADER_NBYTES, SegmentName, copy_offset
from shm.segment import Segment

Blocks = Mapping[ExpertKey, bytes]


def spoil(path: Path, *places: int) -> None:
    """One bit of each of these bytes."""
    with path.open("r+b") as file:
        for at in places:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 16]))


def test_what_leads_to_the_blocks_is_written_anew_where_it_rotted(
    holding: Holding, namespace: str, segment_path: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    node: Any = SimpleNamespace(holding=holding, _shortages={})
    node._short_of_room = lambda what: Node._short_of_room(node, what)
    node.mend = lambda held: Node.mend(node, held)
    guard = Guard(node)
    path, header = segment_path(namespace, "n0", "tiny"), holding.segment.header
    before = path.read_bytes()[: header.data_offset]
    for at in (33, header.manifest_offset + 333, header.table_offset + 17):
        spoil(path, at)
        assert path.read_bytes()[: header.data_offset] != before
        guard._turn()
        assert path.read_bytes()[: header.data_offset] == before
    assert guard.mended == 3
    assert all(part in caplog.text for part in ("header", "manifest", "rows=(0,)"))
    node.holding = None
    guard._turn()


# -- in a daemon ---------------------------------------------------------------------------------------------------


@pytest.fixture
def live(live_node: Callable[..., Any], moe_checkpoint: Path) -> Any:
    """A node that is ready."""
    live = live_node(checkpoint=moe_checkpoint)
    assert live.context.restores.start_local(None, ALL_KINDS).finished.wait(30)
    assert live.ask("GET", "/readyz").status_code == 200
    return live


@pytest.fixture
def path(namespace: str, segment_path: Callable[..., Path]) -> Path:
    return segment_path(namespace, "n")


def is_ready(live: Any) -> bool:
    return bool(live.ask("GET", "/readyz").status_code == 200)


def restored(live: Any) -> dict[str, int]:
    return dict(live.context.restores.bytes_by_source())


def test_a_name_that_vanishes_is_told_and_taken_again_out_of_memory(
    live: Any,
    path: Path,
    namespace: str,
    moe_checkpoint: Path,
    expected_blocks: Callable[..., Blocks],
    held: Callable[..., Blocks],
    wait_until: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A cleaner, or logind's RemoveIPC: it stayed READY, nobody could attach, and a second daemon started beside it."""
    expected, before, inode = expected_blocks(moe_checkpoint), restored(live), path.stat().st_ino
    with attach("moe", namespace=namespace) as weights:
        live.context.caretaker.stop()
        path.unlink()
        answer = live.ask("GET", "/readyz")
        assert answer.status_code == 503
        assert answer.json()["checks"]["attachable"] is False
        assert "there is no /dev/shm/" in answer.json()["detail"]
        served = live.context.node.holding.held()
        restore = live.context.restores.start_local((), ALL_KINDS)
        assert restore.finished.wait(30)
        assert path.exists()
        assert live.context.node.holding.held() == served, "peers read on where they were told"
        restore = live.context.restores.start_local(None, ALL_KINDS)
        assert restore.finished.wait(30)
        assert is_ready(live)
        assert {weights.manifest.keys[row]: bytes(weights.block(row)) for row in weights.rows().tolist()} == expected
    assert path.stat().st_ino != inode
    assert held(namespace, "n") == expected
    after = restored(live)
    assert (after["disk"], after["peer"]) == (before["disk"], before["peer"]), "no weight byte was read"
    assert after["local"] - before["local"] == sum(map(len, expected.values()))
    assert "is gone from /dev/shm" in caplog.text
    assert set(live.context.node.holding.held()) == set(range(39))
    with pytest.raises(SegmentBusy):
        Segment.claim(SegmentName(namespace, "moe", "n"))


def test_the_memory_of_the_segment_without_a_name_is_let_go_after_a_while(
    live: Any, path: Path, wait_until: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever fetched a map before reads by it for some time; then the room is free again."""
    monkeypatch.setattr("app.node.node.LEFT_S", 0.3)
    monkeypatch.setattr("app.node.upkeep.RETRY_INTERVAL_S", 0.3)
    path.unlink()
    wait_until(lambda: path.exists() and is_ready(live), "it has its name again")
    wait_until(lambda: live.context.node.holding.predecessor is None, "it was let go")
    assert is_ready(live)
    wait_until(lambda: not live.context.node.is_restoring, "nothing more is done")
    gc.collect()
    maps = Path("/proc/self/maps").read_text().splitlines()
    assert not [line for line in maps if path.name in line and "(deleted)" in line]


@pytest.mark.parametrize("fill", ["auto", "none"])
def test_a_name_that_vanishes_comes_back_without_anybody_asking_and_without_any_source(
    live_node: Callable[..., Any],
    moe_checkpoint: Path,
    tmp_path: Path,
    namespace: str,
    path: Path,
    expected_blocks: Callable[..., Blocks],
    held: Callable[..., Blocks],
    wait_until: Callable[..., Any],
    fill: str,
) -> None:
    directory = tmp_path / "moe"
    directory.symlink_to(moe_checkpoint)
    live = live_node(checkpoint=directory, fill=fill)
    assert live.context.restores.start_local(None, ALL_KINDS).finished.wait(30)
    wait_until(lambda: is_ready(live), "filled")
    directory.unlink()
    for _ in range(2):
        path.unlink()
        wait_until(lambda: path.exists() and is_ready(live), "it has its name again")
        assert held(namespace, "n") == expected_blocks(moe_checkpoint)
    assert live.ask("GET", "/v1/node").json()["shortage"] is None


def test_a_name_that_another_daemon_took_is_told_and_what_is_mapped_is_served(
    live: Any, path: Path, namespace: str, wait_until: Callable[..., Any]
) -> None:
    path.unlink()
    other = Segment.claim(SegmentName(namespace, "moe", "n"))
    wait_until(
        lambda: any("is owned by process" in (d.error or "") for d in live.context.restores.documents()), "it was tried"
    )
    answer = live.ask("GET", "/readyz")
    assert (answer.status_code, "is another object now" in answer.json()["detail"]) == (503, True)
    assert len(live.ask("GET", "/v1/shard-map").json()["experts"]) == 39
    assert other.is_named(), "it is not taken from its owner"
    other.unlink()


@pytest.mark.parametrize("part", ["header", "manifest"])
def test_both_copies_damaged_are_not_ready_until_they_are_written_anew(
    live: Any, path: Path, namespace: str, wait_until: Callable[..., Any], part: str
) -> None:
    header = live.context.node.segment.header
    second = copy_offset(header.manifest_offset, header.manifest_nbytes)
    places = {"header": (33, HEADER_NBYTES + 33), "manifest": (header.manifest_offset + 99, second + 99)}[part]
    live.context.guard.loop.stop()
    spoil(path, *places)
    answer = live.ask("GET", "/readyz")
    assert (answer.status_code, answer.json()["checks"]["attachable"]) == (503, False)
    assert part in answer.json()["detail"]
    live.context.guard._turn()
    assert is_ready(live)
    assert live.context.guard.mended == 2
    attach("moe", namespace=namespace).close()


@pytest.mark.parametrize("left", [0.5, 0.0001, 0.0])
def test_an_object_that_was_cut_short_is_whole_again_and_kills_nobody(
    serve: Callable[..., Any],
    free_port: Callable[[], int],
    moe_checkpoint: Path,
    namespace: str,
    segment_path: Callable[..., Path],
    expected_blocks: Callable[..., Blocks],
    held: Callable[..., Blocks],
    wait_until: Callable[..., Any],
    left: float,
) -> None:
    """The daemon died of SIGBUS in the next restore, or where the scrubber looked."""
    daemon = serve("n0", {"n0": free_port()}, checkpoint=moe_checkpoint, scrub_rate="1GB").wait_ready()
    path, expected = segment_path(namespace), expected_blocks(moe_checkpoint)
    nbytes = path.stat().st_size
    for _ in range(2):
        os.truncate(path, int(nbytes * left))
        daemon.wait_restore(daemon.restore())
        wait_until(lambda: daemon.ask("GET", "/readyz").status_code == 200, "all is back")
        assert path.stat().st_size == nbytes
        assert held(namespace) == expected
    assert daemon.process.poll() is None


def test_an_object_that_is_cut_to_nothing_again_and_again_does_not_kill_its_scrubber(
    serve: Callable[..., Any],
    free_port: Callable[[], int],
    moe_checkpoint: Path,
    namespace: str,
    segment_path: Callable[..., Path],
    expected_blocks: Callable[..., Blocks],
    held: Callable[..., Blocks],
    wait_until: Callable[..., Any],
) -> None:
    """It finds that a block is cut off before the guard does, and hid it in a table that is cut off, too."""
    daemon = serve("n0", {"n0": free_port()}, checkpoint=moe_checkpoint, scrub_rate="1GB").wait_ready()
    path = segment_path(namespace)
    nbytes = path.stat().st_size

    def is_whole() -> bool:
        assert daemon.process.poll() is None, daemon.said()
        is_busy = any(each["state"] in ("pending", "running") for each in daemon.get("/v1/restores")["restores"])
        return not is_busy and path.stat().st_size == nbytes and daemon.ask("GET", "/readyz").status_code == 200

    for _ in range(5):
        os.truncate(path, 0)
        wait_until(is_whole, "all is back")
    assert held(namespace) == expected_blocks(moe_checkpoint)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make what another user has made")
def test_another_user_who_takes_the_name_first_is_told_at_start_and_under_a_living_node(
    serve: Callable[..., Any],
    free_port: Callable[[], int],
    moe_checkpoint: Path,
    namespace: str,
    segment_path: Callable[..., Path],
    expected_blocks: Callable[..., Blocks],
    held: Callable[..., Blocks],
    wait_until: Callable[..., Any],
) -> None:
    ports, path = {"n0": free_port()}, segment_path(namespace)

    def squat() -> None:
        path.touch(0o600)
        os.chown(path, 54_321, 54_321)

    squat()
    refused = serve("n0", ports, checkpoint=moe_checkpoint)
    assert refused.wait() == 1
    last = refused.said().splitlines()[-1]
    assert re.match(r"hotspare: /dev/shm/.* belongs to user 54321, .*--node-id", last), last
    path.unlink()
    daemon = serve("n0", ports, checkpoint=moe_checkpoint).wait_ready()
    path.unlink()
    squat()
    wait_until(lambda: daemon.ask("GET", "/readyz").status_code == 503, "it is told")
    wait_until(lambda: "belongs to user 54321" in daemon.ask("GET", "/readyz").json()["detail"], "it is said")
    assert len(daemon.get("/v1/shard-map?scope=node")["experts"]) == 39, "what is mapped is served"
    path.unlink()
    wait_until(lambda: daemon.ask("GET", "/readyz").status_code == 200, "its name is taken again")
    assert held(namespace) == expected_blocks(moe_checkpoint)

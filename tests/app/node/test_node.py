"""How a node starts: what it adopts without reading, what it fills anew, and what it refuses."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from app.restores.store import ALL_KINDS
from shm import ExpertKey, attach
from shm.layout import SHM_DIRECTORY, SegmentName
from shm.lookup import open_header
from shm.segment import Segment
from transfer.checkpoint import read_checkpoint
from transfer.checkpoint.content import identities, origin_of

Blocks = Mapping[ExpertKey, bytes]
Held = Callable[..., Blocks]


@pytest.fixture
def copy(moe_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint of the test's own, to be spoilt."""
    return Path(shutil.copytree(moe_checkpoint, tmp_path / "copy"))


@pytest.fixture
def ports(free_port: Callable[[], int]) -> dict[str, int]:
    return {"n0": free_port()}


@pytest.fixture
def filled(serve: Callable[..., Any], ports: dict[str, int], copy: Path) -> Any:
    """A node of its own, filled from `copy` and ready."""
    return serve("n0", ports, checkpoint=copy).wait_ready()


# -- adopting ------------------------------------------------------------------------------------------------------


def test_a_node_fills_itself_from_its_checkpoint(
    filled: Any,
    namespace: str,
    copy: Path,
    expected_blocks: Callable[..., Blocks],
    held: Held,
) -> None:
    expected = expected_blocks(copy)
    assert held(namespace) == expected
    assert filled.bytes_by_source() == {"local": 0, "peer": 0, "disk": sum(map(len, expected.values()))}
    assert filled.get("/v1/node")["state"] == "ready"


@pytest.mark.parametrize("end", ["SIGTERM", "SIGKILL"])
def test_a_restart_adopts_what_is_sealed_without_its_weight_bytes(
    filled: Any,
    serve: Callable[..., Any],
    ports: dict[str, int],
    namespace: str,
    copy: Path,
    expected_blocks: Callable[..., Blocks],
    end: str,
    held: Held,
    segment_path: Callable[..., Path],
) -> None:
    expected, before = expected_blocks(copy), segment_path(namespace).stat().st_ino
    filled.signal(signal.Signals[end])
    filled.wait()
    again = serve("n0", ports, checkpoint=copy).wait_ready()
    assert segment_path(namespace).stat().st_ino == before
    assert held(namespace) == expected
    assert again.bytes_by_source() == {"local": 0, "peer": 0, "disk": 0}


@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace to see what is read")
def test_adopting_reads_headers_only(
    filled: Any, serve: Callable[..., Any], ports: dict[str, int], copy: Path, tmp_path: Path
) -> None:
    filled.kill()
    log = tmp_path / "strace"
    again = serve("n0", ports, checkpoint=copy)
    calls = "trace=openat,read,pread64,readv,preadv,preadv2,mmap,sendfile,copy_file_range,io_uring_setup"
    again.kill()
    command = ["strace", "-f", "-y", "-qq", "-s", "0", "-e", calls, "-o", str(log), *again.process.args]
    traced = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        assert traced.stdout is not None
        said = b""
        while b"is ready" not in said:
            line = traced.stdout.readline()
            assert line, said
            said += line
    finally:
        os.killpg(traced.pid, signal.SIGKILL)  # strace alone would leave the node behind
        traced.wait()
        traced.stdout and traced.stdout.close()
    assert b"adopted" in said
    read: dict[str, int] = {}
    for line in log.read_text().splitlines():
        if ".safetensors>" in line and (call := re.search(r"(\w+)\(\d+<([^>]*)>.*= (\d+)$", line)):
            assert call[1] in ("read", "pread64"), line
            read[call[2]] = read.get(call[2], 0) + int(call[3])
    files = {str(path.resolve()): path for path in copy.glob("*.safetensors")}
    assert set(read) <= set(files)
    assert read, "it looked at the headers"
    for name, nbytes in read.items():
        with files[name].open("rb") as file:
            header = 8 + int.from_bytes(file.read(8), "little")
        assert nbytes <= 2 * header, f"{nbytes} bytes of {name}, whose header has {header}"


def test_a_segment_is_adopted_when_the_checkpoint_is_gone(
    filled: Any,
    serve: Callable[..., Any],
    ports: dict[str, int],
    namespace: str,
    copy: Path,
    expected_blocks: Callable[..., Blocks],
    held: Held,
    segment_path: Callable[..., Path],
) -> None:
    expected, before = expected_blocks(copy), segment_path(namespace).stat().st_ino
    filled.kill()
    shutil.rmtree(copy)
    again = serve("n0", ports, checkpoint=copy).wait_ready()
    assert "adopting the sealed segment without its checkpoint" in again.said()
    assert (segment_path(namespace).stat().st_ino, held(namespace)) == (before, expected)


def test_a_segment_is_adopted_without_any_checkpoint(
    filled: Any,
    serve: Callable[..., Any],
    ports: dict[str, int],
    namespace: str,
    segment_path: Callable[..., Path],
) -> None:
    before = segment_path(namespace).stat().st_ino
    filled.kill()
    serve("n0", ports).wait_ready()
    assert segment_path(namespace).stat().st_ino == before


@pytest.mark.parametrize("how", ["touched", "copied"])
def test_files_with_the_same_bytes_are_the_same_checkpoint(
    filled: Any,
    serve: Callable[..., Any],
    ports: dict[str, int],
    namespace: str,
    copy: Path,
    tmp_path: Path,
    how: str,
    segment_path: Callable[..., Path],
) -> None:
    before = segment_path(namespace).stat().st_ino
    filled.kill()
    if how == "copied":
        copy = Path(shutil.copytree(copy, tmp_path / "other"))
    else:
        for path in copy.iterdir():
            os.utime(path, (1, 1))
    again = serve("n0", ports, checkpoint=copy).wait_ready()
    assert segment_path(namespace).stat().st_ino == before
    assert again.bytes_by_source()["disk"] == 0
    again.kill()
    noted = open_header(segment_path(namespace).name).origin
    assert noted == origin_of(identities(read_checkpoint(copy, "moe"))), "the next start compares no bytes"
    serve("n0", ports, checkpoint=copy).wait_ready()
    assert segment_path(namespace).stat().st_ino == before


@pytest.mark.parametrize("other", ["other bytes under the same headers", "other headers"])
def test_another_checkpoint_is_filled_anew(
    filled: Any,
    serve: Callable[..., Any],
    ports: dict[str, int],
    namespace: str,
    copy: Path,
    tmp_path: Path,
    expected_blocks: Callable[..., Blocks],
    other: str,
    held: Held,
    write_moe: Callable[..., Path],
) -> None:
    experts = 13 if other.startswith("other bytes") else 11
    write_moe(tmp_path / "b", experts=experts, seed=4)
    same_headers = read_checkpoint(tmp_path / "b", "moe").manifest == read_checkpoint(copy, "moe").manifest
    assert same_headers == (experts == 13)
    first, second = expected_blocks(copy), expected_blocks(tmp_path / "b")
    assert held(namespace) == first
    with attach("moe", namespace=namespace) as early:
        filled.kill()
        again = serve("n0", ports, checkpoint=tmp_path / "b").wait_ready()
        assert held(namespace) == second
        assert "filling anew" in again.said()
        assert {early.manifest.keys[row]: bytes(early.block(row)) for row in early.rows().tolist()} == first


def test_one_changed_expert_is_another_checkpoint(
    filled: Any,
    serve: Callable[..., Any],
    ports: dict[str, int],
    namespace: str,
    copy: Path,
    expected_blocks: Callable[..., Blocks],
    held: Held,
) -> None:
    filled.kill()
    checkpoint = read_checkpoint(copy, "moe")
    for tensor in checkpoint.manifest.block(17).tensors:
        with checkpoint.path(tensor.file).open("r+b") as file:
            file.seek(tensor.file_offset)
            file.write(bytes(tensor.nbytes))
    serve("n0", ports, checkpoint=copy).wait_ready()
    assert held(namespace) == expected_blocks(copy)


def test_a_node_killed_while_it_fills_starts_over(
    serve: Callable[..., Any],
    ports: dict[str, int],
    namespace: str,
    copy: Path,
    expected_blocks: Callable[..., Blocks],
    wait_until: Callable[..., Any],
    held: Held,
    segment_path: Callable[..., Path],
) -> None:
    waiting = serve("n0", ports, checkpoint=copy, fill="none").wait_live()
    document = waiting.wait_restore(waiting.restore(experts=[{"layer": 3, "expert": e} for e in range(5)]))
    assert document["state"] == "succeeded"
    assert waiting.get("/v1/node")["blocks"] == 5
    before = segment_path(namespace).stat().st_ino
    waiting.kill()
    again = serve("n0", ports, checkpoint=copy).wait_ready()
    assert segment_path(namespace).stat().st_ino != before
    assert held(namespace) == expected_blocks(copy)
    assert again.bytes_by_source()["local"] == 0


# -- refusing ------------------------------------------------------------------------------------------------------


def test_a_second_daemon_is_refused_by_name_and_pid(
    filled: Any,
    serve: Callable[..., Any],
    free_port: Callable[[], int],
    namespace: str,
    copy: Path,
    held: Held,
) -> None:
    before = held(namespace)
    second = serve("n0", {"n0": free_port()}, checkpoint=copy)
    assert second.wait() == 1
    assert f"moe on node n0 (namespace {namespace}) is owned by process {filled.pid}" in " ".join(second.said().split())
    assert filled.get("/readyz")["ready"]
    assert held(namespace) == before


def test_a_port_in_use_is_refused_and_claims_nothing(
    filled: Any, serve: Callable[..., Any], ports: dict[str, int], namespace: str, list_segments_of: Callable[..., Any]
) -> None:
    second = serve("other", {"other": ports["n0"]})
    assert second.wait() == 1
    assert "is in use" in second.said()
    assert len(list_segments_of(namespace)) == 1


@pytest.mark.parametrize("model", ["x" * 300])
def test_model_names_out_of_limits_are_refused(
    serve: Callable[..., Any],
    ports: dict[str, int],
    copy: Path,
    namespace: str,
    list_segments_of: Callable[..., Any],
    model: str,
) -> None:
    refused = serve("n0", ports, checkpoint=copy, model=model)
    assert refused.wait() in (1, 2)
    assert "printable" in refused.said()
    assert "Traceback" not in refused.said()
    assert list_segments_of(namespace) == []


@pytest.mark.parametrize("fault", ["missing", "cut"])
def test_a_checkpoint_that_cannot_be_used_leaves_no_segment(
    serve: Callable[..., Any],
    ports: dict[str, int],
    copy: Path,
    namespace: str,
    list_segments_of: Callable[..., Any],
    fault: str,
) -> None:
    if fault == "missing":
        shutil.rmtree(copy)
    for path in sorted(copy.glob("*.safetensors")) if copy.exists() else ():
        os.truncate(path, path.stat().st_size - 1)
    refused = serve("n0", ports, checkpoint=copy)
    assert refused.wait() == 1
    assert str(copy) in "".join(refused.said().split())
    assert "Traceback" not in refused.said()
    assert list_segments_of(namespace) == []


def test_a_name_with_slashes_works_from_end_to_end(
    serve: Callable[..., Any],
    ports: dict[str, int],
    namespace: str,
    moe_checkpoint: Path,
    expected_blocks: Callable[..., Blocks],
    held: Held,
) -> None:
    model = "org/some.model v1.5"
    daemon = serve("n0", ports, checkpoint=moe_checkpoint, model=model).wait_ready()
    assert daemon.get("/v1/node")["model"] == model
    assert held(namespace, model=model) == expected_blocks(moe_checkpoint, model)


# -- placement -----------------------------------------------------------------------------------------------------


def test_a_node_that_is_left_alone_extends_its_segment_instead_of_filling_it_anew(
    serve: Callable[..., Any],
    free_port: Callable[[], int],
    namespace: str,
    moe_checkpoint: Path,
    expected_blocks: Callable[..., Blocks],
    held: Held,
    segment_path: Callable[..., Path],
) -> None:
    ports = {f"n{i}": free_port() for i in range(3)}
    expected = expected_blocks(moe_checkpoint)
    first = serve("n0", ports, checkpoint=moe_checkpoint, replicas=1).wait_ready()
    some, before = held(namespace), segment_path(namespace).stat().st_ino
    assert 0 < len(some) < len(expected)
    with attach("moe", namespace=namespace) as early:
        first.stop()
        again = serve("n0", {"n0": ports["n0"]}, checkpoint=moe_checkpoint).wait_ready()
        assert segment_path(namespace).stat().st_ino == before
        assert held(namespace) == expected
        missing = sum(map(len, expected.values())) - sum(map(len, some.values()))
        assert again.bytes_by_source()["disk"] == missing
        assert early.verify() == []
        assert len(early.rows()) == len(some)
    again.stop()
    serve("n0", {"n0": ports["n0"]}, checkpoint=moe_checkpoint).wait_ready()
    assert held(namespace) == expected, "an extended segment is adopted like any other"


def test_a_peer_more_keeps_the_segment_and_its_blocks(
    serve: Callable[..., Any],
    free_port: Callable[[], int],
    namespace: str,
    moe_checkpoint: Path,
    expected_blocks: Callable[..., Blocks],
    held: Held,
    segment_path: Callable[..., Path],
) -> None:
    ports = {f"n{i}": free_port() for i in range(4)}
    three = {node: ports[node] for node in ("n0", "n1", "n2")}
    serve("n0", three, checkpoint=moe_checkpoint, replicas=2).wait_ready().kill()
    before, some = segment_path(namespace).stat().st_ino, held(namespace)
    again = serve("n0", ports, checkpoint=moe_checkpoint, replicas=2).wait_ready()
    assert segment_path(namespace).stat().st_ino == before
    assert held(namespace).items() >= some.items()
    expected = expected_blocks(moe_checkpoint)
    new = held(namespace).keys() - some.keys()
    assert again.bytes_by_source()["disk"] == sum(len(expected[key]) for key in new)
    assert len(new) < len(some) / 3, "a change of one node moves little"


def test_dense_tensors_are_kept_on_request(
    serve: Callable[..., Any],
    ports: dict[str, int],
    namespace: str,
    moe_checkpoint: Path,
    expected_blocks: Callable[..., Blocks],
    held: Held,
) -> None:
    serve("n0", ports, checkpoint=moe_checkpoint, include="all").wait_ready()
    assert held(namespace) == expected_blocks(moe_checkpoint, include="all")


# -- closing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_sealed", [True, False], ids=["sealed", "unsealed"])
def test_closing_lets_the_segment_go_although_the_engine_refuses_to_unregister_it(
    live_node: Callable[..., Any],
    moe_checkpoint: Path,
    namespace: str,
    is_sealed: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    live = live_node(checkpoint=moe_checkpoint)
    node, name = live.context.node, live.context.node.name
    if is_sealed:
        assert live.context.restores.start_local(None, ALL_KINDS).finished.wait(30)
    assert node.checks()["sealed"] is is_sealed
    node.engine.unregister(node.holding.registered)  # the second time, Mooncake refuses
    assert traces_of(name)
    live.context.stop()
    assert "did not let go of the segment's memory" in caplog.text
    assert "EngineRefused" in caplog.text
    assert traces_of(name) == []
    assert (name.object_name in os.listdir(SHM_DIRECTORY)) is is_sealed
    again = Segment.claim(name)  # its lock is free
    assert again.is_allocated is is_sealed
    again.unlink()


def traces_of(name: SegmentName) -> list[str]:
    """What this process still has of the segment: descriptors and mappings."""
    open_files = [
        os.readlink(link) for fd in os.listdir("/proc/self/fd") if os.path.islink(link := f"/proc/self/fd/{fd}")
    ]
    mapped = Path("/proc/self/maps").read_text().splitlines()
    return [each for each in (*open_files, *mapped) if name.object_name in each]

"""`hotspare ls`, `rm` and `verify`, on real segments."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shm.layout import SegmentState
from shm.segment import Segment

Hotspare = Callable[..., subprocess.CompletedProcess[str]]
MakeSegment = Callable[..., Segment]
ATTACHED = """
import sys
from shm import attach
weights = attach(sys.argv[1], namespace=sys.argv[2])
print("attached", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def ls(hotspare: Hotspare, namespace: str) -> Callable[[], list[dict[str, Any]]]:
    """`ls()` → what `hotspare ls` lists of the test's namespace."""
    return lambda: json.loads(hotspare("ls", "--namespace", namespace, "--json").stdout)["segments"]


# -- ls ----------------------------------------------------------------------------------------------------------


def test_ls_shows_state_digest_owner_and_who_is_attached(
    make_segment: MakeSegment,
    ls: Callable[[], list[dict[str, Any]]],
    hotspare: Hotspare,
    python: Callable[..., Any],
    namespace: str,
    model: str,
) -> None:
    segment = make_segment()
    (listed,) = ls()
    assert (listed["model"], listed["node_id"], listed["state"]) == (model, "node-a", "sealed")
    assert listed["manifest_digest"] == segment.manifest.digest
    assert listed["nbytes"] == segment.nbytes
    assert (listed["owner_alive"], listed["owner_pid"], listed["attached_pids"]) == (True, os.getpid(), [])
    shown = hotspare("ls", "--namespace", namespace).stdout
    assert f"pid {os.getpid()}" in shown
    assert segment.name.object_name in shown

    segment.close()
    reader = python(ATTACHED, model, namespace)
    reader.expect("attached")
    (listed,) = ls()
    assert (listed["owner_alive"], listed["attached_pids"]) == (False, [reader.pid])


def test_ls_names_what_cannot_be_read(hotspare: Hotspare, namespace: str) -> None:
    path = Path(f"/dev/shm/hotspare.{namespace}.junk.a")
    path.write_bytes(b"junk" * 3333)
    listed = {s["object_name"]: s for s in json.loads(hotspare("ls", "--json").stdout)["segments"]}[path.name]
    assert (listed["state"], listed["model"], listed["nbytes"]) == ("unreadable", None, 13332)
    assert "not a Hotspare segment" in listed["error"]
    assert f"{path.name}: " in hotspare("ls").stderr
    assert hotspare("rm", path.name).returncode == 0
    assert not path.exists()


def test_ls_says_that_there_is_nothing(hotspare: Hotspare, namespace: str) -> None:
    assert hotspare("ls", "--namespace", namespace).stdout == f"no segments on this host in namespace {namespace}\n"


# -- rm ----------------------------------------------------------------------------------------------------------


def test_rm_refuses_a_living_owner_by_pid_and_removes_what_nobody_owns(
    make_segment: MakeSegment, hotspare: Hotspare, namespace: str, model: str, objects: Callable[[], list[str]]
) -> None:
    make_segment("node-a").close()
    owned = make_segment("node-b")  # the later one: the first must not be gone by then
    refused = hotspare("rm", model, "--namespace", namespace)
    assert refused.returncode == 1
    assert str(os.getpid()) in refused.stderr
    assert len(objects()) == 2, "nothing goes if one may not"
    done = hotspare("rm", "--all", "--namespace", namespace, "--json")
    assert [each["node_id"] for each in json.loads(done.stdout)["removed"]] == ["node-a"]

    owned.close()
    assert hotspare("rm", model).returncode == 1, "a model is looked for in its namespace only"
    assert hotspare("rm", model, "--namespace", namespace, "--node", "node-c").returncode == 1
    done = hotspare("rm", model, "--namespace", namespace, "--node", "node-b")
    assert done.returncode == 0
    assert owned.name.object_name in done.stdout
    assert objects() == []
    assert "nothing to remove" in hotspare("rm", "--all", "--namespace", namespace).stdout


def test_rm_says_who_keeps_the_memory(
    make_segment: MakeSegment, hotspare: Hotspare, python: Callable[..., Any], namespace: str, model: str
) -> None:
    make_segment().close()
    reader = python(ATTACHED, model, namespace)
    reader.expect("attached")
    said = hotspare("rm", model, "--namespace", namespace).stdout
    assert f"processes {reader.pid} keep its memory until they let go" in said


# -- verify ------------------------------------------------------------------------------------------------------


def test_verify_finds_the_one_byte_that_differs(
    make_segment: MakeSegment, hotspare: Hotspare, namespace: str, model: str
) -> None:
    segment = make_segment()
    segment_nbytes = int(segment.manifest.nbytes.sum())
    good = hotspare("verify", "--namespace", namespace)
    assert good.returncode == 0
    assert "blocks are right" in good.stdout
    key = segment.manifest.keys[5]
    segment.block(5)[3333] ^= 1
    segment.close()
    bad = hotspare("verify", "--model", model, "--namespace", namespace)
    assert bad.returncode == 1
    assert f"layer {key.layer} expert {key.expert} differs" in bad.stdout
    document = json.loads(hotspare("verify", "--namespace", namespace, "--json").stdout)["segments"][0]
    assert document["differing"] == [{"layer": key.layer, "expert": key.expert}]
    assert (document["blocks"], document["nbytes"]) == (14, segment_nbytes)


def test_verify_of_nothing_is_no_success(make_segment: MakeSegment, hotspare: Hotspare, namespace: str) -> None:
    assert hotspare("verify", "--namespace", namespace).returncode == 1
    unsealed = make_segment(seal=False)
    assert unsealed.state is SegmentState.FILLING
    done = hotspare("verify", "--namespace", namespace)
    assert done.returncode == 1
    assert "filling: passed over" in done.stderr


def test_verify_of_another_model_or_namespace_finds_nothing(
    make_segment: MakeSegment, hotspare: Hotspare, namespace: str
) -> None:
    make_segment()
    assert hotspare("verify", "--namespace", namespace, "--model", "another").returncode == 1
    assert hotspare("verify", "--namespace", f"{namespace}0").returncode == 1

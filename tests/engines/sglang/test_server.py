"""Whole SGLang servers that start and recover from memory: `make engines-sglang` installs the release and runs this."""

from __future__ import annotations

import importlib.util
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines.sglang import tiny
from tests.engines.sglang.recovery import ELASTIC, SUMMED_OTHERWISE, Recovery
from tests.engines.sglang.server import PROMPTS, Server

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="`make engines-sglang` brings SGLang"),
    pytest.mark.timeout(1800),
]
LOADED = r"loaded (\d+) tensors in [\d.]+ s: ([\d.]+) GB from local, ([\d.]+) GB from peer, ([\d.]+) GB from disk"
WEIGHTS = "model.safetensors"


@pytest.fixture
def launch(free_port: Callable[[], int], tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """`launch(model, *arguments, **environment)` → a server that is ready, ended after the test."""
    servers: list[Server] = []

    def start(model: Path, *arguments: str, **environment: str) -> Server:
        log = tmp_path / f"sglang{len(servers)}.log"
        servers.append(Server(model, free_port(), log, *arguments, environment=environment))
        servers[-1].wait_ready()
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def keep(serve: Callable[..., Any], free_port: Callable[[], int]) -> Callable[[Path], Any]:
    """`keep(model)` → a node that has every tensor of it."""
    return lambda model: serve("n0", {"n0": free_port()}, checkpoint=model, fill="disk", include="all").wait_ready()


def disk_gigabytes(server: Server) -> list[float]:
    """What each of its loads took from disk."""
    loads = server.lines(LOADED)
    assert loads, server.said()[-4000:]
    return [float(load[4]) for load in loads]


@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_it_starts_from_memory_with_the_files_away_and_answers_as_from_disk(
    launch: Callable[..., Server], keep: Callable[[Path], Any], tmp_path: Path, kind: str
) -> None:
    model = tiny.write(tmp_path / "model", kind)
    from_disk = launch(model)
    right = from_disk.ask_all()
    assert from_disk.ask_all() == right, "greedy answers are the same each time"
    from_disk.close()
    node = keep(model)
    (model / WEIGHTS).unlink()
    from_memory = launch(model, HOTSPARE_URL=node.url)
    assert from_memory.ask_all() == right
    assert disk_gigabytes(from_memory) == [0]


def test_weights_are_updated_from_memory_where_the_directory_is_the_nodes_and_from_disk_where_it_is_not(
    launch: Callable[..., Server], keep: Callable[[Path], Any], tmp_path: Path
) -> None:
    model, tuned = tiny.write(tmp_path / "model", "qwen3"), tiny.write(tmp_path / "tuned", "qwen3", seed=1)
    node = keep(model)
    server = launch(model, HOTSPARE_URL=node.url)
    right = server.ask_all()
    assert server.post("/update_weights_from_disk", {"model_path": str(tuned)})["success"]
    other = server.ask_all()
    assert other != right
    assert len(disk_gigabytes(server)) == 1, "headers are the same, and content is another: SGLang loads that itself"
    assert server.lines(r"loaded from disk: .*other weights|loaded from disk: .*content"), server.said()[-4000:]
    (model / WEIGHTS).unlink()
    assert server.post("/update_weights_from_disk", {"model_path": str(model)})["success"]
    assert server.ask_all() == right
    assert disk_gigabytes(server) == [0, 0]


def test_without_a_node_it_starts_from_disk(launch: Callable[..., Server], tmp_path: Path) -> None:
    server = launch(tiny.write(tmp_path / "model", "qwen3"), HOTSPARE_URL="http://127.0.0.1:9")
    assert len(server.ask(PROMPTS[0]).tokens) > 0
    assert server.lines("loaded from disk: ")


@pytest.mark.parametrize(
    ("kind", "layout"),
    [("deepseek", "the checkpoint's"), ("qwen3", "the checkpoint's"), ("deepseek", "another"), ("qwen3", "another")],
)
def test_a_lost_rank_is_recovered_with_the_files_away_and_the_node_dead(
    launch: Callable[..., Server], keep: Callable[[Path], Any], tmp_path: Path, kind: str, layout: str
) -> None:
    """SGLang's own recovery. Where a kernel has rearranged weights SGLang loads lost ones again; as it rearranges those
    of DeepSeek that were not lost a second time, all are loaded then. Of Qwen3 it wants all in any case.
    """
    model = tiny.write(tmp_path / "model", kind)
    shutil.copy(model / WEIGHTS, tmp_path / "right.safetensors")
    node = keep(model)
    (model / WEIGHTS).unlink()
    orders = tmp_path / "orders.json"
    swapped = {"HOTSPARE_FAULTS_SWAPPED": "1"} if layout == "another" else {}
    server = launch(
        *(model, *ELASTIC, "--enable-elastic-expert-backup"),
        HOTSPARE_URL=node.url,
        HOTSPARE_FAULTS=str(orders),
        HOTSPARE_FAULTS_RIGHT=str(tmp_path / "right.safetensors"),
        **swapped,
    )
    recovery = Recovery(server, orders)
    before = server.ask_all()
    recovery.wait_bound(is_refused=bool(swapped))
    if not swapped:
        node.kill()
    during = recovery.lose(rank=1)
    for found, right in zip([during, *server.ask_all()], [before[0], *before], strict=True):
        assert found.tokens == right.tokens
        assert found.logprobs == pytest.approx(right.logprobs, abs=SUMMED_OTHERWISE)
    assert set(disk_gigabytes(server)) == {0}
    assert recovery.wrong_slots() == 0
    print(f"{kind}, {layout} layout: {recovery.report()}")  # noqa: T201


def test_without_a_backup_and_files_it_goes_on_with_garbage(launch: Callable[..., Server], tmp_path: Path) -> None:
    """The control: what all this is for."""
    model = tiny.write(tmp_path / "model", "qwen3")
    orders = tmp_path / "orders.json"
    server = launch(model, *ELASTIC, HOTSPARE_FAULTS=str(orders))
    before = server.ask_all()
    (model / WEIGHTS).unlink()
    recovery = Recovery(server, orders)
    during = recovery.lose(rank=1)
    assert during != before[0]
    assert any(logprob is None or math.isnan(logprob) for logprob in during.logprobs) or server.ask_all() != before

"""Hotspare as the backup of a real SGLang release, beside SGLang's own: `make sglang` installs it and runs this."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from transfer.checkpoint.synth import write_checkpoint

pytestmark = pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="`make sglang` brings SGLang")

RANK = Path(__file__).with_name("rank.py")
WORLD, REDUNDANT, EXPERTS = 2, 3, 13
STUBS = Path(__file__).with_name("stubs")
TIMEOUT_S = 240


def run_ranks(checkpoint: Path, url: str, port: int) -> list[dict[str, Any]]:
    """What each rank of one SGLang found."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([os.environ["PYTHONPATH"], str(STUBS)]),
        "HOTSPARE_URL": url,
        "SGLANG_HOST_IP": "127.0.0.1",
        "SGLANG_BACKUP_PORT_BASE": str(port + 1),
        "MC_FORCE_TCP": "1",
    }
    ranks = [
        subprocess.Popen(
            [
                *(sys.executable, str(RANK), "--checkpoint", str(checkpoint), "--rank", str(rank)),
                *("--world", str(WORLD), "--port", str(port), "--redundant", str(REDUNDANT)),
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for rank in range(WORLD)
    ]
    try:
        said = [rank.communicate(timeout=TIMEOUT_S) for rank in ranks]
    finally:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank.pid, signal.SIGKILL)  # and the backup process that it started
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0] * WORLD, "\n".join(err[-3000:] for _, err in said)
    return [json.loads(out.splitlines()[-1]) for out, _ in said]


@pytest.mark.timeout(2 * TIMEOUT_S)
@pytest.mark.parametrize("like", ["deepseek-v3", "glm-4.5"], ids=["block fp8 with scales", "bf16"])
def test_every_rank_has_the_bytes_that_sglangs_own_client_brings(
    serve: Callable[..., Any], free_port: Callable[[], int], tmp_path: Path, like: str
) -> None:
    checkpoint = tmp_path / "checkpoint"
    write_checkpoint(checkpoint, like, layers=5, experts=EXPERTS, scale=0.0625, seed=5)
    node = serve("n0", {"n0": free_port()}, checkpoint=checkpoint, fill="disk").wait_ready()
    for found in run_ranks(checkpoint, node.url, free_port()):
        held = found["parameters"]
        for case in ("all", "placed anew"):
            assert found[case]["differing"] == 0
            assert 0.98 * held < found[case]["recovered"] <= held  # one byte of noise in 256 is right by chance
        assert found["some"]["differing"] == 0
        assert 0 < found["some"]["recovered"] < held / 2
        assert "Failed to read weights" in found["without its manager"]
        assert 0 < found["without their manager"] < held / 2
        assert found["reloads"] == 0

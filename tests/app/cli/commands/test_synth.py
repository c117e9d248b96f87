"""`hotspare synth`."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

from transfer.checkpoint import read_checkpoint

SMALL = ["--like", "mixtral-8x7b", "--layers", "2", "--experts", "3", "--scale", "0.02"]


def test_it_writes_a_checkpoint_that_can_be_read(
    hotspare: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = hotspare("synth", str(tmp_path / "m"), *SMALL, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["files"][0]["tensors"] > 18
    assert document["nbytes"] == sum(path.stat().st_size for path in (tmp_path / "m").glob("*.safetensors"))
    assert len(read_checkpoint(tmp_path / "m", "m").manifest) == 6
    again = hotspare("synth", str(tmp_path / "m"), *SMALL)
    assert again.returncode == 2
    assert "not an empty directory" in again.stderr

"""An engine's rank beside a node of the demo."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from app.demo.rank import Checkpoint, Rank
from transfer.checkpoint.synth import write_checkpoint


def test_noise_in_an_engines_slots_is_seen(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", "deepseek-v3", layers=5, experts=3, scale=1 / 32)
    with ExitStack() as stack:
        rank = Rank(Checkpoint(tmp_path / "c", stack))
        rank.spoil()
        found = rank.compare()
    assert not found["ok"]
    assert found["tensors"] == 2 * 3 * 6, "two layers; half of three experts and three redundant ones; six tensors each"
    assert len(found["differing"]) == found["tensors"]

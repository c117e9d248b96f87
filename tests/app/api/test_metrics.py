from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.restores import store as restores_module
from app.restores.store import ALL_KINDS


def scrape(live: Any) -> dict[tuple[str, ...], float]:
    """Every sample, by name and label values."""
    text = live.ask("GET", "/metrics").text
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def fill(live: Any) -> None:
    assert live.context.restores.start_local(None, ALL_KINDS).finished.wait(30)


def test_an_empty_node_has_its_state_and_zeros(live_node: Callable[..., Any]) -> None:
    samples = scrape(live_node())
    assert samples["hotspare_blocks",] == samples["hotspare_bytes",] == samples["hotspare_blocks_missing",] == 0
    states = {key[1]: value for key, value in samples.items() if key[0] == "hotspare_state"}
    assert states["waiting"] == 1
    assert sum(states.values()) == 1


def test_blocks_that_are_missing_are_counted_until_they_come(
    live_node: Callable[..., Any], moe_checkpoint: Path
) -> None:
    live = live_node(checkpoint=moe_checkpoint)
    assert scrape(live)["hotspare_blocks_missing",] == 39
    fill(live)
    after = scrape(live)
    assert (after["hotspare_blocks",], after["hotspare_blocks_missing",]) == (39, 0)
    assert after["hotspare_bytes",] == after["hotspare_restored_bytes_total", "disk"] > 0
    assert after["hotspare_state", "ready"] == 1
    assert after["hotspare_restores", "succeeded"] == 1
    assert after["hotspare_restores", "running"] == 0


def test_counters_never_fall_when_old_restores_are_forgotten(
    live_node: Callable[..., Any], moe_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restores_module, "KEPT_MAX", 2)
    live = live_node(checkpoint=moe_checkpoint)
    before: dict[tuple[str, ...], float] = {}
    for _ in range(5):
        fill(live)
        now = {key: value for key, value in scrape(live).items() if key[0].endswith("_total")}
        assert all(now[key] >= value for key, value in before.items())
        before = now
    held = scrape(live)["hotspare_bytes",]
    assert before["hotspare_restored_bytes_total", "local"] == 4 * held
    assert before["hotspare_restored_bytes_total", "disk"] == held


def test_peers_are_counted_by_state(live_node: Callable[..., Any], odd_peer: Callable[[], Any]) -> None:
    live = live_node(peers={"p": odd_peer().url, "q": odd_peer().url})
    samples = scrape(live)
    assert sum(value for key, value in samples.items() if key[0] == "hotspare_peers") == 2
    assert samples["hotspare_peers", "alive"] == 0

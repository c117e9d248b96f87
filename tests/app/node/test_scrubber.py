"""Rot is found without anybody asking, hidden at once, mended from where it can be, and tried again where it cannot."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from app.errors import Conflict
from app.node.holding import Holding
from app.node.scrubber import FIRST_RATE, IDLE_S, RATE_MIN, TURN_S_MIN, WITHIN_S, Scrubber
from app.restores.store import ALL_KINDS
from shm import ExpertKey, attach
from shm.checksum import checksum
from shm.segment import Segment
from tests.clocks import Clock

Blocks = Mapping[ExpertKey, bytes]


class Mended(list[ExpertKey]):
    def __call__(self, keys: Any) -> None:
        self.extend(keys)


@pytest.fixture
def mended() -> Mended:
    return Mended()


@pytest.fixture
def scrubber(holding: Holding, mended: Mended, clock: Clock) -> Scrubber:
    """Of a node that only holds; turns are taken by hand."""
    node: Any = SimpleNamespace(holding=holding, is_restoring=False, settings=SimpleNamespace(scrub_rate=None))
    return Scrubber(node, mended, clock)


def flip(segment: Segment, row: int) -> None:
    """One bit of a block's bytes."""
    block = segment.block(row)
    block[block.nbytes // 3] ^= 8


def prove_all(scrubber: Scrubber, holding: Holding, clock: Clock) -> None:
    while holding.proofs.unproved(holding.published()):
        clock.now_s += scrubber._turn()


def test_everything_is_proved_in_turn(scrubber: Scrubber, holding: Holding, mended: Mended, clock: Clock) -> None:
    prove_all(scrubber, holding, clock)
    assert (scrubber.rotten, mended) == (0, [])
    assert scrubber.proved >= len(holding.manifest)


def test_a_flipped_bit_is_hidden_and_told(
    scrubber: Scrubber, holding: Holding, mended: Mended, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    flip(holding.segment, 7)
    prove_all(scrubber, holding, clock)
    assert holding.missing().tolist() == [7]
    assert (scrubber.rotten, mended) == (1, [holding.manifest.keys[7]])
    assert "expert 2 of layer 1 does not match its checksum" in caplog.text


def test_a_block_that_is_written_anew_meanwhile_is_not_hidden(
    scrubber: Scrubber, holding: Holding, mended: Mended, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment = holding.segment
    block, good = segment.block(7), bytes(segment.block(7))
    flip(segment, 7)

    def take_then_mend(segment: Segment, row: int) -> bytes | None:
        taken = real(segment, row)
        segment.quarantine(7)  # the restore that mends it comes between taking the checksum and looking at it
        block[:] = good[::-1]
        segment.publish(7, checksum(block))
        return taken

    real = Segment.read_checksum
    monkeypatch.setattr(Segment, "read_checksum", take_then_mend)
    assert scrubber.prove(holding, 7)
    assert (scrubber.rotten, mended) == (0, [])
    assert 7 in holding.published()


def test_nothing_is_proved_while_a_restore_is_under_way(scrubber: Scrubber) -> None:
    scrubber._node.is_restoring = True
    assert scrubber._turn() == IDLE_S
    assert scrubber.proved == 0


def test_the_rate_is_faster_until_all_was_proved_once(scrubber: Scrubber, holding: Holding) -> None:
    assert scrubber.rate(holding) == FIRST_RATE
    for row in range(len(holding.manifest)):
        holding.proofs.note(row)
    assert scrubber.rate(holding) == RATE_MIN, "a small segment is proved many times a day"
    scrubber._node.settings.scrub_rate = 3333  # type: ignore[misc]
    assert scrubber.rate(holding) == 3333


def test_a_large_segment_is_proved_within_a_day(
    scrubber: Scrubber, holding: Holding, monkeypatch: pytest.MonkeyPatch
) -> None:
    for row in range(len(holding.manifest)):
        holding.proofs.note(row)
    monkeypatch.setitem(holding.manifest.__dict__, "nbytes", np.full(len(holding.manifest), 1 << 36))
    assert scrubber.rate(holding) * WITHIN_S == pytest.approx(len(holding.manifest) << 36)


def test_the_next_block_is_proved_when_the_rate_allows_it(scrubber: Scrubber, holding: Holding, clock: Clock) -> None:
    scrubber._node.settings.scrub_rate = 333  # type: ignore[misc]
    for row in range(len(holding.manifest)):
        holding.proofs.note(row)
    seconds = int(holding.manifest.nbytes[0]) / 333
    for turn in range(1, 4):
        assert TURN_S_MIN < scrubber._turn() <= IDLE_S, "it may be needed sooner"
        assert scrubber.proved == turn
        clock.now_s += seconds - 0.1
        scrubber._turn()
        assert scrubber.proved == turn
        clock.now_s += 0.1


def test_what_a_reader_doubts_is_proved_next(
    scrubber: Scrubber, holding: Holding, clock: Clock, mended: Mended
) -> None:
    scrubber._node.settings.scrub_rate = 1  # type: ignore[misc]
    prove_all(scrubber, holding, clock)
    flip(holding.segment, 9)
    key = holding.manifest.keys[9]
    clock.now_s += scrubber._turn()
    assert mended == [], "its turn would come in hours"
    with pytest.raises(Conflict, match="other weights"):
        scrubber.doubt("33" * 16, [key])
    scrubber.doubt(holding.content_digest, [key])
    clock.now_s += 0.1
    scrubber._turn()
    assert mended == [key]


# -- in a daemon ---------------------------------------------------------------------------------------------------


def metric(live: Any, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", live.ask("GET", "/metrics").text, re.MULTILINE)
    assert found, name
    return float(found[1])


def test_an_adopted_segment_is_unproved_until_it_was_read_once(
    live_node: Callable[..., Any], moe_checkpoint: Path, wait_until: Callable[..., Any]
) -> None:
    live = live_node(checkpoint=moe_checkpoint)
    assert live.context.restores.start_local(None, ALL_KINDS).finished.wait(30)
    live.context.stop()
    live.context.scrubber.loop.stop()
    again = live_node(checkpoint=moe_checkpoint)
    wait_until(lambda: again.ask("GET", "/v1/node").json()["blocks_unproved"] == 0, "all proved")
    document = again.ask("GET", "/v1/node").json()
    assert document["blocks"] == 39
    assert document["proved_oldest"] is not None
    (listed,) = again.ask("GET", "/v1/nodes").json()["nodes"]
    assert (listed["blocks_unproved"], listed["proved_oldest"] is not None) == (0, True)
    assert metric(again, 'hotspare_scrubbed_blocks_total{found="right"}') >= 39
    assert metric(again, "hotspare_blocks_unproved") == 0


def test_rot_in_a_daemon_is_mended_without_anybody_asking(
    live_node: Callable[..., Any],
    moe_checkpoint: Path,
    namespace: str,
    expected_blocks: Callable[..., Blocks],
    wait_until: Callable[..., Any],
) -> None:
    live = live_node(checkpoint=moe_checkpoint, scrub_rate="1GB")
    assert live.context.restores.start_local(None, ALL_KINDS).finished.wait(30)
    segment = live.context.node.segment
    flip(segment, 17)
    wait_until(lambda: metric(live, 'hotspare_scrubbed_blocks_total{found="wrong"}') == 1, "the rot is found")
    wait_until(lambda: not len(live.context.node.missing()), "it is mended")
    with attach("moe", namespace=namespace) as weights:
        assert weights.verify() == []
        assert bytes(weights.block(17)) == expected_blocks(moe_checkpoint)[weights.manifest.keys[17]]


def test_what_cannot_be_mended_is_tried_again_when_a_source_appears(
    live_node: Callable[..., Any],
    moe_checkpoint: Path,
    tmp_path: Path,
    namespace: str,
    expected_blocks: Callable[..., Blocks],
    wait_until: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A node stayed DEGRADED for ever beside a good replica: mending was tried once."""
    from app.node import upkeep

    monkeypatch.setattr(upkeep, "RETRY_INTERVAL_S", 0.3)
    directory = tmp_path / "moe"
    directory.symlink_to(moe_checkpoint)
    live = live_node(checkpoint=directory, scrub_rate="1GB")
    assert live.context.restores.start_local(None, ALL_KINDS).finished.wait(30)
    directory.unlink()
    flip(live.context.node.segment, 17)
    wait_until(lambda: any(r.state == "failed" for r in live.context.restores.documents()), "mending was tried in vain")
    wait_until(lambda: live.ask("GET", "/v1/node").json()["state"] == "degraded", "nothing is tried just now")
    directory.symlink_to(moe_checkpoint)
    wait_until(lambda: live.ask("GET", "/readyz").status_code == 200, "it was tried again")
    with attach("moe", namespace=namespace) as weights:
        assert bytes(weights.block(17)) == expected_blocks(moe_checkpoint)[weights.manifest.keys[17]]

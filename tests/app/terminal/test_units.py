"""Bytes, seconds and rates as people read them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from app.terminal.units import ago, duration, rate, size


@pytest.mark.parametrize(
    ("nbytes", "said"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (999_999, "1000.00 kB"), (1_310_000_000, "1.31 GB"),
        (1 << 40, "1.10 TB"),
    ],
)  # fmt: skip
def test_sizes_are_decimal(nbytes: int, said: str) -> None:
    assert size(nbytes) == said


@pytest.mark.parametrize(("seconds", "said"), [(0.418, "0.42 s"), (119.99, "119.99 s"), (187, "3 min 07 s")])
def test_durations_from_two_minutes_on_have_no_fractions(seconds: float, said: str) -> None:
    assert duration(seconds) == said


@pytest.mark.parametrize(
    ("seconds", "said"), [(-5, "0 s"), (3, "3 s"), (90, "2 min"), (3 * 3600, "3 h"), (40 * 3600, "2 d")]
)
def test_how_long_ago_is_told_in_one_unit(seconds: float, said: str) -> None:
    assert ago((datetime.now(UTC) - timedelta(seconds=seconds)).isoformat()) == f"{said} ago"


def test_a_rate_of_nothing_or_in_no_time_is_a_dash() -> None:
    assert rate(3_333_000_000, 2) == "1.67 GB/s"
    assert rate(0, 2) == rate(3333, 0) == "-"

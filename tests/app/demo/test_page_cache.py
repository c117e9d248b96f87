"""What the page cache holds of files, and changing it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from app.demo import page_cache


def test_the_page_cache_can_be_dropped_warmed_and_looked_at(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_bytes(os.urandom(3_333_333))
    page_cache.drop(paths[:1])
    dropped = page_cache.resident_share(paths[:1])
    assert page_cache.resident_share(paths) == pytest.approx((dropped + 1) / 2, abs=0.01)
    page_cache.warm(paths)
    assert page_cache.resident_share(paths) == 1
    page_cache.drop(paths)
    assert page_cache.resident_share(paths) in (0, 1), "1 on a file system that lives in memory"

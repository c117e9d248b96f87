"""Bytes, seconds and rates as people read them. Decimal units, as in every figure of this project: 1 GB is 10**9."""

from __future__ import annotations

from datetime import UTC, datetime

_TIME_UNITS = (("d", 86400), ("h", 3600), ("min", 60))
_UNITS = (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3))


def size(nbytes: float) -> str:
    """`1.31 GB`."""
    for unit, each in _UNITS:
        if nbytes >= each:
            return f"{nbytes / each:.2f} {unit}"
    return f"{nbytes:.0f} B"


def rate(nbytes: float, seconds: float) -> str:
    """`1.31 GB/s`; a dash where nothing was moved or no time was taken."""
    return f"{nbytes / seconds / 1e9:.2f} GB/s" if nbytes and seconds > 0 else "-"


def ago(moment: str) -> str:
    """`3 h ago`, of a time as the API writes it."""
    seconds = max(0.0, (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds())
    unit, each = next(((unit, each) for unit, each in _TIME_UNITS if seconds >= each), ("s", 1))
    return f"{seconds / each:.0f} {unit} ago"


def duration(seconds: float) -> str:
    """`0.42 s`, `3 min 07 s`."""
    if seconds < 120:
        return f"{seconds:.2f} s"
    return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"

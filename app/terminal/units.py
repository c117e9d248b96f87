"""Bytes, seconds and rates as people read them. Decimal units, as in every figure of this project: 1 GB is 10**9."""

from __future__ import annotations

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


def duration(seconds: float) -> str:
    """`0.42 s`, `3 min 07 s`."""
    if seconds < 120:
        return f"{seconds:.2f} s"
    return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"

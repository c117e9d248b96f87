"""Standard streams that are closed, full, or read by nobody, in processes that have them so."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.processes import ROOT

TELL = """
import os, sys
from app.terminal import streams
streams.open_all()
third = os.open("/dev/null", os.O_RDONLY)
print("said")
failed = streams.flush()
streams.say("said too")
streams.say("wrong", err=True)
streams.flush()
os.write(int(sys.argv[1]), f"{third > 2} {failed is not None}".encode()) if sys.argv[1:] else None
"""


def told(redirection: str) -> subprocess.CompletedProcess[str]:
    """What a process tells on descriptor 9, the caller's stdout, of its own streams; and how it ended."""
    return subprocess.run(
        ["sh", "-c", f'exec 9>&1; exec "$@" 9 {redirection}', "sh", sys.executable, "-c", TELL],
        capture_output=True, text=True, cwd=ROOT, check=False, env=os.environ | {"PYTHONUNBUFFERED": ""},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("redirection", "is_lost"),
    [
        (">&-", False),
        ("2>&-", False),
        ("<&- >&- 2>&-", False),
        (">/dev/full", True),
        (">/dev/full 2>/dev/full", True),
        ("2>/dev/full >/dev/null", False),
    ],
)
def test_no_descriptor_is_reused_and_python_ends_in_peace(redirection: str, is_lost: bool) -> None:
    done = told(redirection)
    assert done.stdout.replace("said\nsaid too\n", "") == f"True {is_lost}"
    assert done.returncode == 0
    assert done.stderr in ("", "wrong\n")

"""What is shown of an installation, of lines that pip says."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.install_progress import Install, watch

ROOT = Path(__file__).parents[2]
SAID = """\
Looking in links: /opt/wheels
Obtaining file:///root/hs
Collecting fastapi>=0.115
  Downloading fastapi-0.165.0-py3-none-any.whl (111 kB)
Collecting torch==2.13.0
  Downloading https://example.org/torch-2.13.0%2Bcpu-cp311-cp311-manylinux_2_28_x86_64.whl (190.3 MB)
Installing collected packages: mpmath, torch, hotspare
Successfully installed hotspare-0.1.0
"""


def test_it_follows_what_pip_does() -> None:
    install, did = Install(), []
    for line in SAID.splitlines():
        install.hear(line)
        if did[-1:] != [install.doing]:
            did.append(install.doing)
    assert did == [
        "asking the package index",
        "package 1: fastapi",
        "package 1: downloading fastapi, 111 kB",
        "package 2: torch",
        "package 2: downloading torch, 190.3 MB",
        "unpacking 3 packages, torch is the large one",
    ]


def test_silence_is_shown_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip says nothing for half a minute while it unpacks torch."""
    monkeypatch.setattr("tools.install_progress.PIPE_INTERVAL_S", 0.01)
    out, (reads, writes) = io.StringIO(), os.pipe()
    watcher = subprocess.Popen(["sh", "-c", "echo Collecting torch; sleep 0.5"], stdout=writes)
    os.close(writes)
    try:
        watch(reads, out)
    finally:
        os.close(reads)
        watcher.wait()
    assert out.getvalue().count("package 1: torch") > 1


def test_a_failure_of_pip_is_a_failure_of_setup(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", ".ci/install", sys.executable, "--no-index", "--target", str(tmp_path), "no-such-package"],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "no-such-package" in done.stderr

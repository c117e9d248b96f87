"""Shows how far `pip install` is: `pip install … | python tools/install_progress.py`, which passes nothing else on.

pip can be silent or say four lines a package; torch takes half a minute in which it says nothing at all. So there is
one line that moves on a terminal, and elsewhere a line now and then. What goes wrong pip says on stderr, by itself.
The standard library only: nothing is installed yet.
"""

from __future__ import annotations

import os
import re
import selectors
import shutil
import sys
import time
from typing import TextIO

TERMINAL_INTERVAL_S = 0.5
PIPE_INTERVAL_S = 15.0  # where every line stays
READ_NBYTES = 1 << 16
_COLLECTING = re.compile(r"Collecting ([\w.-]+)")
_DOWNLOADING = re.compile(r"\s*Downloading (?:\S*/)?([\w.]+)-\S+(?: \((?P<size>[^)]+)\))?")
_INSTALLING = re.compile(r"Installing collected packages: (.*)")


class Install:
    """What pip has said so far, in a few words."""

    def __init__(self) -> None:
        self.doing = "asking the package index"
        self._collected = 0

    def hear(self, line: str) -> None:
        """Take one line of pip's."""
        if found := _COLLECTING.match(line):
            self._collected += 1
            self.doing = f"package {self._collected}: {found[1]}"
        elif found := _DOWNLOADING.match(line):
            self.doing = f"package {self._collected}: downloading {found[1]}" + (
                f", {found['size']}" if found["size"] else ""
            )
        elif found := _INSTALLING.match(line):
            self.doing = f"unpacking {len(found[1].split(','))} packages, torch is the large one"


class Shown:
    """Where it is shown: a line that is written over on a terminal, elsewhere a line now and then."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._started_s = self._last_s = time.monotonic()
        self._is_terminal = out.isatty()
        self.interval_s = TERMINAL_INTERVAL_S if self._is_terminal else PIPE_INTERVAL_S

    def show(self, doing: str) -> None:
        """If its time has come."""
        now_s = time.monotonic()
        if now_s - self._last_s < self.interval_s:
            return
        self._last_s = now_s
        line = f"  {now_s - self._started_s:3.0f} s  {doing}"
        if self._is_terminal:
            width = shutil.get_terminal_size().columns - 1
            line = f"\r{line[:width]:<{width}}"
        self._out.write(line if self._is_terminal else line + "\n")
        self._out.flush()

    def clear(self) -> None:
        if self._is_terminal:
            self._out.write("\r" + " " * (shutil.get_terminal_size().columns - 1) + "\r")
            self._out.flush()


def watch(descriptor: int, out: TextIO) -> None:
    """Read pip's lines until their end, and show how far it is."""
    install, shown, rest = Install(), Shown(out), b""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while True:
            if selector.select(shown.interval_s):
                more = os.read(descriptor, READ_NBYTES)
                if not more:
                    break
                *lines, rest = (rest + more).split(b"\n")
                for line in lines:
                    install.hear(line.decode(errors="replace"))
            shown.show(install.doing)
    shown.clear()


if __name__ == "__main__":
    watch(sys.stdin.fileno(), sys.stdout)

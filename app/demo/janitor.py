"""Removes what a demo leaves, whatever ends it, SIGKILL too: `python -m app.demo.janitor OBJECT_PREFIX DIRECTORY`.

Waits for the end of its standard input, which comes with the end of the demo. The standard library only, so that it is
there before anything is to be removed. The demo's nodes are killed by the kernel when it dies; one of them may still be
at work for a moment, so the janitor looks until nothing is left twice in a row.
"""

from __future__ import annotations

import os
import shutil
import sys
import time

SHM_DIRECTORY = "/dev/shm"
LOOKS_MAX = 100
LOOK_INTERVAL_S = 0.05
CLEAN_LOOKS = 2


def sweep(object_prefix: str, directory: str) -> bool:
    """Remove the objects and the directory; whether there was any."""
    found = False
    for name in os.listdir(SHM_DIRECTORY):
        if name.startswith(object_prefix):
            found = True
            try:
                os.unlink(os.path.join(SHM_DIRECTORY, name))
            except FileNotFoundError:
                continue
    if os.path.isdir(directory):
        found = True
        shutil.rmtree(directory, ignore_errors=True)
    return found


def main() -> None:
    object_prefix, directory = sys.argv[1:]
    while sys.stdin.buffer.read(1 << 16):
        continue
    clean = 0
    for _ in range(LOOKS_MAX):
        clean = 0 if sweep(object_prefix, directory) else clean + 1
        if clean == CLEAN_LOOKS:
            return
        time.sleep(LOOK_INTERVAL_S)
    sys.exit(f"something keeps making {SHM_DIRECTORY}/{object_prefix}* or {directory}: remove them")


if __name__ == "__main__":
    main()

"""Standard output and error as whoever started us left them: closed, full, or with nobody at the other end.

A descriptor that was closed is given out again by the next `open`: then what libraries write to fd 2 lands in a socket
or in a segment. So all three are open from the start. What cannot be written is lost, and ends nothing: a node has
better things to do than to tell.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress

import typer


def open_all() -> None:
    """Have descriptors 0, 1 and 2 open, on /dev/null where they were closed; call it before anything is opened."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            assert os.open(os.devnull, os.O_RDWR) == descriptor, "the lowest that is free"
            os.set_inheritable(descriptor, True)
    if sys.stdin is None:
        sys.stdin = os.fdopen(0, closefd=False)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)


def say(line: str, *, err: bool = False) -> None:
    """A line on stdout, or on stderr, if it can be written there."""
    with suppress(OSError):
        typer.echo(line, err=err)


def flush() -> OSError | None:
    """Write what is left to be written; the error if stdout did not take all. Python's own flush at the end has nothing
    to complain of then."""
    failed = None
    for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except OSError as error:
            failed = error if descriptor == 1 else failed
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
    return failed

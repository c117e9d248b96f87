"""`hotspare demo`: the whole story on one machine."""

from __future__ import annotations

from typing import Annotated

import typer

from app.cli.commands.connection import Json

SIZE_GIB = 1.0


def demo(
    size_gib: Annotated[
        float, typer.Option("--size-gib", metavar="F", min=0.01, max=1024, help="Size of the checkpoint, about.")
    ] = SIZE_GIB,
    json: Json = False,
) -> None:
    """Three nodes on this machine, a kill, a restore from memory, everything verified, timings against disk.

    Needs a quarter more than the size in /dev/shm, and the size on disk, in TMPDIR; where there is less, it takes a
    smaller checkpoint and says so. Leaves nothing behind.
    """
    from app.demo.story import run

    if not run(round(size_gib * (1 << 30)), as_json=json):
        raise typer.Exit(1)

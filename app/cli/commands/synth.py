"""`hotspare synth`: a checkpoint to try things with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.cli.commands.connection import Json


def synth(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An empty or new directory.")],
    like: Annotated[
        str, typer.Option(metavar="FAMILY", help="The model to be like; a wrong name lists them.", show_default=False)
    ],
    layers: Annotated[
        int | None, typer.Option(metavar="N", help="Decoder layers in all. [default: the model's]")
    ] = None,
    experts: Annotated[
        int | None, typer.Option(metavar="N", help="Experts a layer. [default: the model's]", show_default=False)
    ] = None,
    scale: Annotated[float, typer.Option(metavar="F", help="Shrinks every side of the matrices.")] = 1.0,
    seed: Annotated[int, typer.Option(metavar="N", help="The same seed gives the same bytes.")] = 0,
    json: Json = False,
) -> None:
    """Write a checkpoint with a real model's tensor names, dtypes and file layout, and seeded random content."""
    from app.terminal.console import write_json
    from app.terminal.units import size
    from transfer.checkpoint.synth import write_checkpoint

    plan = write_checkpoint(directory, like, layers=layers, experts=experts, scale=scale, seed=seed)
    tensors = sum(len(file.tensors) for file in plan.files)
    if json:
        files = [{"name": file.name, "nbytes": file.nbytes, "tensors": len(file.tensors)} for file in plan.files]
        write_json({"directory": str(directory), "like": like, "nbytes": plan.nbytes, "files": files})
        return
    typer.echo(f"{directory}: like {like}, {tensors} tensors in {len(plan.files)} files, {size(plan.nbytes)}")

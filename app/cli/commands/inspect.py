"""`hotspare inspect`: what a node would make of a checkpoint, before one is started."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from app.cli.commands.connection import Json

if TYPE_CHECKING:
    from shm.manifest import Manifest
    from transfer.checkpoint import Checkpoint

MODEL = "model"  # in the manifest, which is thrown away


def inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint's directory.")], json: Json = False
) -> None:
    """Say what was recognised of a checkpoint: layers, experts, tensors, bytes, and what is left out and why.

    Reads headers only. What it refuses, a node refuses.
    """
    from app.terminal.console import write_json
    from transfer.checkpoint import read_checkpoint

    checkpoint = read_checkpoint(directory, MODEL, "all")
    document = _document(checkpoint)
    if json:
        write_json(document)
    else:
        _show(document, checkpoint.manifest)


def _document(checkpoint: Checkpoint) -> dict[str, Any]:
    manifest = checkpoint.manifest
    dense = [row for row, key in enumerate(manifest.keys) if not key.is_expert]
    layers: dict[int, list[int]] = defaultdict(list)
    for row, key in enumerate(manifest.keys):
        if key.is_expert:
            layers[key.layer].append(row)
    return {
        "directory": str(checkpoint.directory),
        "architecture": checkpoint.shape.architecture or None,
        "family": manifest.family,
        "layers": [{"layer": n, "experts": len(rows), **_sums(manifest, rows)} for n, rows in sorted(layers.items())],
        "experts": sum(map(len, layers.values())),
        **_sums(manifest, [row for rows in layers.values() for row in rows]),
        "dense": _sums(manifest, dense),
        "files": [{"name": file.name, "nbytes": file.nbytes} for file in manifest.files],
        "left_out": [{"file": name, "why": why} for name, why in sorted(checkpoint.left_out.items())],
        "notes": list(checkpoint.notes),
    }


def _sums(manifest: Manifest, rows: Sequence[int]) -> dict[str, int]:
    """Tensors as the checkpoint counts them, a fused one once; bytes as they lie in memory."""
    from shm.block import fill_template, whole_name

    names = {
        fill_template(whole_name(t.name), manifest.keys[row]) for row in rows for t in manifest.schema(row).tensors
    }
    return {"tensors": len(names), "nbytes": int(manifest.nbytes[list(rows)].sum()) if rows else 0}


# -- for people ------------------------------------------------------------------------------------------------


def _show(document: dict[str, Any], manifest: Manifest) -> None:
    from app.terminal.console import Listing, stdout
    from app.terminal.units import size

    files, dense = document["files"], document["dense"]
    typer.echo(f"{document['directory']}: {document['architecture'] or 'no configuration'}, {document['family']}")
    typer.echo(
        f"{document['experts']} experts in {len(document['layers'])} layers, {document['tensors']} tensors, "
        f"{size(document['nbytes'])}"
    )
    typer.echo(f"dense, kept with `--include all` only: {dense['tensors']} tensors, {size(dense['nbytes'])}")
    typer.echo(f"files: {len(files)}, {size(sum(file['nbytes'] for file in files))}")
    kinds = _kinds(document["layers"])
    rows = [(_spans(layers), kind.experts, kind.tensors, size(kind.nbytes)) for kind, layers in kinds.items()]
    stdout().print(Listing(None, ["LAYERS~", "EXPERTS>", "TENSORS>", "A LAYER>"], rows))
    stdout().print(
        Listing(
            "what experts have, L and E for the numbers", ["NAME~", "DTYPE", "SHAPE", "BLOCKS>"], _tensors(manifest)
        )
    )
    for left in document["left_out"]:
        typer.echo(f"left out: {left['file']}: {left['why']}")
    for note in document["notes"]:
        typer.echo(f"note: {note}")


class _Kind(NamedTuple):
    """What layers that look alike have each."""

    experts: int
    tensors: int
    nbytes: int


def _kinds(layers: Iterable[dict[str, int]]) -> dict[_Kind, list[int]]:
    kinds: dict[_Kind, list[int]] = defaultdict(list)
    for layer in layers:
        kinds[_Kind(layer["experts"], layer["tensors"], layer["nbytes"])].append(layer["layer"])
    return kinds


def _spans(numbers: Sequence[int]) -> str:
    """`0, 3-60`: ascending numbers, those that follow each other from the first to the last."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def _tensors(manifest: Manifest) -> list[tuple[object, ...]]:
    """Of each name, numbers left open, what there is of it in how many experts' blocks."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for row, key in enumerate(manifest.keys):
        if key.is_expert:
            counts.update((t.name, t.dtype, str(list(t.shape))) for t in manifest.schema(row).tensors)
    return [(_lettered(name), *rest, count) for (name, *rest), count in sorted(counts.items())]


def _lettered(template: str) -> str:
    return template.replace("{layer}", "L").replace("{expert}", "E")

"""`hotspare ls`, `rm`, `verify`: the segments of this host, with no daemon needed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli.commands.connection import Json

if TYPE_CHECKING:
    from shm.inventory import SegmentInfo

DEFAULT_NAMESPACE = "default"
DIGEST_CHARS_SHOWN = 12
BAD_BLOCKS_SHOWN = 20

Namespace = Annotated[
    str | None, typer.Option(metavar="NS", help="Only segments of this namespace.", show_default=False)
]
Node = Annotated[str | None, typer.Option(metavar="ID", help="Only this node's segment.", show_default=False)]


def ls(namespace: Namespace = None, json: Json = False) -> None:
    """List the segments in /dev/shm: size, state, owner, and who is attached."""
    from app.terminal.console import Listing, stdout, write_json
    from shm.inventory import list_segments

    found = [info for info in list_segments() if _matches(info, None, namespace, None)]
    if json:
        write_json({"segments": [_document(info) for info in found]})
    elif found:
        columns = ("model", "node", "namespace", "size>", "state", "digest", "owner", "attached", "object")
        stdout().print(Listing(None, columns, map(_row, found)))
        for info in found:
            if info.error:
                typer.echo(f"hotspare: {info.object_name}: {info.error}", err=True)
    else:
        typer.echo("no segments on this host" + (f" in namespace {namespace}" if namespace else ""))


def _matches(info: SegmentInfo, model: str | None, namespace: str | None, node: str | None) -> bool:
    """Whether a segment is among those asked for; one that cannot be read has no model, namespace or node."""
    name = None if info.header is None else info.header.name
    wanted = ((model, name and name.model), (namespace, name and name.namespace), (node, name and name.node))
    return all(asked is None or asked == there for asked, there in wanted)


def _attached(info: SegmentInfo) -> tuple[int, ...]:
    """Processes that have it mapped, the owner left out."""
    owner = info.header.owner_pid if info.header is not None and info.owner_alive else None
    return tuple(pid for pid in info.attached_pids if pid != owner)


def _document(info: SegmentInfo) -> dict[str, Any]:
    header = info.header
    return {
        "object_name": info.object_name,
        "model": header and header.name.model,
        "namespace": header and header.name.namespace,
        "node_id": header and header.name.node,
        "nbytes": info.nbytes,
        "state": info.state,
        "manifest_digest": header.manifest_digest.hex() if header and any(header.manifest_digest) else None,
        "owner_alive": info.owner_alive,
        "owner_pid": header and header.owner_pid,
        "attached_pids": list(_attached(info)),
        "error": info.error,
    }


def _row(info: SegmentInfo) -> tuple[str, ...]:
    from app.terminal.units import size

    document = _document(info)
    return (
        document["model"] or "?",
        document["node_id"] or "?",
        document["namespace"] or "?",
        size(info.nbytes),
        info.state,
        (document["manifest_digest"] or "-")[:DIGEST_CHARS_SHOWN],
        f"pid {document['owner_pid'] or '?'}" if info.owner_alive else "none",
        " ".join(map(str, _attached(info))) or "-",
        info.object_name,
    )


# -- rm --------------------------------------------------------------------------------------------------------


def rm(
    names: Annotated[list[str] | None, typer.Argument(metavar="[MODEL|OBJECT]...", show_default=False)] = None,
    every: Annotated[bool, typer.Option("--all", help="Every segment that nobody owns.")] = False,
    namespace: Annotated[
        str | None,
        typer.Option(metavar="NS", help="Of MODEL: its namespace [default: default]. With --all: only this one."),
    ] = None,
    node: Node = None,
    json: Json = False,
) -> None:
    """Remove segments that no living daemon owns.

    Processes that are attached keep their memory until they let go. Each name is a model's, or an object's as `ls`
    shows it.
    """
    from app.terminal.console import write_json
    from shm.inventory import remove

    if bool(names) == every:
        raise typer.BadParameter("give one of the two", param_hint="[MODEL|OBJECT]... or --all")
    chosen = _removable(namespace, node) if every else _named(names or [], namespace or DEFAULT_NAMESPACE, node)
    removed = []
    for info in chosen:
        remove(info.object_name)
        removed.append(info)
        if not json:
            _tell_removed(info)
    if json:
        write_json({"removed": [_document(info) for info in removed]})
    elif not removed:
        typer.echo("nothing to remove: every segment has a living owner, or there is none")


def _removable(namespace: str | None, node: str | None) -> list[SegmentInfo]:
    from shm.inventory import list_segments

    return [info for info in list_segments() if not info.owner_alive and _matches(info, None, namespace, node)]


def _named(names: Sequence[str], namespace: str, node: str | None) -> list[SegmentInfo]:
    """Each name's segments. Raises SegmentNotFound for a name that has none, SegmentBusy if one has a living owner.

    Nothing is removed before all of them are known to be there and free.
    """
    from shm.errors import SegmentBusy, SegmentNotFound
    from shm.inventory import list_segments

    there = list_segments()
    chosen: dict[str, SegmentInfo] = {}
    for name in names:
        found = [info for info in there if info.object_name == name or _matches(info, name, namespace, node)]
        if not found:
            raise SegmentNotFound(f"{name} has no segment here in namespace {namespace}: `hotspare ls` lists what is")
        chosen.update((info.object_name, info) for info in found)
    for info in chosen.values():
        if info.owner_alive:
            pid = info.header.owner_pid if info.header else 0
            raise SegmentBusy(
                f"{info.object_name} is owned by process {pid or '?'}, which is alive: stop it first", pid
            )
    return list(chosen.values())


def _tell_removed(info: SegmentInfo) -> None:
    from app.terminal.units import size

    attached = _attached(info)
    kept = f"; processes {', '.join(map(str, attached))} keep its memory until they let go" if attached else ""
    typer.echo(f"removed {info.object_name}, {size(info.nbytes)}{kept}")


# -- verify ----------------------------------------------------------------------------------------------------


def verify(
    model: Annotated[
        str | None, typer.Option(help="Only segments of this model. [default: every one]", show_default=False)
    ] = None,
    namespace: Namespace = None,
    node: Node = None,
    json: Json = False,
) -> None:
    """Take the checksum of every block of this host's sealed segments anew; exit 1 if one differs."""
    from app.terminal.console import write_json

    reports = [_check(info, quiet=json) for info in _sealed(model, namespace, node)]
    if json:
        write_json({"segments": reports})
    if any(report["differing"] for report in reports):
        raise typer.Exit(1)


def _sealed(model: str | None, namespace: str | None, node: str | None) -> Iterator[SegmentInfo]:
    """The sealed segments asked for. Raises SegmentNotFound if there is none: nothing was verified then."""
    from shm.errors import SegmentNotFound
    from shm.inventory import list_segments

    found = [info for info in list_segments() if _matches(info, model, namespace, node)]
    sealed = [info for info in found if info.state == "sealed"]
    for info in found:
        if info.state != "sealed":
            typer.echo(f"{info.object_name} is {info.state}: passed over", err=True)
    if not sealed:
        raise SegmentNotFound("there is no sealed segment to verify: `hotspare ls` lists what there is on this host")
    yield from sealed


def _check(info: SegmentInfo, *, quiet: bool) -> dict[str, Any]:
    from app.terminal.units import duration, rate, size
    from shm.attachment import attach

    assert info.header is not None
    name = info.header.name
    started = time.monotonic()
    with attach(name.model, namespace=name.namespace, node=name.node) as weights:
        blocks = weights.rows()
        nbytes = int(weights.manifest.nbytes[blocks].sum())
        differing = weights.verify()
    seconds = time.monotonic() - started
    if not quiet:
        verdict = f"{len(differing)} of {len(blocks)} blocks differ" if differing else f"{len(blocks)} blocks are right"
        typer.echo(f"{name}: {verdict} ({size(nbytes)}, {duration(seconds)}, {rate(nbytes, seconds)})")
        for key in differing[:BAD_BLOCKS_SHOWN]:
            typer.echo(f"  layer {key.layer} expert {key.expert} differs from its checksum")
        if len(differing) > BAD_BLOCKS_SHOWN:
            typer.echo(f"  and {len(differing) - BAD_BLOCKS_SHOWN} more: --json lists all")
        if differing:
            typer.echo(f"  mend them: hotspare restore --node {name.node} --wait")
    return {
        "object_name": info.object_name, "model": name.model, "namespace": name.namespace, "node_id": name.node,
        "blocks": len(blocks), "nbytes": nbytes, "seconds": seconds,
        "differing": [{"layer": key.layer, "expert": key.expert} for key in differing],
    }  # fmt: skip

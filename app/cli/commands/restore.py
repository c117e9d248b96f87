"""`hotspare restore`: start a restore for a node or a consumer, and show how far it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli.commands.connection import COMMAND_TIMEOUT_S, DEFAULT_URL, Json, Token, Url, client

if TYPE_CHECKING:
    from app.cluster.peers import PeerClient
    from shm.manifest import Manifest

SOURCES = ("peer", "disk")


def _sources(values: list[str] | None) -> list[str] | None:
    for value in values or ():
        if value not in SOURCES:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(SOURCES)}")
    return values


def restore(
    node: Annotated[
        str | None, typer.Option(metavar="ID", help="Restore this node's segment.", show_default=False)
    ] = None,
    consumer: Annotated[
        str | None, typer.Option(metavar="ID", help="Restore this engine process's slots.", show_default=False)
    ] = None,
    layer: Annotated[
        list[int] | None, typer.Option(metavar="N", min=0, help="Only this layer; may be repeated.", show_default=False)
    ] = None,
    expert: Annotated[
        list[int] | None,
        typer.Option(metavar="N", min=0, help="Only this expert, of --layer or of every layer; may be repeated."),
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(metavar="peer|disk", callback=_sources, help="Only from there; may be repeated. [default: both]"),
    ] = None,
    read_back: Annotated[
        bool,
        typer.Option("--read-back", help="With --consumer: read what was written back, and compare it. Slower."),
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Show its progress until it ends; exit 1 if it fails.")] = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
    json: Json = False,
) -> None:
    """Bring back what a node, or an engine's slots, should hold. Any node takes it for any node."""
    from app.settings import parse_url

    if (node is None) == (consumer is None):
        raise typer.BadParameter("give one of the two", param_hint="--node ID or --consumer ID")
    if read_back and consumer is None:
        raise typer.BadParameter(
            "it is for --consumer: a node verifies its own memory anyway", param_hint="--read-back"
        )
    target = {"node_id": node} if consumer is None else {"consumer_id": consumer}
    url = parse_url(url)
    with client(token) as asking:
        experts = _experts(asking, url, node, layer or [], expert or [])
        body = {"target": target, "experts": experts, "sources": source or None, "read_back": read_back}
        answer = asking.request("POST", f"{url}/v1/restores", json=body, timeout=COMMAND_TIMEOUT_S)
        started: Mapping[str, Any] = answer.json()
        document = _watch(asking, url, started, node or f"consumer {consumer}", quiet=json) if wait else started
    _tell(document, started_only=not wait, as_json=json)
    if wait and document["state"] != "succeeded":
        raise typer.Exit(1)


def _experts(
    asking: PeerClient, url: str, node: str | None, layers: Sequence[int], experts: Sequence[int]
) -> list[dict[str, int]] | None:
    """What --layer and --expert name: both, every pair of them; one, all of it that belongs to the node."""
    if not layers and not experts:
        return None
    if layers and experts:
        return [{"layer": layer, "expert": expert} for layer in layers for expert in experts]
    manifest = asking.manifest(url)
    rows = range(len(manifest)) if node is None else _placed(asking, url, manifest, node)
    keys = [manifest.keys[row] for row in rows]
    chosen = [key for key in keys if key.is_expert and (key.layer in layers or key.expert in experts)]
    if not chosen:
        from transfer.errors import NothingToRestore

        named = f"layer {', '.join(map(str, layers))}" if layers else f"expert {', '.join(map(str, experts))}"
        raise NothingToRestore(f"nothing of {named} belongs to {node or 'the model'}: GET {url}/v1/shard-map says more")
    return [{"layer": key.layer, "expert": key.expert} for key in chosen]


def _placed(asking: PeerClient, url: str, manifest: Manifest, node: str) -> list[int]:
    """Manifest rows that belong to the node, computed as every node computes them."""
    from app.cluster.placement import Placement

    nodes = asking.request("GET", f"{url}/v1/nodes").json()["nodes"]
    ids = [each["node_id"] for each in nodes]
    if node not in ids:
        return list(range(len(manifest)))  # the node that is asked knows best how to say that there is none
    placement = Placement.compute(manifest, ids, asking.node(url)["replicas"])
    return [int(row) for row in placement.rows_of(node)]


def _watch(asking: PeerClient, url: str, started: Mapping[str, Any], into: str, *, quiet: bool) -> Mapping[str, Any]:
    from rich.console import Console

    from app.terminal.console import stdout
    from app.terminal.restore_bar import bar, watch

    def fetch() -> Mapping[str, Any]:
        document: Mapping[str, Any] = asking.request(
            "GET", f"{url}/v1/restores/{started['id']}", timeout=COMMAND_TIMEOUT_S
        ).json()
        return document

    with bar(Console(quiet=True) if quiet else stdout(), f"restoring {into}") as show:
        return watch(fetch, show)


def _tell(document: Mapping[str, Any], *, started_only: bool, as_json: bool) -> None:
    from app.terminal.console import write_json
    from app.terminal.restore_bar import came_from, seconds_of
    from app.terminal.units import duration, rate

    if as_json:
        write_json(document)
        return
    if started_only:
        typer.echo(f"restore {document['id']} is {document['state']}: `hotspare status` shows how far it is")
        return
    seconds = seconds_of(document)
    blocks = f"{document['blocks_done']} of {document['blocks_total']} blocks"
    typer.echo(
        f"restore {document['id']} {document['state']}: {blocks}, "
        f"{came_from(document) or 'nothing moved'}, {duration(seconds)}, {rate(document['bytes_done'], seconds)}"
    )
    if document["error"]:
        typer.echo(f"hotspare: {document['error']}", err=True)

"""`hotspare status`: the node, its peers, the coverage, restores and consumers, as one node sees them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from app.cli.commands.connection import COMMAND_TIMEOUT_S, DEFAULT_URL, Json, Token, Url, client

if TYPE_CHECKING:
    from app.cluster.peers import PeerClient
    from app.terminal.console import Listing

RESTORES_SHOWN = 10
LOST_SHOWN = 8
SERVICE_UNAVAILABLE = 503


def status(url: Url = DEFAULT_URL, token: Token = None, json: Json = False) -> None:
    """Show a node, its peers, how well the experts are covered, its restores and its consumers."""
    from app.settings import parse_url
    from app.terminal.console import stdout, write_json

    with client(token) as asking:
        document = _ask(asking, parse_url(url))
    if json:
        write_json(document)
        return
    console = stdout()
    for each in _tables(document):
        console.print(each)


def _ask(asking: PeerClient, url: str) -> dict[str, Any]:
    """Every part; `coverage` is None while the node has no manifest."""
    return {
        "node": asking.node(url),
        "readiness": _get(asking, url, "/readyz"),
        "nodes": (_get(asking, url, "/v1/nodes") or {})["nodes"],
        "coverage": _get(asking, url, "/v1/coverage"),
        "restores": (_get(asking, url, "/v1/restores") or {})["restores"],
        "consumers": (_get(asking, url, "/v1/consumers") or {})["consumers"],
    }


def _get(asking: PeerClient, url: str, path: str) -> dict[str, Any] | None:
    """A document; a node that is not ready answers 503, with the readiness all the same, or with a problem."""
    from transfer.client.http import NodeRefused

    try:
        document: dict[str, Any] = asking.request("GET", url + path, timeout=COMMAND_TIMEOUT_S).json()
        return document
    except NodeRefused as error:
        if error.status != SERVICE_UNAVAILABLE:
            raise
        return dict(error.problem) if "ready" in error.problem else None


def _tables(document: Mapping[str, Any]) -> Iterator[Listing]:
    from app.terminal.console import Listing

    yield Listing("Node", ("", ""), _node_rows(document))
    rows = (
        (n["node_id"] + (" (this one)" if n["self"] else ""), n["url"], n["state"], n["node_state"] or "-",
         n["conflict"] or n["error"] or n["warning"] or "")
        for n in document["nodes"]
    )  # fmt: skip
    yield Listing("Nodes", ("node", "url", "seen as", "says it is", "~"), rows)
    if document["coverage"] is not None:
        yield Listing("Coverage", ("", ""), _coverage_rows(document["coverage"]))
    if document["restores"]:
        columns = ("restore", "into", "state", "blocks>", "bytes>", "local>", "peer>", "disk>", "took>", "~")
        yield Listing("Restores", columns, map(_restore_row, document["restores"][:RESTORES_SHOWN]))
    if document["consumers"]:
        titles = ("consumer", "transfers", "blocks in slots>", "bytes>", "expires in>", "~")
        yield Listing("Consumers", titles, map(_consumer_row, document["consumers"]))


def _consumer_row(consumer: Mapping[str, Any]) -> tuple[str, ...]:
    from app.terminal.units import duration, size

    return (
        consumer["id"],
        consumer["session_id"],
        f"{consumer['blocks']} in {consumer['slots']}",
        size(consumer["bytes"]),
        duration(consumer["expires_in_s"]),
        consumer["error"] or "",
    )


def _node_rows(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    from app.terminal.units import size

    node, readiness = document["node"], document["readiness"]
    failing = [name for name, holds in readiness["checks"].items() if not holds] if readiness else []
    yield "id", node["node_id"]
    yield "model", f"{node['model']} (namespace {node['namespace']})"
    yield "state", node["state"] + (f": not {', '.join(failing)}" if failing else "")
    yield (
        "blocks",
        f"{node['blocks']}, {size(node['bytes'])}"
        + (f"; {readiness['missing']} missing" if readiness and readiness["missing"] else ""),
    )
    yield "proved", _proved(node)
    yield "segment", f"/dev/shm/{node['segment']}"
    if readiness and readiness["detail"]:
        yield "memory", readiness["detail"]
    yield "manifest", node["manifest_digest"] or "not known yet"
    yield "transfers", node["session_id"] or "no engine"


def _proved(node: Mapping[str, Any]) -> str:
    """How old the oldest proof of its blocks is."""
    from app.terminal.units import ago

    if node["blocks_unproved"]:
        return f"{node['blocks_unproved']} blocks not yet since it started"
    return f"all of them, the oldest {ago(node['proved_oldest'])}" if node["proved_oldest"] else "-"


def _coverage_rows(coverage: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    total = coverage["total"]
    for replicas, blocks in sorted(total["by_replicas"].items(), key=lambda item: int(item[0])):
        yield f"{replicas} live replica{'' if int(replicas) == 1 else 's'}", f"{blocks} of {total['blocks']} blocks"
    lost = [f"layer {key['layer']} expert {key['expert']}" for key in coverage["lost"]]
    if lost:
        more = f" and {len(lost) - LOST_SHOWN} more" if len(lost) > LOST_SHOWN else ""
        yield "lost", ", ".join(lost[:LOST_SHOWN]) + more


def _restore_row(restore: Mapping[str, Any]) -> tuple[str, ...]:
    from app.terminal.restore_bar import seconds_of
    from app.terminal.units import duration, size

    target = restore["target"]
    return (
        restore["id"],
        target["node_id"] or f"consumer {target['consumer_id']}",
        restore["state"],
        f"{restore['blocks_done']}/{restore['blocks_total']}",
        size(restore["bytes_done"]),
        *(size(restore["bytes_by_source"][source]) for source in ("local", "peer", "disk")),
        duration(seconds_of(restore)),
        restore["error"] or "",
    )

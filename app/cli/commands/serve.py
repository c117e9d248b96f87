"""`hotspare serve`: run a node."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

LOG_LEVELS = ("debug", "info", "warning", "error")


def _log_level(value: str) -> str:
    if value.lower() not in LOG_LEVELS:
        raise typer.BadParameter(f"{value!r} is not one of {', '.join(LOG_LEVELS)}")
    return value.lower()


def serve(
    model: Annotated[
        str | None, typer.Option(help="The model's name, the same on every node.", show_default=False)
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Its safetensors; without it, everything comes from peers.")
    ] = None,
    node_id: Annotated[str | None, typer.Option(metavar="ID", help="This node's name. [default: the host's]")] = None,
    listen: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Control plane; port 0 takes any. [default: 127.0.0.1:8470]")
    ] = None,
    data_host: Annotated[
        str | None,
        typer.Option(metavar="IP", help="Where peers reach the transfer engine. [default: the host of --listen]"),
    ] = None,
    peer: Annotated[
        list[str] | None, typer.Option(metavar="ID=URL", help="Another node; once for each.", show_default=False)
    ] = None,
    replicas: Annotated[
        int | None, typer.Option(metavar="R", help="Nodes that hold each block. [default: 2, or 1 without peers]")
    ] = None,
    include: Annotated[
        str | None, typer.Option(metavar="experts|all", help="`all` keeps the dense tensors too. [default: experts]")
    ] = None,
    fill: Annotated[
        str | None,
        typer.Option(
            metavar="auto|disk|peer|none",
            help="Whence a node fills itself: auto asks peers, then the disk; none waits for a restore. A sealed "
            "segment is adopted always. [default: auto]",
        ),
    ] = None,
    namespace: Annotated[
        str | None, typer.Option(metavar="NS", help="Keeps deployments on one host apart. [default: default]")
    ] = None,
    scrub_rate: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Bytes a second of published blocks to prove in the background, such as 50MB. [default: all in a day]",
        ),
    ] = None,
    transport: Annotated[str | None, typer.Option(metavar="tcp|rdma", help="[default: tcp]")] = None,
    token: Annotated[
        str | None,
        typer.Option(help="What requests must show. Better in HOTSPARE_TOKEN: a command line can be read by others."),
    ] = None,
    insecure: Annotated[
        bool | None, typer.Option("--insecure", help="Listen beyond this host without a token.", show_default=False)
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", envvar="HOTSPARE_CONFIG", help="A TOML file with any of these options."),
    ] = None,
    log_level: Annotated[
        str,
        typer.Option(metavar="|".join(LOG_LEVELS), envvar="HOTSPARE_LOG_LEVEL", callback=_log_level),
    ] = "info",
) -> None:
    """Run a node: fill its segment, serve the control plane, answer its peers.

    Every option can also be set as HOTSPARE_<OPTION> (peers: HOTSPARE_PEERS="b=http://…,c=http://…") and in the file
    that --config names. The command line wins over the environment, the environment over the file.
    """
    from app.cli import daemon, failure
    from app.settings import load_settings

    options = {
        "model": model, "checkpoint": checkpoint, "node_id": node_id, "listen": listen, "data_host": data_host,
        "peers": peer, "replicas": replicas, "include": include, "fill": fill, "namespace": namespace,
        "transport": transport, "scrub_rate": scrub_rate, "token": token, "insecure": insecure,
    }  # fmt: skip
    settings = load_settings(config, options)
    settings.require_model()
    try:
        daemon.run(settings, log_level)
    except Exception as error:  # left while it is held, and with it the engine, which would take a second to end
        daemon.leave(failure.tell(error))
    daemon.leave()

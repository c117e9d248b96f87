"""The options that lead a command to a running node, and the client that they make."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from app.cluster.peers import PeerClient

DEFAULT_URL = "http://127.0.0.1:8470"
COMMAND_TIMEOUT_S = 30.0  # a node passes requests on to others, and maps of large models take their time

Url = Annotated[str, typer.Option(metavar="URL", envvar="HOTSPARE_URL", help="The node to ask.", show_envvar=True)]
Token = Annotated[
    str | None,
    typer.Option(envvar="HOTSPARE_TOKEN", help="What the node wants to be shown.", show_envvar=True),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@contextmanager
def client(token: str | None) -> Iterator[PeerClient]:
    """A client for one command."""
    from app.cluster.peers import PeerClient

    made = PeerClient(token)
    try:
        yield made
    finally:
        made.close()

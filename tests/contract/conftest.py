"""Nodes that the tests of a module share, since starting one takes a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def start_nodes(
    own_namespace: Callable[..., Any],
    serving: Callable[..., Any],
    free_port: Callable[[], int],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., dict[str, Any]]]:
    """`start_nodes("a", "b", checkpoint=…, env=…, fill=…)` → daemons by node id, peers of each other."""
    with ExitStack() as stack:

        def start(*names: str, **options: Any) -> dict[str, Any]:
            namespace = stack.enter_context(own_namespace())
            serve = stack.enter_context(serving(namespace, tmp_path_factory.mktemp("nodes")))
            ports = {name: free_port() for name in names}
            return {name: serve(name, ports, **options) for name in names}

        yield start


@pytest.fixture(scope="module")
def trio(
    start_nodes: Callable[..., dict[str, Any]], moe_checkpoint: Path, wait_until: Callable[..., Any]
) -> dict[str, Any]:
    """Three ready nodes with two replicas of every block; each knows what the others have. Not to be killed."""
    daemons = start_nodes("a", "b", "c", checkpoint=moe_checkpoint)
    for daemon in daemons.values():
        daemon.wait_ready()
    for name, daemon in daemons.items():

        def knows_all(daemon: Any = daemon) -> bool:
            count = daemon.get("/v1/coverage")["total"]
            states = {node["node_state"] for node in daemon.get("/v1/nodes")["nodes"]}
            return states == {"ready"} and count["by_replicas"]["2"] == count["blocks"]

        wait_until(knows_all, f"{name} knows what all nodes have")
    return daemons

"""Nodes that the tests of a module share, since starting one takes a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def start_nodes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., dict[str, Any]]]:
    """`start_nodes("a", "b", checkpoint=…, env=…, fill=…)` → daemons by node id, peers of each other."""
    # What tests/conftest.py offers for the life of one test, for the life of a module.
    plugins = request.config.pluginmanager.get_plugins()
    shared = next(plugin for plugin in plugins if hasattr(plugin, "Daemon") and hasattr(plugin, "serve"))
    open_fixtures: list[Iterator[Any]] = []

    def use(fixture: Any, *arguments: Any) -> Any:
        open_fixtures.append(fixture.__wrapped__(*arguments))
        return next(open_fixtures[-1])

    def start(*names: str, **options: Any) -> dict[str, Any]:
        serve = use(shared.serve, use(shared.namespace), tmp_path_factory.mktemp("nodes"))
        find_port = shared.free_port.__wrapped__()
        ports = {name: find_port() for name in names}
        return {name: serve(name, ports, **options) for name in names}

    yield start
    for fixture in reversed(open_fixtures):
        next(fixture, None)


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

"""Two processes under one node id, each with a /dev/shm of its own as on two hosts."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SERVE = "import sys; from app.cli.main import main; sys.argv[0] = 'hotspare'; main()"
STATUS = "import sys; from app.cli.main import main; sys.argv = ['hotspare', 'status', '--url', sys.argv[1]]; main()"
OWN_SHM = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"', "sh"]


def test_two_hosts_under_one_id_are_noticed_and_told(
    serve: Callable[..., Any],
    python: Callable[..., Any],
    free_port: Callable[[], int],
    namespace: str,
    moe_checkpoint: Path,
    wait_until: Callable[..., Any],
) -> None:
    if subprocess.run([*OWN_SHM, "true"], capture_output=True, check=False).returncode:
        pytest.skip("a /dev/shm of its own needs a mount namespace, and so root")
    ports = {"a": free_port(), "b": free_port()}
    asked, _ = (serve(node, ports, checkpoint=moe_checkpoint, replicas=2).wait_ready() for node in ports)

    def warning() -> str | None:
        (found,) = (node["warning"] for node in asked.get("/v1/nodes")["nodes"] if node["node_id"] == "b")
        return found

    asked.wait_alive("b")
    assert warning() is None
    peer = f"a=http://127.0.0.1:{ports['a']}"
    arguments = ["--model", "moe", "--namespace", namespace, "--node-id", "b", "--peer", peer]
    second = python(SERVE, "serve", *arguments, "--listen", f"127.0.0.1:{free_port()}", prefix=OWN_SHM)
    second.expect("b of moe")
    wait_until(warning, "a says that there are two")
    assert "two processes" in (warning() or "")
    assert "run as node b" in asked.said()
    status, said, errors = python(STATUS, asked.url).wait()
    assert status == 0, errors
    assert "run as node b" in " ".join(said.split())
    assert json.loads(asked.ask("GET", "/v1/nodes").content)["nodes"][0]["warning"] is None, "of a itself nothing"

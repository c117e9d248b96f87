"""Thousands of API calls that schemathesis makes up from the OpenAPI document, at a node that has a peer.

A call fails the run where its answer is a failure of ours (5xx), has a status or a shape that the document does not
name, takes what the document forbids or refuses what it allows. Two nodes really run, on a small checkpoint.

    python tools/generated_calls.py --schemathesis build/schemathesis/bin/st --examples 2000
"""

from __future__ import annotations

import argparse
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx

ROOT = Path(__file__).parent.parent
READY_S = 60.0
CONFIGURATION = """
[checks.negative_data_rejection]
expected-statuses = [400, 401, 403, 404, 405, 406, 409, 413, 415, 422, 428, 429]
[checks.positive_data_acceptance]
expected-statuses = ["2xx", 401, 403, 404, 409, 413, 429]
[[operations]]
include-path-regex = "^/v1/(pushes|restores|consumers/[^/]+)$"
include-method = ["POST", "PUT"]
checks.positive_data_acceptance.expected-statuses = ["2xx", 401, 403, 404, 409, 413, 422, 429]
[output.truncation]
max-lines = 10
max-width = 200
"""
"""Of schemathesis: a body over its limit is refused as such, whatever is in it; and what a table or a restore may name
depends on the model, which no schema says."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def serving(name: str, ports: dict[str, int], checkpoint: Path, namespace: str, token: str) -> Iterator[str]:
    """A node's URL, once it is ready."""
    url = f"http://127.0.0.1:{ports[name]}"
    peers = [
        option for peer in ports if peer != name for option in ("--peer", f"{peer}=http://127.0.0.1:{ports[peer]}")
    ]
    command = [
        sys.executable, "-m", "app.cli", "serve", "--model", "generated", "--namespace", namespace, "--node-id", name,
        "--listen", url.removeprefix("http://"), "--checkpoint", str(checkpoint), "--fill", "disk", *peers,
        "--log-level", "error",
    ]  # fmt: skip
    environment = {**os.environ, "HOTSPARE_TOKEN": token, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        _wait_ready(url, process)
        yield url
        if process.poll() is not None:
            raise SystemExit(f"node {name} ended with {process.returncode}")
    finally:
        process.terminate()
        process.wait()
        subprocess.run(
            [sys.executable, "-m", "app.cli", "rm", "--all", "--namespace", namespace], env=environment,
            stdout=subprocess.DEVNULL, check=False,
        )  # fmt: skip


def _wait_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + READY_S
    while time.monotonic() < end and process.poll() is None:
        try:
            if httpx.get(f"{url}/readyz", trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.1)
    raise SystemExit(f"the node at {url} is not ready")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--schemathesis", required=True, help="its command, `st`")
    parser.add_argument("--examples", type=int, default=300, help="of each operation, at most")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 32))
    parser.add_argument("more", nargs="*", help="for schemathesis itself, after --")
    given = parser.parse_args()
    from transfer.checkpoint.synth import write_checkpoint

    token, namespace = secrets.token_hex(16), f"generated-{os.getpid()}"
    ports = {name: free_port() for name in ("a", "b")}
    with ExitStack() as stack:
        checkpoint = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "checkpoint"
        write_checkpoint(checkpoint, "deepseek-v3", layers=5, experts=7, scale=0.03125, seed=3)
        urls = [stack.enter_context(serving(name, ports, checkpoint, namespace, token)) for name in ports]
        print(f"seed {given.seed}", flush=True)  # noqa: T201
        configuration = checkpoint.parent / "schemathesis.toml"
        configuration.write_text(CONFIGURATION)
        command = [given.schemathesis, "--config-file", str(configuration), "run", f"{urls[0]}/openapi.json"]
        command += ["--checks", "all", "--phases", "examples,coverage,fuzzing,stateful", "--continue-on-failure"]
        command += ["--max-examples", str(given.examples), "--seed", str(given.seed), "--request-timeout", "60"]
        command += ["--header", f"Authorization: Bearer {token}", *given.more]
        status = subprocess.run(command, check=False, cwd=checkpoint.parent).returncode
    print(f"the nodes have stopped; schemathesis ended with {status}")  # noqa: T201
    return status


if __name__ == "__main__":
    sys.exit(main())

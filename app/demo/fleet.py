"""The demo's nodes: processes of `hotspare serve` on free ports of this machine, that die with the demo."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import app
from app.cluster.peers import PeerClient
from app.demo.interruption import Interruption
from shm.errors import HotspareError
from shm.inventory import remove
from shm.layout import SegmentName
from transfer.client.http import NodeRefused, NodeUnreachable

MODEL = "demo-deepseek-v3"
REPLICAS = 2
ANSWER_TIMEOUT_S = 30.0
FILL_TIMEOUT_S = 1800.0  # the largest demo from the slowest disk
STOP_TIMEOUT_S = 10.0
POLL_S = 0.02
LOG_LINES_SHOWN = 20
PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None)


class DemoFailed(HotspareError):
    """The demo did not end as it should. Says what was seen."""


def die_with_parent() -> None:
    """In a child before it becomes another program: be killed when the demo's process dies, however it dies."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def environment() -> dict[str, str]:
    """For child processes: this source tree, and none of the user's own settings of a node."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HOTSPARE_")}
    root = str(Path(app.__path__[0]).parent)
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, (root, kept.get("PYTHONPATH"))))}


def free_ports(count: int) -> list[int]:
    """TCP ports of the loopback address that nobody listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


class NodeProcess:
    """One node: started, killed and started again under the same name and address."""

    def __init__(
        self, node_id: str, port: int, command: Sequence[str], log: Path, client: PeerClient, interruption: Interruption
    ) -> None:
        self.node_id = node_id
        self.url = f"http://127.0.0.1:{port}"
        self._command = [*command, "--node-id", node_id, "--listen", f"127.0.0.1:{port}"]
        self._log = log
        self._client = client
        self._interruption = interruption
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        return 0 if self._process is None else self._process.pid

    def start(self, peers: Mapping[str, str], fill: str) -> None:
        """Start it, and return at once."""
        options = [option for node, url in peers.items() for option in ("--peer", f"{node}={url}")]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._command, *options, "--fill", fill],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._log.parent,
                env=environment(),
                start_new_session=True,  # Ctrl-C on the terminal is for the demo, which then stops its nodes
                preexec_fn=die_with_parent,
            )

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def ask_to_stop(self) -> None:
        """SIGTERM."""
        if self._process is not None:
            self._process.terminate()

    def wait_until_stopped(self) -> None:
        """Wait for it; SIGKILL if that takes too long."""
        if self._process is not None:
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.kill()

    def get(self, path: str) -> dict[str, Any]:
        document: dict[str, Any] = self._client.request("GET", self.url + path, timeout=ANSWER_TIMEOUT_S).json()
        return document

    def post(self, path: str, body: object) -> dict[str, Any]:
        answer = self._client.request("POST", self.url + path, json=body, timeout=ANSWER_TIMEOUT_S)
        document: dict[str, Any] = answer.json()
        return document

    def wait_for(self, condition: Callable[[], bool], what: str, timeout_s: float) -> None:
        """Ask until it is so. Raises DemoFailed with the node's last words if it ends first, or never gets there."""
        deadline = time.monotonic() + timeout_s
        while not self._holds(condition):
            self._interruption.check()
            if self._process is None or self._process.poll() is not None:
                raise DemoFailed(f"{self.node_id} ended before it was {what}; its last words:\n{self.last_words()}")
            if time.monotonic() > deadline:
                raise DemoFailed(f"{self.node_id} is not {what} after {timeout_s:.0f} s:\n{self.last_words()}")
            time.sleep(POLL_S)

    @staticmethod
    def _holds(condition: Callable[[], bool]) -> bool:
        try:
            return condition()
        except (NodeUnreachable, NodeRefused):
            return False

    def wait_until_answering(self) -> None:
        self.wait_for(lambda: bool(self.get("/v1/node")), "answering", ANSWER_TIMEOUT_S)

    def wait_until_ready(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        def is_ready() -> bool:
            meanwhile()
            return bool(self.get("/readyz")["ready"])

        self.wait_for(is_ready, "ready", FILL_TIMEOUT_S)

    def last_words(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines() if self._log.exists() else []
        return "\n".join(lines[-LOG_LINES_SHOWN:])


class Fleet:
    """The three nodes. What they have in /dev/shm is `object_prefix`*."""

    NODE_IDS = ("node-a", "node-b", "node-c")

    def __init__(self, namespace: str, checkpoint: Path, logs: Path, interruption: Interruption) -> None:
        self.namespace = namespace
        self.logs = logs
        self._client = PeerClient()
        command = [sys.executable, "-m", "app.cli", "serve", "--model", MODEL, "--checkpoint", str(checkpoint)]
        command += ["--namespace", namespace, "--replicas", str(REPLICAS)]
        self.nodes = {
            node_id: NodeProcess(node_id, port, command, logs / f"{node_id}.log", self._client, interruption)
            for node_id, port in zip(self.NODE_IDS, free_ports(len(self.NODE_IDS)), strict=True)
        }

    def start(self, node_id: str, fill: str) -> NodeProcess:
        node = self.nodes[node_id]
        node.start({other: each.url for other, each in self.nodes.items() if other != node_id}, fill)
        return node

    def kill_and_forget(self, node_id: str) -> int:
        """SIGKILL the node and remove its segment, as if its host had been replaced; the bytes that were in it."""
        self.nodes[node_id].kill()
        return remove(SegmentName(self.namespace, MODEL, node_id).object_name)

    def filling(self) -> dict[str, Any]:
        """The restores of every node that answers, added up into one document."""
        total: dict[str, Any] = {"bytes_total": 0, "bytes_done": 0, "blocks_done": 0}
        by_source = {"local": 0, "peer": 0, "disk": 0}
        for node in self.nodes.values():
            try:
                restores = node.get("/v1/restores")["restores"]
            except (NodeUnreachable, NodeRefused):
                continue
            for restore in restores:
                for name in total:
                    total[name] += restore[name]
                for source in by_source:
                    by_source[source] += restore["bytes_by_source"][source]
        return total | {"bytes_by_source": by_source}

    def stop(self) -> None:
        """Stop every node, all at the same time."""
        for node in self.nodes.values():
            node.ask_to_stop()
        for node in self.nodes.values():
            node.wait_until_stopped()
        self._client.close()

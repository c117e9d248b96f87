"""Three hosts, as network namespaces, and what links and firewalls do to them: one slow party slows only itself.

Host a has nothing, or has lost it; b and c have everything. What is measured is a's restore, as it tells it itself.
"""

from __future__ import annotations

import itertools
import json
import mmap
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from shm import attach
from shm.layout import SegmentName
from tests.processes import wait_until

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, ("ip", "tc", "nft"))), reason="needs root, iproute2 and nftables"
)
PORT = 8470
DATA_PORTS = "15000-17000"  # where Mooncake's engines listen
ADDRESSES = {"a": "10.78.0.1", "b": "10.78.0.2", "c": "10.78.0.3"}
# Of machines with ten times as much to do as they can: what was, without taking over, is 10 s and more on an idle one.
ROUTED_AROUND_S = 8.0
NAMELESS_S_MAX = 18.0  # a resolver waits for 20 s and more
_numbers = itertools.count()

SERVE = "import sys; from app.cli.main import main; sys.argv[0] = 'hotspare'; main()"
ASK = """
import json, sys
import httpx
with httpx.Client(base_url=sys.argv[1], trust_env=False, timeout=60) as http:
    print("up", flush=True)
    for line in sys.stdin:
        method, path, body = json.loads(line)
        answer = http.request(method, path, json=body)
        is_json = "json" in answer.headers["content-type"]
        print("said", json.dumps(answer.json() if is_json else answer.text), flush=True)
"""


class Links:
    """Hosts a, b and c, each with a cable to one switch, in namespaces of their own."""

    def __init__(self) -> None:
        mark = f"{os.getpid() % 100_000}x{next(_numbers)}"
        self._switch = f"hotspare-{mark}s"
        self.names = {host: f"hotspare-{mark}{host}" for host in ADDRESSES}
        try:
            for name in (self._switch, *self.names.values()):
                self._run("ip", "netns", "add", name)
            self._run("ip", "-n", self._switch, "link", "add", "switch", "type", "bridge")
            self._run("ip", "-n", self._switch, "link", "set", "switch", "up")
            for host, address in ADDRESSES.items():
                self._plug(host, address)
        except BaseException:
            self.close()
            raise

    def _plug(self, host: str, address: str) -> None:
        name, port = self.names[host], f"to-{host}"
        self._run("ip", "-n", name, "link", "add", "eth", "type", "veth", "peer", "name", port, "netns", self._switch)
        self._run("ip", "-n", self._switch, "link", "set", port, "master", "switch", "up")
        self._run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth")
        for device in ("lo", "eth"):
            self._run("ip", "-n", name, "link", "set", device, "up")

    def slow_down(self, host: str, rate: str) -> None:
        """Let it send only so much."""
        shape = ["root", "tbf", "rate", rate, "burst", "32kb", "latency", "400ms"]
        self.on(host, "tc", "qdisc", "add", "dev", "eth", *shape)

    def firewall(self, host: str, *rules: str) -> None:
        """Put these rules before all that the host sends and receives, in place of those before."""
        chains = "".join(
            f"chain {way} {{ type filter hook {way} priority 0; {' '.join(f'{rule};' for rule in rules)} }}\n"
            for way in ("input", "output")
        )
        script = f"table inet hotspare\ndelete table inet hotspare\ntable inet hotspare {{ {chains} }}\n"
        self.on(host, "nft", "-f", "-", stdin=script)

    def connections(self, host: str) -> list[str]:
        """The local ports of its data connections to others."""
        said = self.on(host, "ss", "-Htn", "state", "established", f"( dport >= :{15000} and dport <= :{17000} )")
        return [line.split()[2].rpartition(":")[2] for line in said.splitlines()]

    def on(self, host: str, *command: str, stdin: str | None = None) -> str:
        return self._run("ip", "netns", "exec", self.names[host], *command, stdin=stdin)

    def close(self) -> None:
        for name in (self._switch, *self.names.values()):
            with suppress(subprocess.CalledProcessError):
                self._run("ip", "netns", "del", name)

    @staticmethod
    def _run(*command: str, stdin: str | None = None) -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True, input=stdin).stdout


@pytest.fixture
def links() -> Iterator[Links]:
    try:
        made = Links()
    except subprocess.CalledProcessError as error:  # a container without the right to
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    yield made
    made.close()


class Hosts:
    """A node on each host, and a voice beside a's."""

    def __init__(self, links: Links, python: Callable[..., Any], namespace: str) -> None:
        self._links, self._python, self._namespace = links, python, namespace

    def serve(self, host: str, *more: object, prefix: Sequence[str] = ()) -> Any:
        peers = [word for h, at in ADDRESSES.items() if h != host for word in ("--peer", f"{h}=http://{at}:{PORT}")]
        arguments = ["serve", "--model", "moe", "--namespace", self._namespace, "--insecure", "--replicas", "3"]
        arguments += ["--node-id", host, "--listen", f"{ADDRESSES[host]}:{PORT}", *peers, *more]
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HOTSPARE_", "MC_"))}
        if prefix:
            return self._python(SERVE, *arguments, prefix=prefix, env=kept)
        return self._python(SERVE, *arguments, network=self._links.names[host], environment=kept)

    def start(self, *more: object, prefix: Sequence[str] = ()) -> None:
        """Start a, and wait until it is ready."""
        self.serve("a", *more, prefix=prefix).expect("a is ready")
        self._voice = self._python(ASK, f"http://{ADDRESSES['a']}:{PORT}", network=self._links.names["a"])
        self._voice.expect("up")

    def ask(self, method: str, path: str, body: object = None) -> Any:
        self._voice.tell(json.dumps([method, path, body]))
        return json.loads(self._voice.expect("said"))

    def wait_restore(self, restore_id: str) -> dict[str, Any]:
        def ended() -> Any:
            document = self.ask("GET", f"/v1/restores/{restore_id}")
            return document if document["state"] in ("succeeded", "failed", "cancelled") else None

        document: dict[str, Any] = wait_until(ended, f"end of restore {restore_id}")
        return document

    def spoil(self) -> None:
        """Flip a byte of every block of a's: what is restored then has to come from others."""
        with attach("moe", namespace=self._namespace, node="a") as weights:
            blocks = [bytes(weights.block(row)) for row in weights.rows()]
        path = Path("/dev/shm") / SegmentName(self._namespace, "moe", "a").object_name.lstrip("/")
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
            for block in blocks:
                memory[memory.find(block)] ^= 0x80

    def restores(self) -> list[dict[str, Any]]:
        return [self.ask("GET", f"/v1/restores/{each['id']}") for each in self.ask("GET", "/v1/restores")["restores"]]


def took_s(restore: dict[str, Any]) -> float:
    from datetime import datetime

    started, finished = (datetime.fromisoformat(restore[name]) for name in ("started_at", "finished_at"))
    return (finished - started).total_seconds()


@pytest.fixture
def hosts(links: Links, python: Callable[..., Any], namespace: str, moe_checkpoint: Path) -> Hosts:
    made = Hosts(links, python, namespace)
    for host in ("b", "c"):
        made.serve(host, "--checkpoint", moe_checkpoint).expect(f"{host} is ready")
    return made


def filled(hosts: Hosts) -> dict[str, Any]:
    """The restore that filled a: all in one, and from peers alone."""
    (restore,) = [each for each in hosts.restores() if each["state"] == "succeeded"]
    assert restore["bytes_by_source"]["disk"] == 0
    return restore


@pytest.mark.parametrize("rate", ["1mbit", "20mbit", "100mbit"])
def test_a_slow_replica_beside_a_fast_one_costs_next_to_nothing(links: Links, hosts: Hosts, rate: str) -> None:
    links.slow_down("c", rate)
    hosts.start("--fill", "peer")
    assert took_s(filled(hosts)) < ROUTED_AROUND_S


@pytest.mark.parametrize("verdict", ["drop", "reject with tcp reset"])
def test_data_ports_that_a_firewall_closes_are_routed_around(links: Links, hosts: Hosts, verdict: str) -> None:
    links.firewall("c", f"tcp dport {DATA_PORTS} {verdict}")
    hosts.start("--fill", "peer")
    assert took_s(filled(hosts)) < ROUTED_AROUND_S

    def told() -> Any:
        (peer,) = [each for each in hosts.ask("GET", "/v1/nodes")["nodes"] if each["node_id"] == "c"]
        return peer["state"] == "alive" and "its memory cannot be read from here" in (peer["warning"] or "")

    wait_until(told, "that c answers, and cannot be read from")
    assert "hotspare_peers_unreadable 1.0" in hosts.ask("GET", "/metrics")


@pytest.mark.parametrize("verdict", ["drop", "reject with tcp reset"])
def test_connections_that_a_firewall_forgot_while_they_were_idle_cost_no_restore(
    links: Links, hosts: Hosts, verdict: str
) -> None:
    """What a firewall does that keeps a table of connections: it drops what it does not know any more, or resets it."""
    hosts.start("--fill", "peer")
    kept = ", ".join(links.connections("a"))
    assert kept, "this test needs connections"
    links.firewall("a", f"tcp sport {{ {kept} }} {verdict}", f"tcp dport {{ {kept} }} drop")
    hosts.spoil()
    restore = hosts.ask("POST", "/v1/restores", {"target": {"node_id": "a"}, "sources": ["peer"]})
    found = hosts.wait_restore(restore["id"])
    assert (found["state"], found["bytes_by_source"]["disk"]) == ("succeeded", 0), found
    assert took_s(found) < ROUTED_AROUND_S


def test_a_name_server_that_does_not_answer_keeps_no_node_from_its_disk_or_its_memory(
    links: Links, python: Callable[..., Any], namespace: str, moe_checkpoint: Path
) -> None:
    links.firewall("b", "udp dport 53 drop")
    resolver = Path("/etc/netns") / links.names["a"]
    resolver.mkdir(parents=True)
    try:
        (resolver / "resolv.conf").write_text(f"nameserver {ADDRESSES['b']}\n")
        hosts = Hosts(links, python, namespace)
        started = time.monotonic()
        there = ("ip", "netns", "exec", links.names["a"])  # which has it see that name server
        hosts.start("--checkpoint", moe_checkpoint, "--peer", "d=http://nowhere.example:8470", prefix=there)
        assert time.monotonic() - started < NAMELESS_S_MAX
        restore = hosts.ask("POST", "/v1/restores", {"target": {"node_id": "a"}})
        started = time.monotonic()
        assert hosts.wait_restore(restore["id"])["state"] == "succeeded"
        assert time.monotonic() - started < NAMELESS_S_MAX
    finally:
        shutil.rmtree(resolver)

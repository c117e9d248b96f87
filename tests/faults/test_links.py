"""Three hosts, as network namespaces, and what links and firewalls do to them: one slow party slows only itself.

Host a has nothing, or has lost it; b and c have everything. What is measured is a's restore, as it tells it itself.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, ("ip", "tc", "nft"))), reason="needs root, iproute2 and nftables"
)
PORT = 8470
DATA_PORTS = "15000-17000"  # where Mooncake's engines listen
ADDRESSES = {"a": "10.78.0.1", "b": "10.78.0.2", "c": "10.78.0.3"}
# Of machines with ten times as much to do as they can: what was, without taking over, is 10 s and more on an idle one.
ROUTED_AROUND_S = 8.0
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
        print("said", answer.text.replace("\\n", " "), flush=True)
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

    def __init__(self, links: Links, python: Callable[..., Any], namespace: str, checkpoint: Path) -> None:
        self._links, self._python, self._namespace, self._checkpoint = links, python, namespace, checkpoint
        for host in ("b", "c"):
            self.serve(host, "--checkpoint", checkpoint).expect(f"{host} is ready")

    def serve(self, host: str, *more: object) -> Any:
        peers = [word for h, at in ADDRESSES.items() if h != host for word in ("--peer", f"{h}=http://{at}:{PORT}")]
        arguments = ["serve", "--model", "moe", "--namespace", self._namespace, "--insecure", "--replicas", "3"]
        arguments += ["--node-id", host, "--listen", f"{ADDRESSES[host]}:{PORT}", *peers, *more]
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HOTSPARE_", "MC_"))}
        return self._python(SERVE, *arguments, network=self._links.names[host], environment=kept)

    def start(self, *more: object) -> None:
        """Start a, and wait until it is ready."""
        self.node = self.serve("a", *more)
        self.node.expect("a is ready")
        self._voice = self._python(ASK, f"http://{ADDRESSES['a']}:{PORT}", network=self._links.names["a"])
        self._voice.expect("up")

    def ask(self, method: str, path: str, body: object = None) -> Any:
        self._voice.tell(json.dumps([method, path, body]))
        return json.loads(self._voice.expect("said"))

    def restores(self) -> list[dict[str, Any]]:
        return [self.ask("GET", f"/v1/restores/{each['id']}") for each in self.ask("GET", "/v1/restores")["restores"]]


def took_s(restore: dict[str, Any]) -> float:
    from datetime import datetime

    started, finished = (datetime.fromisoformat(restore[name]) for name in ("started_at", "finished_at"))
    return (finished - started).total_seconds()


@pytest.fixture
def hosts(links: Links, python: Callable[..., Any], namespace: str, moe_checkpoint: Path) -> Hosts:
    return Hosts(links, python, namespace, moe_checkpoint)


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

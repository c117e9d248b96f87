"""Two hosts, as network namespaces: what only shows between addresses, and a host that goes dark."""

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

needs_namespaces = pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, ("ip", "tc"))), reason="needs root and iproute2"
)
pytestmark = needs_namespaces
ADDRESSES = {"a": "10.77.0.1", "b": "10.77.0.2"}
ADDRESSES_V6 = {"a": "fd77::1", "b": "fd77::2"}
PORT = 8470
SLOW = "12mbit"  # so that half a checkpoint takes some seconds
VERY_SLOW = "1mbit"  # so that a transfer of some blocks takes longer than it is given
IDLE_NBYTES = 4_000  # what it sends in some seconds, of a word a second
SENT_NBYTES = 400_000  # of them, when a host goes dark
MC_TIMEOUT_S = "5"  # the least it takes
_numbers = itertools.count()

SERVE = "import sys; from app.cli.main import main; sys.argv[0] = 'hotspare'; main()"
RANK = """
import json, sys
from pathlib import Path
import httpx
import torch
from safetensors.torch import load_file
from transfer import Restorer
from transfer.push.table import consumer_document
from transfer.slots import Slots

directory, url, disk = sys.argv[1:]
right = {}
for file in Path(directory).glob("*.safetensors"):
    right |= {name: tensor for name, tensor in load_file(file).items() if ".mlp.experts." in name}
held = {name: tensor.clone() for name, tensor in right.items()}
with httpx.Client(base_url=url, trust_env=False) as http, Restorer(url, checkpoint=disk or None) as restorer:
    slots = Slots.plain(held)
    restorer.bind(slots)
    print("session", restorer.session_id, flush=True)
    for line in sys.stdin:
        if line.strip() == "take back":
            done = {"status": http.delete("/v1/consumers/rank", timeout=60).status_code}
            for tensor in held.values():
                tensor.view(torch.uint8).fill_(0x5A)
            print("done", json.dumps(done), flush=True)
            continue
        if line.strip() == "intact":
            done = {"strange": sum(int((tensor.view(torch.uint8) != 0x5A).sum()) for tensor in held.values())}
            print("done", json.dumps(done), flush=True)
            continue
        for tensor in held.values():
            tensor.view(torch.uint8).fill_(0xA5)
        if line.strip() == "restore":
            report = restorer.restore()
            done = {"state": "succeeded" if report.ok else "failed", "by": report.bytes_by_source}
        elif line.strip() == "register on loopback":
            body = consumer_document(slots, restorer._bound.manifest, "127.0.0.1:16333", 300)
            answer = http.put("/v1/consumers/rank", json=body)
            print("done", json.dumps({"status": answer.status_code, "detail": answer.json().get("detail")}), flush=True)
            continue
        else:
            restorer.register("rank")
            document = http.post("/v1/restores", json={"target": {"consumer_id": "rank"}}).json()
            with http.stream("GET", f"/v1/restores/{document['id']}/events", timeout=60) as events:
                for said in events.iter_lines():
                    if said.startswith("data: "):
                        document = json.loads(said[6:])
            done = {"state": document["state"], "by": document["bytes_by_source"]}
        same = all(torch.equal(held[n].view(torch.uint8), right[n].view(torch.uint8)) for n in right)
        print("done", json.dumps(done | {"same": same}), flush=True)
"""


class Hosts:
    """Hosts a and b, joined by a cable."""

    def __init__(self) -> None:
        self._mark = f"{os.getpid()}x{next(_numbers)}"
        self.names = {host: f"hotspare-{self._mark}{host}" for host in ADDRESSES}
        self._ends = {host: f"hs{self._mark}{host}"[-15:] for host in ADDRESSES}
        try:
            for name in self.names.values():
                self._ip("netns", "add", name)
            one, other = self._ends.values()
            self._ip("link", "add", one, "type", "veth", "peer", "name", other)
            for host, end in self._ends.items():
                self._ip("link", "set", end, "netns", self.names[host])
                self._ip("-n", self.names[host], "addr", "add", f"{ADDRESSES[host]}/24", "dev", end)
                self._ip("-n", self.names[host], "addr", "add", f"{ADDRESSES_V6[host]}/64", "dev", end, "nodad")
                for device in ("lo", end):
                    self._ip("-n", self.names[host], "link", "set", device, "up")
        except BaseException:
            self.close()
            raise

    def slow_down(self, host: str, rate: str = SLOW) -> None:
        """Let it send only so much."""
        shape = ["tbf", "rate", rate, "burst", "32kb", "latency", "400ms"]
        try:
            self._tc(host, "replace", *shape)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this kernel cannot slow a link down: {error.stderr.strip()}")

    def free(self, host: str) -> None:
        """Let it send as much as it can again."""
        self._tc(host, "del")

    def _tc(self, host: str, verb: str, *shape: str) -> None:
        self._ip("netns", "exec", self.names[host], "tc", "qdisc", verb, "dev", self._ends[host], "root", *shape)

    def sent_nbytes(self, host: str) -> int:
        said = self._ip("-n", self.names[host], "-s", "-j", "link", "show", self._ends[host])
        return int(json.loads(said)[0]["stats64"]["tx"]["bytes"])

    def go_dark(self, host: str) -> None:
        """Nothing leaves it any more, not even a word that a connection is closed."""
        self._ip("-n", self.names[host], "link", "set", self._ends[host], "down")

    def close(self) -> None:
        for name in self.names.values():
            with suppress(subprocess.CalledProcessError):
                self._ip("netns", "del", name)

    @staticmethod
    def _ip(*arguments: str) -> str:
        return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    try:
        made = Hosts()
    except subprocess.CalledProcessError as error:  # a container without the right to
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    yield made
    made.close()


@pytest.fixture
def rank(
    hosts: Hosts,
    python: Callable[..., Any],
    python_with_torch: Callable[..., Any],
    namespace: str,
    moe_checkpoint: Path,
) -> Callable[..., Any]:
    """`rank(disk)` → a rank on host a, which has half of the blocks; host b has the others. It asks loopback."""

    def serve(host: str, listen: str, *more: str) -> Any:
        other = next(each for each in ADDRESSES if each != host)
        peer = f"{other}=http://{ADDRESSES[other]}:{PORT}"
        arguments = ["serve", "--model", "moe", "--namespace", namespace, "--checkpoint", moe_checkpoint, "--insecure"]
        arguments += ["--node-id", host, "--listen", f"{listen}:{PORT}", "--peer", peer, "--replicas", "1", *more]
        return python(SERVE, *arguments, network=hosts.names[host], environment=environment)

    def start(disk: Path | None = None) -> Any:
        nodes = [serve("a", "0.0.0.0", "--data-host", ADDRESSES["a"]), serve("b", ADDRESSES["b"])]
        for node in nodes:
            node.expect(f"{'ab'[nodes.index(node)]} is ready")
        url, where = f"http://127.0.0.1:{PORT}", {"network": hosts.names["a"], "environment": environment}
        return python_with_torch(RANK, moe_checkpoint, url, disk or "", **where)

    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HOTSPARE_", "MC_"))}
    environment = kept | {"MC_TRANSFER_TIMEOUT": MC_TIMEOUT_S}
    return start


def done(rank: Any, what: str) -> dict[str, Any]:
    rank.tell(what)
    document: dict[str, Any] = json.loads(rank.expect("done"))
    return document


def test_a_rank_that_asks_its_node_on_loopback_is_written_by_other_hosts(rank: Callable[..., Any]) -> None:
    asking = rank()
    assert asking.expect("session").startswith(ADDRESSES["a"]), "the address that its node is known by"
    for what in ("restore", "push"):
        found = done(asking, what)
        assert (found["state"], found["same"]) == ("succeeded", True), found
        assert found["by"]["local"] > 0 < found["by"]["peer"]
        assert found["by"]["disk"] == 0
    refused = done(asking, "register on loopback")
    assert refused["status"] == 422
    assert f"as this node did on {ADDRESSES['a']}" in refused["detail"]


@pytest.mark.parametrize("what", ["restore", "push"])
def test_a_host_that_goes_dark_in_the_middle_is_replaced_by_the_disk(
    hosts: Hosts, rank: Callable[..., Any], moe_checkpoint: Path, wait_until: Callable[..., Any], what: str
) -> None:
    asking = rank(moe_checkpoint)
    asking.expect("session")
    hosts.slow_down("b")
    before = hosts.sent_nbytes("b")
    asking.tell(what)
    wait_until(lambda: hosts.sent_nbytes("b") > before + SENT_NBYTES, "under way")
    hosts.go_dark("b")
    found = json.loads(asking.expect("done"))
    assert (found["state"], found["same"]) == ("succeeded", True), found
    assert found["by"]["local"] > 0 < found["by"]["disk"]


@pytest.mark.parametrize("addresses", [ADDRESSES, ADDRESSES_V6], ids=["ipv4", "ipv6"])
@pytest.mark.parametrize("everywhere", [False, True], ids=["one address", "every address"])
def test_a_node_is_filled_from_another_host_whatever_the_address_is_like(
    hosts: Hosts,
    python: Callable[..., Any],
    namespace: str,
    moe_checkpoint: Path,
    addresses: dict[str, str],
    everywhere: bool,
) -> None:
    """On hosts without a default route, a node that listens everywhere has the address that leads to its peers."""

    def url(host: str) -> str:
        return f"[{host}]:{PORT}" if ":" in host else f"{host}:{PORT}"

    def serve(host: str, *more: object) -> Any:
        other = next(each for each in addresses if each != host)
        listen = ("::" if ":" in addresses[host] else "0.0.0.0") if everywhere else addresses[host]
        arguments = ["serve", "--model", "moe", "--namespace", namespace, "--insecure", "--replicas", "2", *more]
        arguments += ["--node-id", host, "--listen", url(listen), "--peer", f"{other}=http://{url(addresses[other])}"]
        return python(SERVE, *arguments, network=hosts.names[host])

    filled = serve("a", "--checkpoint", moe_checkpoint)
    filled.expect("a is ready")
    from_peer = serve("b")
    assert "from peer" in from_peer.expect("b is ready after")
    assert "--data-host" not in from_peer.stop()[2]
    assert filled.stop()[0] == 0


def test_over_a_slow_link_nothing_is_written_after_the_registration_was_taken_back(
    hosts: Hosts, rank: Callable[..., Any], wait_until: Callable[..., Any]
) -> None:
    """The other host's writes are given up on; the disk takes its place, the restore succeeds, DELETE is answered, and
    the memory, which stays registered, is used for something else."""
    asking = rank()
    asking.expect("session")
    assert done(asking, "push")["by"]["disk"] == 0
    hosts.slow_down("b", VERY_SLOW)
    found = done(asking, "push")
    assert (found["state"], found["same"]) == ("succeeded", True), found
    assert found["by"]["disk"] > 0, "the other host was in time: nothing was given up on"
    assert done(asking, "take back")["status"] == 204
    hosts.free("b")
    before = hosts.sent_nbytes("b")
    wait_until(lambda: hosts.sent_nbytes("b") > before + IDLE_NBYTES, "it has gone on asking how its peer is")
    assert done(asking, "intact")["strange"] == 0

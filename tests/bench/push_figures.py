"""A node writing an engine's slots, none of the engine's code running, against a bare loop of Mooncake reads.

    python tests/bench/push_figures.py [--gib 1] [--rounds 5] [--device cpu]

The node is a real `hotspare serve` that holds every block; the engine is this process: fused slots, registered with a
Mooncake engine and as a consumer. Ours: from `POST /v1/restores` to the answer that says succeeded, with every block's
checksum taken at the node before it is sent; and the same with `read_back`. The baseline: this process's engine reads
the same bytes of the node's memory into the same slots with Mooncake's `batch_transfer_sync_read`, and no checksum.
"""

from __future__ import annotations

import time
from typing import Any

import httpx
import torch
from workbench import GIB, MODEL, Daemon, Figure, arguments, bench, paired, shape_of, tell

from app.cli.daemon import silence_native_output
from app.cluster.peers import PeerClient
from shm.manifest import Manifest
from transfer.checkpoint import read_checkpoint
from transfer.engine import Copy, MooncakeEngine
from transfer.engine.protocol import within_pieces
from transfer.plan import Limits, split
from transfer.push.table import consumer_document
from transfer.slots import Slots
from transfer.slots.table import SlotTable

HOST = "127.0.0.1"
CONSUMER = "rank-0"
ITEM_NBYTES = 8 << 20
POLL_S = 0.02  # each asking costs the node a millisecond
TORCH = {"F8_E4M3": torch.float8_e4m3fn, "F32": torch.float32}


def fused(manifest: Manifest, device: str) -> dict[str, torch.Tensor]:
    """An engine's parameters for every expert, of zeros, every page touched."""
    held = {}
    experts = len({key.expert for key in manifest.keys})
    stored = {tensor.name.split(".experts.0.")[1]: tensor for tensor in manifest.block(0).tensors}
    for layer in sorted({key.layer for key in manifest.keys}):
        stem = f"model.layers.{layer}.mlp.experts"
        for kind in ("weight", "weight_scale_inv"):
            for part, name, times in (("w13", "gate_proj", 2), ("w2", "down_proj", 1)):
                tensor = stored[f"{name}.{kind}"]
                rows, columns = tensor.shape
                raw = torch.zeros((experts, times * rows, columns), dtype=TORCH[tensor.dtype])
                held[f"{stem}.{part}_{kind}"] = raw.to(device)
    return held


class Scene:
    """A consumer's slots, and two ways to fill them. Each returns seconds."""

    def __init__(self, url: str, manifest: Manifest, device: str) -> None:
        self._url = url
        self._http = httpx.Client(trust_env=False, timeout=60)
        self._parameters = fused(manifest, device)
        slots = Slots.fused(self._parameters)
        with silence_native_output():
            self._engine = MooncakeEngine(HOST)
        self._engine.register([(r.address, r.nbytes) for r in slots.ranges])
        body = consumer_document(slots, manifest, self._engine.session_id, 3600)
        self._http.put(f"{url}/v1/consumers/{CONSUMER}", json=body).raise_for_status()
        client = PeerClient()
        peer = client.blocks(url, "node", manifest)
        client.close()
        self._session_id = peer.session_id
        table = SlotTable(slots.plan(manifest), manifest)
        self._copies = [
            Copy(
                copy.address + at, peer.blocks[row][0] + copy.block_offset + at, min(ITEM_NBYTES, copy.run_nbytes - at)
            )
            for row in range(len(manifest))
            for copy in table.by_slot(row)[0]
            for at in range(0, copy.run_nbytes, ITEM_NBYTES)
        ]

    def pushed(self, *, read_back: bool = False) -> float:
        started = time.perf_counter()
        body: dict[str, Any] = {"target": {"consumer_id": CONSUMER}, "read_back": read_back}
        found = self._http.post(f"{self._url}/v1/restores", json=body).json()
        while found["state"] in ("pending", "running"):
            time.sleep(POLL_S)
            found = self._http.get(f"{self._url}/v1/restores/{found['id']}").json()
        seconds = time.perf_counter() - started
        assert found["state"] == "succeeded", found
        return seconds

    def read_back(self) -> float:
        return self.pushed(read_back=True)

    def bare(self) -> float:
        started = time.perf_counter()
        for part in split(self._copies, Limits()):
            here, there, sizes = map(list, zip(*within_pieces(part), strict=True))
            assert self._engine._engine.batch_transfer_sync_read(self._session_id, here, there, sizes) == 0
        return time.perf_counter() - started


def main() -> None:
    options = arguments(
        __doc__, gib=(1.0, "GiB of experts"), rounds=(5, "pairs of runs"), device=("cpu", "where the slots are")
    )
    with bench() as made:
        directory = made.checkpoint("checkpoint", shape_of(int(options.gib * GIB)))
        with Daemon(made, "node", "--checkpoint", str(directory), "--fill", "disk") as daemon:
            daemon.wait_until_ready()
            manifest = read_checkpoint(directory, MODEL).manifest
            scene = Scene(daemon.url, manifest, options.device)
            nbytes = int(manifest.nbytes.sum())
            pushed = paired(scene.pushed, scene.bare, options.rounds, nbytes)
            compared = paired(scene.read_back, scene.bare, max(1, options.rounds // 2), nbytes)
    figures = [
        Figure(
            f"push into a consumer's {what} memory, {nbytes / GIB:.1f} GiB, of a bare read loop", f"{pairs.ratio:.2f}",
            note=f"{pairs.rate(pairs.ours_s)} against {pairs.rate(pairs.bare_s)}; rounds {pairs.spread}",
        )
        for what, pairs in ((options.device, pushed), (f"{options.device} (read back)", compared))
    ]  # fmt: skip
    tell(figures, {"pushed": pushed.document(), "read_back": compared.document()}, as_json=options.json)


if __name__ == "__main__":
    main()
